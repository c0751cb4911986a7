"""A store smaller than the working set, and prefill killed again and again: every answer stays exact."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

import machine
from conftest import served_model, topology
from pegaflow import RESTART_LIMIT, Fleet, Reference
from prompts import ask, full_chunks, prompt

pytestmark = pytest.mark.soak

# About 500 chunks of the tiny model.
CAPACITY = "16MiB"
# None is a multiple of the block: see Exchange.
LENGTHS = [1279, 641, 321, 1000, 97, 1281]
SEED = 1795387


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    workdir: Path = tmp_path_factory.mktemp("small")
    file, url = topology(workdir, "small-store", {'capacity = "1GiB"': f'capacity = "{CAPACITY}"'})
    # A question of pegaflow's own in the same batch would change how sums are rounded.
    file.write_text(file.read_text() + '\n[supervisor]\nidle_canary = "0s"\n')
    fleet = Fleet(file, url, workdir)
    try:
        fleet.up()
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def plain(small: Fleet, tmp_path_factory: pytest.TempPathFactory):
    reference = Reference(small, tmp_path_factory.mktemp("reference"))
    try:
        reference.wait()
        yield reference
    finally:
        reference.close()


def members(leader: int) -> list[int]:
    """API server, and EngineCore with its worker: what the node cannot live without."""
    own = [pid for pid in sorted(machine.tree(leader)) if machine.argv(pid)[0].startswith("VLLM::")]
    assert own, machine.describe(machine.tree(leader))
    return [leader, *own]


class Exchange:
    """Asks the fleet and the plain node the same, a prompt that neither has seen.

    On some processors (seen: those with AMX) vLLM rounds otherwise when it computes a prompt's rest alone than when it
    computes the whole: a plain node differs from itself when it is asked again and finds the full chunks in its own
    prefix cache. Decode computes the rest alone, so there its answer must be, bit by bit, the plain node's second one.
    """

    def __init__(self, small: Fleet, plain: Reference):
        self.small, self.plain, self.model = small, plain, served_model(small)
        self.asked = self.chunks = self.in_pieces = 0

    def __call__(self) -> None:
        ids = prompt(1000 + self.asked, LENGTHS[self.asked % len(LENGTHS)])
        self.asked += 1
        self.chunks += full_chunks(ids)
        answer, right = (ask(url, ids, model=self.model) for url in (self.small.url, self.plain.url))
        if answer.difference(right) == 0.0:
            return
        self.in_pieces += 1
        right = ask(self.plain.url, ids, model=self.model)
        assert answer.difference(right) == 0.0, f"prompt {self.asked} of {len(ids)} tokens"


def test_exact_with_eviction_and_random_producer_kills(small: Fleet, plain: Reference):
    exchange = Exchange(small, plain)
    slots = small.metric("pegaflow_engine_slots")
    evicted = small.metric("pegaflow_engine_evictions_total")
    while exchange.chunks < 2 * slots:
        exchange()
    assert small.metric("pegaflow_engine_evictions_total") - evicted > slots / 2, "everything fitted: no pressure"

    dice = random.Random(SEED)
    for _ in range(2):
        node = small.node("prefill")
        victim = dice.choice(members(node["pid"]))
        print(f"killing {machine.describe({victim})}")
        # In the middle of a prompt.
        with machine.later(dice.uniform(0.05, 0.6), lambda pid=victim: os.kill(pid, signal.SIGKILL)):
            for _ in range(4):
                exchange()
        end = time.monotonic() + RESTART_LIMIT
        while not small.is_back("prefill", node["incarnation"]):
            assert time.monotonic() < end, "prefill did not come back"
            exchange()
            # The node that starts needs the processor as well.
            time.sleep(2)
        for _ in range(4):
            exchange()
    pieces = f"{exchange.in_pieces} of them equal in decode's pieces only"
    print(f"{exchange.asked} prompts, {exchange.chunks} chunks through {slots:.0f} slots, no difference; {pieces}")

    machine.wait_until(lambda: small.metric("pegaflow_engine_slots_pending") == 0, 10, "nothing is pending")
    assert small.metric("pegaflow_engine_slots_quarantined") == 0
    machine.wait_until(lambda: small.metric("pegaflow_engine_slots_leased") == 0, 70, "nothing is leased")
