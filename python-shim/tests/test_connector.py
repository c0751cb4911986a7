"""PegaConnector under vLLM's own scheduler, with the toy engine behind it."""

import pytest

from node import BLOCK, PROMPT, Node, hand_off, prompt
from pegaflow_vllm import connector as connector_module
from pegaflow_vllm.protocol import Abort, Commit, Damaged, Discard, Finish, Hello, Loaded, Lookup, Open, Seal, Store


def test_a_hand_off_gives_the_answer_of_a_node_without_a_store(engine, make, expected):
    p, d = make("p0"), make("d0")
    assert hand_off(p, d, engine, PROMPT, "h1") == expected(PROMPT)
    (loaded,) = engine.wait_for(Loaded)
    assert (loaded.chunks, loaded.failed) == (5, 0)
    (opened,) = engine.of(Open)
    assert (opened.handoff, opened.chunks) == ("h1", 5)
    (stored,) = engine.of(Store)
    assert (stored.handoff, len(stored.keys)) == ("h1", 5 * stored.key_len)
    assert engine.of(Seal) == [Seal(handoff="h1")]
    assert engine.of(Abort) == []
    assert len(engine.wait_for(Finish, 2)) == 2


def test_wrong_kv_gives_another_answer(engine, make, expected):
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    space = engine.spaces[0]
    space.arena[space.header_bytes : space.header_bytes + 64] = bytes(64)
    assert d.ask("d", PROMPT, 4, handoff="h1", leg="decode") != expected(PROMPT)


def test_a_request_without_a_mark_is_never_mentioned(engine, make, expected):
    node = make("p0")
    assert node.ask("r", PROMPT, 4) == expected(PROMPT)
    node.ask("r2", PROMPT, 2, handoff="", leg="prefill")
    assert {type(message) for message in engine.heard} == {Hello}


def test_a_store_is_committed_in_the_step_that_computed_it(engine, make):
    p = make("p0")
    p.add("p", PROMPT, handoff="h1", leg="prefill")
    p.step()
    # No further step: the stock connector would copy at the beginning of the next one.
    (commit,) = engine.wait_for(Commit)
    assert len(commit.refs) == 5 * 8
    p.finish("p")
    assert len(engine.of(Commit)) == 1


