"""Nodes that others started share `pegaflow engine`, behind `pegaflow router`: every way to learn that KV is ready."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import machine
from conftest import CPU_CONFIG
from pegaflow import READY_LIMIT, command, metric
from prompts import BLOCK, ask, full_chunks, prompt

pytestmark = pytest.mark.soak

SECRETS = {"PEGAFLOW_KV_TOKEN": "token-of-tests", "PEGAFLOW_ADMIN_KEY": "key-of-tests"}
HITS = "vllm:external_prefix_cache_hits_total"
FALLBACKS = "pegaflow_router_fallbacks_total"
SHIM = Path(__file__).resolve().parents[2] / "python-shim"


class Alone:
    """The store, two nodes and a router for each way, all started one by one."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack = folder, stack
        self.processes: dict[str, subprocess.Popen] = {}
        self.socket = folder / "engine.sock"
        self.routers = {way: f"http://127.0.0.1:{machine.free_port()}" for way in ("engine", "callback", "reply")}
        planned = subprocess.run(command("plan", str(CPU_CONFIG), "--json"), capture_output=True, check=True)
        nodes = {node["id"]: node for node in json.loads(planned.stdout)["nodes"]}
        self.start("engine", command("engine", "--socket", str(self.socket), "--capacity", "256MiB"))
        machine.wait_until(self.socket.exists, 30, "the engine listens")
        self.urls = {name: self.node(name, node) for name, node in nodes.items()}
        ways = {
            "engine": ["--engine", str(self.socket)],
            "callback": ["--kv-ready", "callback"],
            "reply": ["--kv-ready", "reply"],
        }
        for way, flags in ways.items():
            port = self.routers[way].rpartition(":")[2]
            nodes_of_others = ["--prefill", self.urls["prefill"], "--decode", self.urls["decode"]]
            self.start(f"router-{way}", command("router", "--port", port, *nodes_of_others, *flags))
            machine.wait_until(lambda way=way: self.is_ready(self.routers[way]), READY_LIMIT, f"router {way} is ready")

    def start(self, name: str, argv: list[str], env: dict[str, str] | None = None) -> subprocess.Popen:
        process = subprocess.Popen(
            argv,
            env=(os.environ | SECRETS if env is None else env),
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / f"{name}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.stack.callback(end, process)
        self.processes[name] = process
        return process

    def node(self, name: str, planned: dict) -> str:
        port = machine.free_port()
        argv = planned["argv"]
        argv[argv.index("--port") + 1] = str(port)
        env = os.environ | planned["env"] | SECRETS
        env |= {"PEGAFLOW_KV_SOCKET": str(self.socket), "PYTHONPATH": str(SHIM), "VLLM_PORT": str(machine.free_port())}
        env["PEGAFLOW_ROUTER_ENDPOINT"] = self.routers["callback"]
        del env["VLLM_API_KEY"]
        self.start(name, argv, env)
        return f"http://127.0.0.1:{port}"

    def is_ready(self, url: str) -> bool:
        gone = [name for name, process in self.processes.items() if process.poll() is not None]
        assert not gone, f"{gone} ended: see {self.folder}"
        try:
            nodes = httpx.get(f"{url}/status", timeout=5).json()["fleet"]["nodes"].values()
        except httpx.HTTPError:
            return False
        return all(node["phase"] == "ready" for node in nodes)

    def hits(self) -> float:
        return metric(f"{self.urls['decode']}/metrics", HITS)


def end(process: subprocess.Popen) -> None:
    pids = machine.tree(process.pid)
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in pids:
        if machine.alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with ExitStack() as stack:
        yield Alone(tmp_path_factory.mktemp("alone"), stack)


@pytest.mark.parametrize("way", ["engine", "callback", "reply"])
def test_every_full_chunk_is_handed_off_and_the_answer_is_a_plain_nodes(alone: Alone, way: str):
    router = alone.routers[way]
    for length in (20, 96, 97, 640):
        ids = prompt(sum(way.encode()), length)
        hits, fallbacks = alone.hits(), metric(f"{router}/metrics", FALLBACKS)
        answer = ask(router, ids, model="tiny")
        # vLLM counts all of them, also the last one of which it computes the last token itself.
        chunks = full_chunks(ids)
        assert alone.hits() - hits == chunks * BLOCK, length
        assert metric(f"{router}/metrics", FALLBACKS) == fallbacks, length
        # Decode, asked without a hand-off and under another salt, computes everything.
        plain = ask(alone.urls["decode"], ids, model="tiny", cache_salt=f"{way}{length}")
        assert answer.difference(plain) == 0.0, length


def test_the_routers_outlive_the_store(alone: Alone):
    """Its end costs hand-offs, not answers; a new one is found by router and nodes."""
    router = alone.routers["engine"]
    down = "pegaflow_router_engine_connected"
    pid = next(pid for pid in machine.tree(os.getpid()) if "engine" in machine.argv(pid)[1:2])
    os.kill(pid, signal.SIGKILL)
    machine.wait_until(lambda: metric(f"{router}/metrics", down) == 0, 30, "the router sees it")
    assert len(ask(router, prompt(1, 200), model="tiny").tokens) == 32
    alone.start("engine-2", command("engine", "--socket", str(alone.socket), "--capacity", "256MiB"))
    machine.wait_until(lambda: metric(f"{router}/metrics", down) == 1, 30, "the router finds the new one")
    seeds = iter(range(2, 200))

    def handed_off() -> bool:
        hits = alone.hits()
        ask(router, prompt(next(seeds), 200), model="tiny")
        return alone.hits() - hits == 6 * BLOCK

    machine.wait_until(handed_off, 90, "hand-offs are back")
