"""Each process of a real node, and pegaflow itself, killed, crashed and stopped, while requests run.

One fleet lives through all of it; the tests run in the order of the file. With `-s` the last one prints the table of
docs/reliability.md.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import machine
from conftest import CPU_CONFIG, own_workers, served_model
from load import Ending, Load
from pegaflow import GONE_LIMIT, Fleet
from prompts import BLOCK, ask, prompt

pytestmark = pytest.mark.soak

HITS = "vllm:external_prefix_cache_hits_total"
SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]
MEMBERS = ["leader", "EngineCore", "worker", "guard"]
NODES = ["prefill", "decode"]
# A hang is decided after 20 s, so a stopped process is found within about 30.
SUPERVISOR = """
[supervisor]
hang_timeout = "20s"
idle_canary = "5s"
backoff_first = "1s"
backoff_max = "1s"
crash_limit = 1000
"""
# Each process with each signal, and each process in both roles.
FAULTS = [
    (NODES[(row + column) % 2], member, number)
    for row, member in enumerate(MEMBERS)
    for column, number in enumerate(SIGNALS)
]


@dataclass
class Row:
    """One line of the table."""

    fault: str
    seen: str
    back: float
    endings: list[Ending]

    def __str__(self) -> str:
        broken = sum(not ending.complete and not ending.lost for ending in self.endings)
        lost = sum(ending.lost for ending in self.endings)
        return f"| {self.fault} | {self.seen} | {self.back:.0f} s | {len(self.endings)} | {broken} | {lost} |"


TABLE: list[Row] = []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory):
    """The shipped topology at a port of its own, with less patience, and every process that a node on GPUs has."""
    folder: Path = tmp_path_factory.mktemp("faults")
    port = machine.free_port()
    text = own_workers(CPU_CONFIG.read_text())
    for old, new in {
        'listen = "127.0.0.1:8000"': f'listen = "127.0.0.1:{port}"',
        'model = "builtin:tiny"': 'name = "faults"\nmodel = "builtin:tiny"',
        'capacity = "1GiB"': 'capacity = "256MiB"',
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "faults.toml"
    file.write_text(text + SUPERVISOR)
    fleet = Fleet(file, f"http://127.0.0.1:{port}", folder)
    try:
        print(f"\nready after {fleet.up():.1f} s")
        yield fleet
    finally:
        fleet.close()


def member(leader: int, name: str) -> int:
    """A process of the node; on CPU there is a worker process even with one rank."""
    if name == "leader":
        return leader
    if name == "guard":
        return machine.parent(leader)
    tree = machine.tree(leader)
    found = [pid for pid in tree if machine.argv(pid)[0].lower().startswith(f"vllm::{name.lower()}")]
    assert len(found) == 1, f"{name} of {machine.describe(tree)}"
    return found[0]


def assert_whole(fleet: Fleet, model: str, seed: int) -> None:
    """Both nodes are proven, and a hand-off answers what decode computes by itself."""
    for name in NODES:
        machine.wait_until(lambda name=name: fleet.is_back(name, 0), 120, f"{name} is proven")
    ids = prompt(seed, 10 * BLOCK + 5)
    hits = fleet.node_metric("decode", HITS)
    answer = ask(fleet.url, ids, model=model)
    assert fleet.node_metric("decode", HITS) - hits == 10 * BLOCK, "decode did not load it"
    alone = ask(fleet.node_url("decode"), ids, model=model, cache_salt=f"alone-{seed}")
    assert answer.difference(alone) == 0.0


def judge(endings: list[Ending], *, decode: bool) -> None:
    """Nothing is lost; only a stream of decode that had begun may end with an error."""
    failed = [ending for ending in endings if not ending.complete]
    lost = [ending for ending in failed if ending.lost or not decode]
    assert not lost, lost
    silent = [ending for ending in failed if "without an error" in ending.error]
    assert not silent, f"streams that ended as if nothing had happened: {silent}"


@pytest.mark.parametrize(
    ("name", "victim", "number"), FAULTS, ids=lambda it: it.name if isinstance(it, signal.Signals) else it
)
def test_a_fault_of_a_node(fleet: Fleet, name: str, victim: str, number: signal.Signals):
    model = served_model(fleet)
    node = fleet.node(name)
    # A stopped guard is no fault yet: it is one when it should see a death.
    blind = victim == "guard" and number == signal.SIGSTOP
    pid = member(node["pid"], victim)
    tree = machine.tree(machine.parent(node["pid"]))
    shm = machine.shm_in_use(tree)
    with Load(fleet.url, model, workers=4, max_tokens=32) as running:
        machine.wait_until(lambda: len(running.endings) >= 4, 120, "the load runs")
        started = time.monotonic()
        hit(pid, number, rust=victim == "guard")
        if blind:
            count = len(running.endings)
            machine.wait_until(lambda: len(running.endings) >= count + 8, 120, "it serves without its guard")
            assert fleet.node(name)["incarnation"] == node["incarnation"]
            started = time.monotonic()
            os.kill(node["pid"], signal.SIGKILL)
        # The node that starts again needs the processor as well.
        running.pause = 2.0
        dead = machine.wait_until(lambda: gone(fleet, name, node["incarnation"]), 120, "its death is seen")
        seen = time.monotonic() - started
        fleet.wait_for_return(name, node["incarnation"])
        back = time.monotonic() - started
        count = len(running.endings)
        machine.wait_until(lambda: len(running.endings) >= count + 8, 120, "the load goes on")
        endings = running.stop()
    fault = f"{name}: {victim}, {number.name[3:]}" + (", then leader, KILL" if blind else "")
    TABLE.append(Row(fault, f"{seen:.2f} s: {dead['reason']}", back, endings))
    print(TABLE[-1])
    judge(endings, decode=name == "decode")
    assert not {pid for pid in tree if machine.alive(pid)}, machine.describe(tree)
    # Others may use /dev/shm as well.
    left = machine.shm_left(fleet.shm_before) & shm
    assert not left, f"left in /dev/shm: {left}"
    assert_whole(fleet, model, 100 + len(TABLE))


def hit(pid: int, number: signal.Signals, *, rust: bool) -> None:
    """Rust takes a first SIGSEGV for a fault that will come again, and lets the second one kill."""
    os.kill(pid, number)
    if rust and number == signal.SIGSEGV:
        time.sleep(0.2)
        os.kill(pid, number)


def gone(fleet: Fleet, name: str, incarnation: int) -> dict | None:
    """The node's entry, once it does not serve as this incarnation any more."""
    node = fleet.node(name)
    serves = node["phase"] in ("ready", "unreachable") and node["incarnation"] == incarnation
    return None if serves else node