@pytest.mark.parametrize("length", [BLOCK - 1, 2 * BLOCK, 4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK + 3])
def test_the_seal_comes_with_the_step_that_covers_the_prompt(engine, make, length):
    p = make("p0", batch=2 * BLOCK)
    p.add("p", prompt(2, length), handoff="h1", leg="prefill")
    steps = -(-length // (2 * BLOCK))
    for left in range(steps, 0, -1):
        assert p.manager.unsealed() == [("p", length)], f"sealed {left} steps early"
        p.step()
    assert p.manager.unsealed() == []
    p.finish("p")
    engine.wait_for(Finish)
    order = [type(message) for message in engine.heard if isinstance(message, Store | Seal | Abort)]
    assert order == [Store] * (length // BLOCK and steps - (length % (2 * BLOCK) in range(1, BLOCK))) + [Seal]
    assert sum(len(message.keys) // message.key_len for message in engine.of(Store)) == length // BLOCK


def test_a_prefill_that_is_aborted_half_way_says_so(engine, make):
    from vllm.v1.request import RequestStatus

    p = make("p0", batch=2 * BLOCK)
    p.add("p", PROMPT, handoff="h1", leg="prefill")
    p.step()
    p.scheduler.finish_requests("p", RequestStatus.FINISHED_ABORTED)
    p.finish("p")
    assert engine.wait_for(Abort) == [Abort(handoff="h1")]
    engine.wait_for(Finish)
    assert engine.of(Seal) == []


def make_stale(engine) -> None:
    """All slots change hands."""
    engine.spaces[0].generations[:] += 1


def test_a_failed_load_is_recomputed_and_not_tried_again(engine, make, expected):
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    lookups = len(engine.of(Lookup))
    d.add("d", PROMPT, 4, handoff="h1", leg="decode")
    d.step(between=lambda: make_stale(engine))
    assert d.failed == ["d"]
    assert d.finish("d") == expected(PROMPT)
    assert d.failed == ["d"]
    (loaded,) = engine.wait_for(Loaded)
    assert (loaded.chunks, loaded.failed) == (0, 5)
    assert len(engine.of(Lookup)) == lookups + 1


def test_a_damaged_chunk_is_computed_again_and_saved_anew(engine, make, expected):
    engine.verify = True
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    space = engine.spaces[0]
    first = min(chunk.slot for chunk in space.chunks.values())
    space.row(first)[:64] ^= 0x10
    before = dict(space.chunks)
    assert d.ask("d", PROMPT, 4, handoff="h1", leg="decode") == expected(PROMPT)
    assert d.failed == ["d"]
    (damaged,) = engine.wait_for(Damaged)
    gone = [key for key, chunk in before.items() if chunk.ref == damaged.refs]
    assert len(gone) == 1
    assert gone[0] not in space.chunks

    assert hand_off(p, make("d1"), engine, PROMPT, "h2") == expected(PROMPT)
    assert space.chunks[gone[0]].ref != damaged.refs
    assert engine.wait_for(Loaded, 2)[1].failed == 0


def test_a_failed_load_blames_nobody_else(engine, make, expected):
    p, d = make("p0"), make("d0")
    other = prompt(3, 3 * BLOCK + 1)
    for name, ids in (("h1", PROMPT), ("h2", other)):
        p.ask(f"p-{name}", ids, handoff=name, leg="prefill")
    engine.wait_for(Commit, 2)
    d.add("d-h1", PROMPT, 4, handoff="h1", leg="decode")
    d.add("d-h2", other, 4, handoff="h2", leg="decode")
    # The first hand-off got the first five slots.
    d.step(between=lambda: engine.spaces[0].generations.__setitem__(slice(0, 5), 9))
    assert d.failed == ["d-h1"]
    assert d.finish("d-h1") == expected(PROMPT)
    assert d.finish("d-h2") == expected(other)
    assert sorted((loaded.chunks, loaded.failed) for loaded in engine.wait_for(Loaded, 2)) == [(0, 5), (3, 0)]


def test_older_versions_are_told_the_blocks(engine, make, expected, monkeypatch):
    monkeypatch.setattr(connector_module, "_TransferResults", None)

    def results(self, finished):
        from types import SimpleNamespace

        sent, received = self.get_finished(finished)
        return SimpleNamespace(finished_sending=sent, finished_recving=received, failed_recving=set())

    monkeypatch.setattr(connector_module.PegaConnector, "get_transfer_results", results)
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    lookups = len(engine.of(Lookup))
    d.add("d", PROMPT, 4, handoff="h1", leg="decode")
    d.step(between=lambda: make_stale(engine))
    assert d.manager._tracked["d"].load_failed
    assert d.finish("d") == expected(PROMPT)
    assert len(engine.of(Lookup)) == lookups + 1


def test_older_versions_refuse_models_with_several_groups(engine, configs, make, monkeypatch):
    from copy import copy

    monkeypatch.setattr(connector_module, "_TransferResults", None)
    groups = copy(configs[512])
    groups.cache = copy(groups.cache)
    groups.cache.kv_cache_groups = groups.cache.kv_cache_groups * 2
    with pytest.raises(ValueError, match="2 KV cache groups"):
        Node(groups)


def test_what_is_granted_too_late_is_discarded_by_the_worker(engine, make, expected):
    p = make("p0", timeout_ms=200)
    p.add("p", PROMPT, 4, handoff="h1", leg="prefill")
    real, engine.delay = engine._store, 0.0

    def late(*args):
        engine.delay = 0.6
        return real(*args)

    engine._store = late
    p.step()
    assert engine.wait_for(Abort) == [Abort(handoff="h1")]
    engine.delay, engine._store = 0.0, real
    assert p.finish("p") == expected(PROMPT)
    for at in range(100):
        if engine.of(Discard):
            break
        p.ask(f"other-{at}", [400 + at], 2)
        engine._wait_until(lambda: True)
    (discarded,) = engine.of(Discard)
    assert discarded.refs == b"".join(chunk.ref for chunk in engine.spaces[0].chunks.values())
    assert engine.of(Commit) == []


GENERATED = 2 * BLOCK


def test_generated_tokens_are_not_saved_unless_asked_for(engine, make):
    p, d = make("p0"), make("d0")
    hand_off(p, d, engine, PROMPT, "h1", tokens=GENERATED + 1)
    engine.wait_for(Finish, 2)
    assert [message.handoff for message in engine.of(Store)] == ["h1"]


def test_generated_tokens_are_saved_once_and_found_by_the_next_turn(engine, make, expected):
    p, d = make("p0", SAVE_DECODED="1"), make("d0", SAVE_DECODED="1")
    answer = hand_off(p, d, engine, PROMPT, "h1", tokens=GENERATED + 1)
    engine.wait_for(Commit, 2)
    first, second = engine.of(Store)
    assert (first.handoff, second.handoff) == ("h1", None)
    # 5 chunks of the prompt and 3 tokens; the last token sampled has no KV.
    assert len(second.keys) == (3 + GENERATED) // BLOCK * second.key_len
    chunks = [len(commit.refs) // 8 for commit in engine.of(Commit)]
    assert chunks == [5, (3 + GENERATED) // BLOCK]

    turn = PROMPT + answer + prompt(9, BLOCK)
    saved = (3 + len(PROMPT) - 3 + GENERATED) // BLOCK
    assert hand_off(p, d, engine, turn, "h2") == expected(turn)
    # P computed turn 1 itself, and loads what D generated.
    assert engine.of(Loaded)[1].chunks == saved - 5
    assert not any(loaded.failed for loaded in engine.of(Loaded))


def test_short_answers_cost_nothing(engine, make):
    p, d = make("p0", SAVE_DECODED="1"), make("d0", SAVE_DECODED="1")
    hand_off(p, d, engine, PROMPT, "h1", tokens=BLOCK - 4)
    engine.wait_for(Finish, 2)
    assert [message.handoff for message in engine.of(Store)] == ["h1"]


def test_a_decode_leg_that_computes_the_prompt_saves_it_with_its_answer(engine, make, expected):
    d, p = make("d0", SAVE_DECODED="1"), make("p0", SAVE_DECODED="1")
    answer = d.ask("d", PROMPT, GENERATED + 1, handoff="h1", leg="decode")
    assert answer == expected(PROMPT, GENERATED + 1)
    engine.wait_for(Commit, 2)
    turn = PROMPT + answer + prompt(9, BLOCK)
    assert hand_off(p, d, engine, turn, "h2") == expected(turn)
    assert engine.of(Loaded)[0].chunks == (len(PROMPT) + GENERATED) // BLOCK


def test_a_refused_save_is_not_offered_again(engine, make):
    p, d = make("p0", SAVE_DECODED="1"), make("d0", SAVE_DECODED="1")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    engine.refuse_store = True
    d.ask("d", PROMPT, GENERATED, handoff="h1", leg="decode")
    engine.wait_for(Finish, 2)
    assert len(engine.of(Store)) == 2
    assert len(engine.of(Commit)) == 1


def test_a_prompt_in_the_nodes_own_cache_is_not_offered_again(engine, make, expected):
    p, d = make("p0", SAVE_DECODED="1"), make("d0", SAVE_DECODED="1")
    assert hand_off(p, d, engine, PROMPT, "h1") == expected(PROMPT)
    assert d.ask("again", PROMPT, 4, handoff="h2", leg="decode") == expected(PROMPT)
    engine.wait_for(Finish, 3)
    assert [message.handoff for message in engine.of(Store)] == ["h1"]
