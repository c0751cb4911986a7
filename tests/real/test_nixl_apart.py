"""NIXL between machines: prefill and decode in network namespaces of their own, and the router in a third.

```text
 router 10.77.1.1 ── 10.77.1.2 prefill 10.77.0.1 ── KV ── 10.77.0.2 decode 10.77.2.2 ── 10.77.2.1 router
```

The nodes are started one by one, as others would start them; `pegaflow plan` says how.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import machine
from pegaflow import ROOT, command, without_connector
from prompts import Exact, full_chunks, prompt

CONFIG = ROOT / "configs/1p1d-nixl-cpu.toml"
LENGTHS = [1, 31, 32, 33, 64, 65, 321, 900, 1500]
HITS = "vllm:external_prefix_cache_hits_total"
USED = "vllm:kv_cache_usage_perc"
# The last, partial block travels too, so the rest of a prompt is computed in other pieces than alone.
ROUNDING = 0.05
# How long a prefill node keeps KV that nobody asks for, and some time to see it.
LEASE = 30 + 10
PORT = 8000
HTTP = {"router": "10.77.1.1", "prefill": "10.77.1.2", "decode": "10.77.2.2"}
SIDE_CHANNEL = {"prefill": "10.77.0.1", "decode": "10.77.0.2"}
LINKS = [
    (("prefill", "kv0", "10.77.0.1/24"), ("decode", "kv0", "10.77.0.2/24")),
    (("router", "p0", "10.77.1.1/24"), ("prefill", "r0", "10.77.1.2/24")),
    (("router", "d0", "10.77.2.1/24"), ("decode", "r0", "10.77.2.2/24")),
]
ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.stdin.buffer.read() or None, {"content-type": "application/json"})
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=120).read())
"""


