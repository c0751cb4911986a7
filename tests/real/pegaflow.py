"""Runs the real binary on real vLLM: a Fleet is one `pegaflow up`, a Reference one independent vLLM node."""

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

import machine
from prompts import NodeUrl

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("PEGAFLOW_BIN", ROOT / "target/release/pegaflow"))
# The first start may have to install vLLM.
READY_LIMIT = 900
RESTART_LIMIT = 600
GONE_LIMIT = 5


def command(*args: str) -> list[str]:
    return [str(BINARY), *args]


class Fleet:
    """One topology; started, killed and started again in one private run directory."""

    def __init__(self, topology: Path, url: str, workdir: Path):
        self.topology, self.url, self.workdir = topology, url, workdir
        self.process: subprocess.Popen | None = None
        self.starts = 0
        self.shm_before = machine.shm_files()
        for name in ("run", "state"):
            (workdir / name).mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "XDG_RUNTIME_DIR": str(self.workdir / "run"),
            "XDG_STATE_HOME": str(self.workdir / "state"),
            "NO_COLOR": "1",
        }

    def spawn(self) -> None:
        self.starts += 1
        self.log = self.workdir / f"pegaflow-{self.starts}.log"
        self.process = subprocess.Popen(
            command("up", str(self.topology)),
            cwd=ROOT,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def up(self) -> float:
        """Starts and waits for "ready"; returns the seconds it took."""
        started = time.monotonic()
        self.spawn()
        machine.wait_until(self._is_ready, READY_LIMIT, "pegaflow is ready")
        return time.monotonic() - started

    def _is_ready(self) -> bool:
        code = self.process.poll()
        assert code is None, f"pegaflow ended with {code}:\n{self.tail()}"
        return "pegaflow is ready" in self.output()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.output().splitlines()[-lines:])

    @property
    def pid(self) -> int:
        return self.process.pid

    def node(self, name: str) -> dict:
        return httpx.get(f"{self.url}/status", timeout=30).json()["fleet"]["nodes"][name]

    def node_url(self, name: str) -> NodeUrl:
        return NodeUrl.of(self.node(name))

    def is_back(self, name: str, incarnation: int) -> bool:
        node = self.node(name)
        return node["incarnation"] > incarnation and node["phase"] == "ready" and node["kv"] == "proven"

    def wait_for_return(self, name: str, incarnation: int) -> float:
        """Waits until a later life of the node is ready and its KV proven; returns the seconds."""
        started = time.monotonic()
        machine.wait_until(lambda: self.is_back(name, incarnation), RESTART_LIMIT, f"{name} is back, ready and proven")
        return time.monotonic() - started

    def metric(self, name: str) -> float:
        return metric(f"{self.url}/metrics", name)

    def node_metric(self, node: str, name: str) -> float:
        return metric(f"{self.node_url(node)}/metrics", name)

    def run_files(self) -> list[str]:
        """What is left in the run directory; an instance's lock file may stay."""
        files = [str(path) for path in (self.workdir / "run").rglob("*") if not path.is_dir()]
        return [path for path in files if not path.endswith("lock")]

    def assert_nothing_left(self, pids: set[int], limit: float) -> None:
        def left() -> tuple:
            processes = {pid for pid in pids if machine.alive(pid)}
            return processes, machine.shm_left(self.shm_before), self.run_files()

        end = time.monotonic() + limit
        while any(left()) and time.monotonic() < end:
            time.sleep(0.05)
        processes, shm, files = left()
        assert not processes, f"alive after {limit} s:\n{machine.describe(processes)}"
        assert not shm, f"left in /dev/shm: {shm}"
        assert not files, f"left in the run directory: {files}"

    def stop(self) -> None:
        """SIGTERM; everything has to be gone."""
        pids = machine.tree(self.pid)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0
        self.assert_nothing_left(pids, 1)

    def close(self) -> None:
        """Leaves nothing behind, whatever state a failed test left."""
        if self.process is None:
            return
        pids = machine.tree(self.pid) if self.process.poll() is None else set()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in pids:
            if machine.alive(pid):
                os.kill(pid, signal.SIGKILL)


def metric(url: str, name: str) -> float:
    """The sum over all labels of a figure in Prometheus text; a figure that nobody declares is an error."""
    lines = httpx.get(url, timeout=30).text.splitlines()
    family = name.removesuffix("_total")
    declared = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert declared & {name, family}, f"{url} has no {name}"
    samples = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


class Reference:
    """A vLLM node without connector, started directly: the same flags, nothing of pegaflow in it."""

    def __init__(self, fleet: Fleet, workdir: Path, like: str = "decode"):
        leader = fleet.node(like)["pid"]
        self.port = machine.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.argv = without_connector(machine.argv(leader), self.port)
        self.python = self.argv[0]
        env = {k: v for k, v in machine.environment(leader).items() if not k.startswith("PEGAFLOW")}
        env.pop("PYTHONPATH", None)
        # The key of this run is the fleet's.
        env.pop("VLLM_API_KEY", None)
        env["VLLM_PORT"] = str(machine.free_port())
        self.log = workdir / "reference.log"
        self.fleet, self.shm_before = fleet, machine.shm_files()
        self.forgotten: set[str] = set()
        # As many cores as the node has: another number of threads sums in another order.
        cores = os.sched_getaffinity(leader)
        self.process = subprocess.Popen(
            self.argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def wait(self) -> None:
        def healthy() -> bool:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        machine.wait_until(healthy, READY_LIMIT, "the reference node is healthy")
        # vLLM forgets semaphores that it made while it started. The fleet is idle meanwhile: none is the fleet's.
        self.forgotten = machine.shm_files() - self.shm_before
        self.fleet.shm_before |= self.forgotten

    def close(self) -> None:
        """Cleans up after itself: what vLLM leaves in /dev/shm must not look like pegaflow's."""
        pids = machine.tree(self.process.pid)
        shm = machine.shm_in_use(pids) | self.forgotten
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            if machine.alive(pid):
                os.kill(pid, signal.SIGKILL)
        for name in shm:
            (machine.SHM / name).unlink(missing_ok=True)


def without_connector(argv: list[str], port: int) -> list[str]:
    """A node's command line with another port and without --kv-transfer-config."""
    kept, skip = [], False
    for arg in argv:
        flag = arg.partition("=")[0]
        if skip:
            skip = False
        elif flag in ("--kv-transfer-config", "--port"):
            skip = "=" not in arg
        else:
            kept.append(arg)
    assert len(kept) < len(argv), f"no connector in {argv}"
    assert not any("PegaConnector" in arg for arg in kept)
    return [*kept, "--port", str(port)]
