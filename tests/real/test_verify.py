"""`[kv] verify = true` on real vLLM: one flipped bit in the arena costs a recomputation, never an answer."""

import pytest

import machine
from arena import PAGE, Arena
from conftest import served_model, serving, topology
from pegaflow import Fleet, Reference
from prompts import BLOCK, ask, full_chunks, leg, prompt

pytestmark = pytest.mark.soak

DAMAGED = "pegaflow_engine_damaged_chunks_total"
FAILED = "pegaflow_engine_failed_loads_total"
LOADED = "pegaflow_engine_loaded_chunks_total"
SAVED = "pegaflow_engine_saved_chunks_total"
CHUNKS = 10


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory):
    """The shipped topology with checksums and a store that is small enough to look at all of it."""
    folder = tmp_path_factory.mktemp("verify")
    file, url = topology(folder, "verify", {'capacity = "1GiB"': 'capacity = "64MiB"\nverify = true'})
    yield from serving(Fleet(file, url, folder))


def figures(fleet: Fleet) -> dict[str, float]:
    return {name: fleet.metric(name) for name in (DAMAGED, FAILED, LOADED, SAVED)}


def change(before: dict[str, float], fleet: Fleet) -> dict[str, float]:
    return {name: value - before[name] for name, value in figures(fleet).items()}


def test_a_flipped_bit_is_found_computed_again_and_saved_anew(fleet: Fleet, reference: Reference):
    model = served_model(fleet)
    ids = prompt(71, CHUNKS * BLOCK + 5)
    assert full_chunks(ids) == CHUNKS
    right = ask(reference.url, ids, model=model)
    # The canary has gone through the store by now.
    assert fleet.metric(DAMAGED) == 0

    start = figures(fleet)
    with Arena(fleet.pid) as arena:
        before = arena.pages()
        ask(fleet.node_url("prefill"), ids, model=model, max_tokens=1, **leg("verify-1", "prefill"))
        machine.wait_until(lambda: fleet.metric(SAVED) - start[SAVED] == CHUNKS, 10, "prefill has saved the prompt")
        changed = arena.changed_since(before)
        # Between two pages that were written: in a chunk, and not in the header.
        inner = changed[-2]
        assert (inner - changed[-3], changed[-1] - inner) == (PAGE, PAGE)
        arena.flip(inner + PAGE // 2)
    answer = ask(fleet.node_url("decode"), ids, model=model, **leg("verify-1", "decode"))
    assert answer.difference(right) == 0.0
    assert change(start, fleet) == {DAMAGED: 1, FAILED: CHUNKS, LOADED: 0, SAVED: CHUNKS}

    # One chunk is not there any more; the next request puts it back, and decode loads all of them.
    then = figures(fleet)
    assert ask(fleet.url, ids, model=model).difference(right) == 0.0
    machine.wait_until(lambda: fleet.metric(SAVED) > then[SAVED], 10, "the damaged chunk is saved anew")
    assert change(then, fleet)[SAVED] == 1
    assert fleet.metric(DAMAGED) == 1

    # Another prompt is none of its business.
    other = prompt(72, CHUNKS * BLOCK + 5)
    then = figures(fleet)
    assert ask(fleet.url, other, model=model).difference(ask(reference.url, other, model=model)) == 0.0
    assert change(then, fleet) == {DAMAGED: 0, FAILED: 0, LOADED: CHUNKS, SAVED: CHUNKS}