class Machines:
    """Three network namespaces and what runs in them; all of it is gone at the end."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack = folder, stack
        self.names = {role: f"pegaflow-{os.getpid()}-{role}" for role in HTTP}
        for name in self.names.values():
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for one, other in LINKS:
            ends = [["name", device, "netns", self.names[role]] for role, device, _ in (one, other)]
            run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for role, device, address in (one, other):
                run("ip", "-n", self.names[role], "address", "add", address, "dev", device)
                run("ip", "-n", self.names[role], "link", "set", device, "up")
        self.processes: dict[str, subprocess.Popen] = {}
        planned = subprocess.run(command("plan", str(CONFIG), "--json"), capture_output=True, check=True)
        self.plan = {node["id"]: node for node in json.loads(planned.stdout)["nodes"]}

    def start(self, role: str, argv: list[str], env: dict[str, str]) -> None:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[role], *argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / f"{role}.log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.stack.callback(end, process)
        self.processes[role] = process

    def start_node(self, role: str) -> None:
        argv = list(self.plan[role]["argv"])
        argv[argv.index("--host") + 1] = HTTP[role]
        argv[argv.index("--port") + 1] = str(PORT)
        env = os.environ | self.plan[role]["env"] | {"VLLM_NIXL_SIDE_CHANNEL_HOST": SIDE_CHANNEL[role]}
        # No shared memory and no copies between processes: what there is between machines.
        env |= {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "kv0"}
        del env["VLLM_API_KEY"]
        self.start(role, argv, env)

    def start_router(self) -> None:
        nodes = [f"--{role}=http://{HTTP[role]}:{PORT}" for role in ("prefill", "decode")]
        flags = ["--connector", "nixl", "--host", HTTP["router"], "--port", str(PORT)]
        self.start("router", command("router", *flags, *nodes), dict(os.environ))

    def fetch(self, role: str, path: str, body: dict | None = None) -> bytes:
        """From the router's machine."""
        argv = ["ip", "netns", "exec", self.names["router"], "python3", "-c", ASK, f"http://{HTTP[role]}:{PORT}{path}"]
        sent = json.dumps(body).encode() if body else b""
        asked = subprocess.run(argv, input=sent, capture_output=True, timeout=150)
        assert asked.returncode == 0, asked.stderr.decode()[-2000:]
        return asked.stdout

    def ask(self, role: str, ids: list[int]) -> Exact:
        body = {
            "model": "tiny",
            "prompt": ids,
            "temperature": 0,
            "max_tokens": 32,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
        }
        choice = json.loads(self.fetch(role, "/v1/completions", body))["choices"][0]
        return Exact(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))

    def figure(self, role: str, name: str) -> float:
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.fetch(role, "/metrics").decode(), re.MULTILINE)
        assert found, f"{role} has no {name}"
        return sum(map(float, found))

    def phases(self) -> dict[str, str]:
        try:
            nodes = json.loads(self.fetch("router", "/status"))["fleet"]["nodes"]
        except AssertionError:
            return {}
        return {name: node["phase"] for name, node in nodes.items()}

    def carried(self) -> int:
        """Bytes that have come to decode from prefill."""
        argv = ["ip", "-n", self.names["decode"], "-s", "-j", "link", "show", "kv0"]
        return json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)[0]["stats64"]["rx"]["bytes"]

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            gone = [role for role, process in self.processes.items() if process.poll() is not None]
            assert not gone, f"{gone} ended:\n{(self.folder / f'{gone[0]}.log').read_text(errors='replace')[-4000:]}"
            return self.phases() == {"prefill": "ready", "decode": "ready"}

        machine.wait_until(ready, 600, "all nodes are ready")

    def kill(self, role: str) -> None:
        """Everything of it at once, as when a machine goes."""
        process = self.processes.pop(role)
        for pid in machine.tree(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


def end(process: subprocess.Popen) -> None:
    pids = machine.tree(process.pid) if process.poll() is None else set()
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in pids:
        if machine.alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with ExitStack() as stack:
        yield Machines(tmp_path_factory.mktemp("apart"), stack)


@pytest.fixture(scope="module")
def expected(machines: Machines) -> dict[int, Exact]:
    """What a node without a connector answers, alone on decode's machine; it is gone when the others start."""
    node = machines.plan["decode"]
    argv = without_connector(node["argv"], PORT)
    argv[argv.index("--host") + 1] = HTTP["decode"]
    env = {
        key: value for key, value in (os.environ | node["env"]).items() if not key.startswith(("PEGAFLOW", "VLLM_NIXL"))
    }
    del env["VLLM_API_KEY"], env["PYTHONPATH"]
    machines.start("decode", argv, env)

    def healthy() -> bool:
        assert machines.processes["decode"].poll() is None
        try:
            return machines.fetch("decode", "/health") == b""
        except AssertionError:
            return False

    machine.wait_until(healthy, 300, "the plain node is healthy")
    answers = {length: machines.ask("decode", prompt(61, length)) for length in LENGTHS}
    machines.kill("decode")
    return answers


@pytest.fixture(scope="module")
def fleet(machines: Machines, expected: dict[int, Exact]) -> Machines:
    for role in ("prefill", "decode"):
        machines.start_node(role)
    machines.start_router()
    machines.wait_until_ready()
    return machines


def holds_nothing(fleet: Machines) -> bool:
    return fleet.figure("prefill", USED) == 0


def test_the_kv_crosses_the_wire_and_answers_are_a_plain_node_s(fleet: Machines, expected: dict[int, Exact]):
    hits, carried = fleet.figure("decode", HITS), fleet.carried()
    for length in LENGTHS:
        assert fleet.ask("router", prompt(61, length)).difference(expected[length]) <= ROUNDING, length
    chunks = sum(full_chunks(prompt(61, length)) for length in LENGTHS)
    assert fleet.figure("decode", HITS) - hits >= 32 * chunks
    # Four layers, K and V, two heads of 32, two bytes each.
    assert fleet.carried() - carried >= 32 * chunks * 4 * 2 * 2 * 32 * 2
    machine.wait_until(lambda: holds_nothing(fleet), 5, "prefill holds nothing any more")


@pytest.mark.parametrize("victim", ["decode", "prefill"])
def test_a_death_loses_no_request_and_strands_nothing(fleet: Machines, expected: dict[int, Exact], victim: str):
    ends = time.monotonic() + 12

    def work(worker: int) -> int:
        answered = 0
        while time.monotonic() < ends:
            length = LENGTHS[3 + (worker + answered) % 5]
            answer = fleet.ask("router", prompt(61, length))
            # Beside others in a batch, sums are rounded otherwise: a near tie may go the other way.
            assert answer.departure(expected[length])[1] <= ROUNDING, answer.departure(expected[length])
            answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, worker) for worker in range(4)]
        time.sleep(3)
        fleet.kill(victim)
        assert sum(worker.result() for worker in workers) > 8
    if victim == "decode":
        machine.wait_until(lambda: holds_nothing(fleet), LEASE, "prefill holds nothing any more")
    fleet.start_node(victim)
    fleet.wait_until_ready()
    # Its own from the first token on: decode has it in no cache.
    before = fleet.figure("decode", HITS)
    fleet.ask("router", prompt(71 if victim == "decode" else 72, 900))
    assert fleet.figure("decode", HITS) - before >= 32 * 28, "hand-offs go on"
    machine.wait_until(lambda: holds_nothing(fleet), LEASE, "prefill holds nothing any more")