def test_a_stopped_pegaflow_goes_on(fleet: Fleet):
    model = served_model(fleet)
    lives = {name: fleet.node(name)["incarnation"] for name in NODES}
    with Load(fleet.url, model, workers=4, max_tokens=32) as running:
        machine.wait_until(lambda: len(running.endings) >= 4, 120, "the load runs")
        os.kill(fleet.pid, signal.SIGSTOP)
        try:
            # Longer than `hang_timeout`: what nodes did meanwhile is not known, and no reason to restart them.
            time.sleep(25)
        finally:
            os.kill(fleet.pid, signal.SIGCONT)
        started = time.monotonic()
        count = len(running.endings)
        machine.wait_until(lambda: len(running.endings) >= count + 8, 120, "the load goes on")
        back = time.monotonic() - started
        endings = running.stop()
    TABLE.append(Row("pegaflow: STOP for 25 s", "", back, endings))
    judge(endings, decode=False)
    assert {name: fleet.node(name)["incarnation"] for name in NODES} == lives, "a node restarted"
    assert_whole(fleet, model, 200)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_dead_pegaflow_leaves_nothing_and_the_next_up_works(fleet: Fleet, number: signal.Signals):
    tree = machine.tree(fleet.pid)
    assert len(tree) >= 9, machine.describe(tree)
    started = time.monotonic()
    hit(fleet.pid, number, rust=True)
    fleet.process.wait(timeout=30)
    fleet.assert_nothing_left(tree, GONE_LIMIT)
    gone = time.monotonic() - started
    fleet.up()
    back = time.monotonic() - started
    TABLE.append(Row(f"pegaflow: {number.name[3:]}", f"all gone after {gone:.1f} s", back, []))
    assert_whole(fleet, served_model(fleet), 300 + number)


def test_sigterm_leaves_nothing(fleet: Fleet):
    print(
        "\n| what | seen after, as | ready and proven after | requests | broken off | lost |\n|---|---|---|---|---|---|"
    )
    print(*TABLE, sep="\n")
    fleet.stop()
