"""Loads that fail and sessions that end, on real vLLM: the answer is the one that was computed without the store.

A load is made to fail by changing the generation of a chunk's slot in shared memory after prefill has saved it:
the index still answers decode's lookup with the old one, as if the slot had changed hands in between.
"""

import ctypes
import mmap
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import machine
from arena import PAGE, Arena
from conftest import own_workers, serving, topology
from pegaflow import Fleet, Reference
from prompts import BLOCK, Exact, ask, full_chunks, leg, prompt

pytestmark = pytest.mark.soak

GENERATION = struct.Struct("=I")
CHUNKS = 10
FAILED = "pegaflow_engine_failed_loads_total"
LOADED = "pegaflow_engine_loaded_chunks_total"
SAVED = "pegaflow_engine_saved_chunks_total"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory):
    """The shipped topology with a store that is small enough to look at all of it, again and again."""
    folder = tmp_path_factory.mktemp("fleet")
    file, url = topology(folder, "recompute", {'capacity = "1GiB"': 'capacity = "64MiB"'})
    file.write_text(own_workers(file.read_text()))
    yield from serving(Fleet(file, url, folder))


def lives(fleet: Fleet) -> dict[str, tuple[int, int]]:
    nodes = {name: fleet.node(name) for name in ("prefill", "decode")}
    return {name: (node["incarnation"], node["pid"]) for name, node in nodes.items()}


class Slots:
    """The arena as a table: a generation per slot, then a row per slot."""

    def __init__(self, fleet: Fleet):
        self._arena = Arena(fleet.pid)
        self._map = mmap.mmap(self._arena.file, self._arena.size)
        self._count = int(fleet.metric("pegaflow_engine_slots"))
        header = -(-GENERATION.size * self._count // PAGE) * PAGE
        # Rows of this model are whole pages; what is left at the end, less than a page a slot, fills the last 2 MiB.
        row = (self._arena.size - header) // self._count // PAGE * PAGE
        assert row > 0
        assert self._arena.size - header - self._count * row < 2 << 20
        self._rows = slice(header, header + self._count * row)
        self._words = row // 8

    def __enter__(self) -> "Slots":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        os.close(self._arena.file)

    def beginnings(self) -> list[int]:
        """The first eight bytes of every row: they tell which ones were written."""
        with memoryview(self._map) as whole, whole[self._rows].cast("Q") as words, words[:: self._words] as firsts:
            return firsts.tolist()

    def make_stale(self, slot: int) -> None:
        at = GENERATION.size * slot
        (generation,) = GENERATION.unpack_from(self._map, at)
        GENERATION.pack_into(self._map, at, generation + 1_000_000)


def changed(before: list[int], after: list[int]) -> list[int]:
    return [slot for slot, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


def saved_by_prefill(fleet: Fleet, model: str, ids: list[int], handoff: str) -> None:
    saved = fleet.metric(SAVED)
    ask(fleet.node_url("prefill"), ids, model=model, max_tokens=1, **leg(handoff, "prefill"))
    machine.wait_until(lambda: fleet.metric(SAVED) - saved == full_chunks(ids), 10, "prefill has saved the prompt")


def by_hand(fleet: Fleet, model: str, seed: int, *, stale: slice) -> tuple[list[int], Exact]:
    """A hand-off with both legs sent from here; of its chunks, `stale` change hands in between."""
    ids = prompt(seed, CHUNKS * BLOCK + 5)
    with Slots(fleet) as slots:
        before = slots.beginnings()
        saved_by_prefill(fleet, model, ids, f"recompute-{seed}")
        written = changed(before, slots.beginnings())
        assert len(written) == CHUNKS
        for slot in written[stale]:
            slots.make_stale(slot)
    return ids, ask(fleet.node_url("decode"), ids, model=model, **leg(f"recompute-{seed}", "decode"))


def test_control_a_load_that_nobody_disturbs_succeeds(fleet: Fleet, reference: Reference, model: str):
    loaded, failed = fleet.metric(LOADED), fleet.metric(FAILED)
    ids, answer = by_hand(fleet, model, 20, stale=slice(0, 0))
    assert answer.difference(ask(reference.url, ids, model=model)) == 0.0
    assert (fleet.metric(LOADED) - loaded, fleet.metric(FAILED) - failed) == (CHUNKS, 0)


@pytest.mark.parametrize("stale", [slice(None), slice(0, 1), slice(CHUNKS - 1, CHUNKS)], ids=["all", "first", "last"])
def test_a_failed_load_is_computed_instead(fleet: Fleet, reference: Reference, model: str, stale: slice):
    before = lives(fleet)
    loaded, failed = fleet.metric(LOADED), fleet.metric(FAILED)
    ids, answer = by_hand(fleet, model, 30 + (stale.stop or 0), stale=stale)
    assert answer.difference(ask(reference.url, ids, model=model)) == 0.0
    # One job, reported once, and nothing of it counts as loaded.
    assert (fleet.metric(LOADED) - loaded, fleet.metric(FAILED) - failed) == (0, CHUNKS)
    assert lives(fleet) == before, "a node restarted"


def test_failed_loads_under_load_lose_nothing(fleet: Fleet, reference: Reference, model: str):
    before, failed = lives(fleet), fleet.metric(FAILED)
    prompts = [prompt(50 + seed, (seed % 5 + 3) * BLOCK + seed) for seed in range(24)]
    over = threading.Event()

    def disturb() -> None:
        """Whatever is saved changes hands soon after: before, during or after its load."""
        with Slots(fleet) as slots:
            known = slots.beginnings()
            while not over.wait(0.001):
                now = slots.beginnings()
                for slot in changed(known, now):
                    slots.make_stale(slot)
                known = now

    with ThreadPoolExecutor(7) as pool:
        disturbing = pool.submit(disturb)
        try:
            answers = list(pool.map(lambda ids: ask(fleet.url, ids, model=model), prompts))
        finally:
            over.set()
        disturbing.result()
    lost = [ids for ids, answer in zip(prompts, answers, strict=True) if not answer.tokens]
    assert not lost
    alone = [ask(reference.url, ids, model=model) for ids in prompts]
    # Batches of other shapes round differently: tokens must agree but for a near tie.
    equal = sum(answer.tokens == right.tokens for answer, right in zip(answers, alone, strict=True))
    print(f"{fleet.metric(FAILED) - failed:.0f} chunks failed to load; {equal} of {len(prompts)} answers equal")
    assert fleet.metric(FAILED) > failed, "nothing failed: the disturbance came too late"
    assert equal >= len(prompts) - 2
    assert lives(fleet) == before, "a node restarted"


def store_sockets(fleet: Fleet, name: str) -> dict[str, socket.socket]:
    """The connections of a node to the store, by who holds them: descriptors of theirs, copied to here."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: list[tuple[int, socket.socket]] = []
    tree = machine.tree(fleet.node(name)["pid"])
    for pid in tree:
        pidfd = os.pidfd_open(pid)
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if not os.readlink(entry).startswith("socket:"):
                        continue
                    copy = libc.syscall(438, pidfd, int(entry.name), 0)  # pidfd_getfd
                    if copy < 0:
                        code = ctypes.get_errno()
                        assert code not in (1, 38), f"pidfd_getfd: {os.strerror(code)}"
                        continue
                    connection = socket.socket(fileno=copy)
                    peer = connection.getpeername() if connection.family == socket.AF_UNIX else None
                    if isinstance(peer, str) and peer.endswith("engine.sock"):
                        found.append((pid, connection))
                    else:
                        connection.close()
        os.close(pidfd)
    assert len(found) == 2, f"{len(found)} connections of {name}: {machine.describe(tree)}"
    # EngineCore is the worker's parent.
    found.sort(key=lambda pair: machine.parent(pair[0]) in [pid for pid, _ in found])
    return {"scheduler": found[0][1], "worker": found[1][1]}


def until_handed_off(fleet: Fleet, reference: Reference, model: str, seed: int) -> int:
    """Sends requests until one goes through the store again; every answer is right. Returns how many it took."""
    end = time.monotonic() + 60
    for attempt in range(1000):
        ids = prompt(seed + attempt, 4 * BLOCK + 1)
        loaded = fleet.metric(LOADED)
        assert ask(fleet.url, ids, model=model).difference(ask(reference.url, ids, model=model)) == 0.0
        if fleet.metric(LOADED) - loaded == 4:
            return attempt + 1
        assert time.monotonic() < end, "hand-offs do not come back"
        time.sleep(0.3)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("node", ["prefill", "decode"])
@pytest.mark.parametrize("cut", [("worker",), ("scheduler",), ("scheduler", "worker")], ids="+".join)
def test_a_cut_connection_comes_back(fleet: Fleet, reference: Reference, model: str, node: str, cut: tuple[str, ...]):
    before = lives(fleet)
    until_handed_off(fleet, reference, model, 1000)
    opened = fleet.metric("pegaflow_engine_sessions_opened_total")
    connections = store_sockets(fleet, node)
    for kind in cut:
        connections[kind].shutdown(socket.SHUT_RDWR)
    for connection in connections.values():
        connection.close()
    requests = until_handed_off(fleet, reference, model, 2000)
    print(f"{node}: handed off again with request {requests} after the cut of {'+'.join(cut)}")
    assert fleet.metric("pegaflow_engine_sessions_opened_total") - opened >= 2
    assert fleet.metric("pegaflow_engine_sessions") == 4
    assert lives(fleet) == before, "a node restarted"


def test_nodes_serve_while_pegaflow_is_stopped_and_hand_off_again(fleet: Fleet, reference: Reference, model: str):
    before = lives(fleet)
    urls = {name: fleet.node_url(name) for name in before}
    seconds = []
    os.kill(fleet.pid, signal.SIGSTOP)
    try:
        for at in range(6):
            ids = prompt(3000 + at, 4 * BLOCK + 1)
            right = ask(reference.url, ids, model=model)
            started = time.monotonic()
            ask(urls["prefill"], ids, model=model, max_tokens=1, **leg(f"stopped-{at}", "prefill"))
            answer = ask(urls["decode"], ids, model=model, **leg(f"stopped-{at}", "decode"))
            seconds.append(time.monotonic() - started)
            assert answer.difference(right) == 0.0
    finally:
        os.kill(fleet.pid, signal.SIGCONT)
    print("seconds without the store:", [round(value, 2) for value in seconds])
    requests = until_handed_off(fleet, reference, model, 4000)
    print(f"handed off again with request {requests}")
    assert lives(fleet) == before, "a node restarted"


def test_sigterm_leaves_nothing(fleet: Fleet, reference: Reference):
    reference.close()
    fleet.stop()
