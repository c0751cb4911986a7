"""Sessions that end, and what comes after: the client alone, then whole nodes."""

import os
import threading
import time

import pytest

from conftest import hello
from node import BLOCK, PROMPT, prompt
from pegaflow_vllm import client as client_module
from pegaflow_vllm.client import Client, State
from pegaflow_vllm.protocol import Abort, Commit, Finish, Hello, Loaded, Store
from toy_engine import EPOCH, ToyEngine

KEYS = [b"key-0001", b"key-0002"]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE", 0.0)


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- the client


def test_an_ended_session_is_noticed_without_a_call_and_followed_by_another(engine, client):
    assert client.connect(hello())
    assert client.life == 1
    engine.cut("scheduler")
    until(lambda: not client.check())
    assert client.lookup("r", "h", KEYS) is None
    assert client.retry()
    assert (client.life, client.session.welcome.epoch) == (2, 0)
    assert client.lookup("r", "h", KEYS).states == b"\0\0"


def test_attempts_are_paced(engine, client, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 60.0)
    client._retry.reset()
    assert client.connect(hello())
    engine.cut("scheduler")
    until(lambda: not client.check())
    assert not client.retry()
    assert len(engine.of(Hello)) == 1
    client._retry.until = 0.0
    assert client.retry()


def test_pauses_double_and_begin_anew_after_a_session_that_lasted(socket_path, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE", 30.0)
    client = Client(socket_path, 0.05)
    pauses = []
    assert not client.connect(hello())
    for _ in range(7):
        pauses.append(client._retry.until - time.monotonic())
        client._retry.until = 0.0
        assert not client.retry()
    assert [round(pause) for pause in pauses] == [1, 2, 4, 8, 16, 30, 30]
    client._state, client._since = State.LIVE, time.monotonic() - 31
    client.drop("test")
    assert round(client._retry.until - time.monotonic()) == 1


@pytest.mark.parametrize("code", ["version", "token", "namespace", "row_bytes", "bad_hello"])
def test_who_is_refused_does_not_ask_again(engine, client, code):
    engine.refuse_hello = code
    assert not client.connect(hello())
    engine.refuse_hello = None
    assert client.off
    assert not client.retry()
    assert not client.reopen()
    assert len(engine.of(Hello)) == 1


def test_an_engine_without_memory_for_the_arena_is_asked_again(engine, client):
    engine.refuse_hello = "capacity"
    assert not client.connect(hello())
    engine.refuse_hello = None
    assert client.retry()


def test_a_welcome_that_is_late_is_found_later(engine):
    client = Client(engine.path, 0.05)
    assert client.connect(hello())
    engine.cut("scheduler")
    until(lambda: not client.check())
    engine.delay = 0.4
    begun = time.monotonic()
    assert not client.retry()
    assert not client.retry()
    assert time.monotonic() - begun < 0.3, "a call waited longer than the call timeout"
    until(client.retry)
    assert (client.life, len(engine.of(Hello))) == (2, 2)
    client.close()


def test_a_greeting_without_an_answer_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(client_module, "GREETING_LIMIT", 0.0)
    engine.delay = 5.0
    client = Client(engine.path, 0.01)
    client._hello = hello()
    assert not client.retry()
    assert client._state is State.LOST
    client.close()


def test_late_grants_of_an_ended_session_are_nobodys(engine):
    client = Client(engine.path, 0.05)
    assert client.connect(hello())
    engine.delay = 0.3
    assert client.store("r", "h", KEYS) is None
    engine.delay = 0.0
    client.drop("test")
    assert client.retry()
    assert client.take_orphans() == b""
    assert client.store("r", "h", KEYS) is not None
    client.close()


def test_reopening_leaves_no_descriptor_behind(engine, client):
    assert client.connect(hello("worker"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert client.reopen()
        until(lambda: engine.sessions("worker") == 1)
    client.session = None
    assert len(os.listdir("/proc/self/fd")) - before <= 2


# -- nodes


CUTS = [("scheduler",), ("worker",), ("scheduler", "worker")]


def works(p, d, engine, expected, seed: int) -> None:
    """A hand-off goes through the store, at the latest the second one."""
    for attempt in range(2):
        ids = prompt(seed + attempt, 3 * BLOCK + 1)
        before = len(d.loads)
        p.ask(f"p-{seed}-{attempt}", ids, handoff=f"{seed}-{attempt}", leg="prefill")
        until(lambda: not any(chunk.missing for space in engine.spaces for chunk in space.chunks.values()))
        answer = d.ask(f"d-{seed}-{attempt}", ids, 4, handoff=f"{seed}-{attempt}", leg="decode")
        assert answer == expected(ids)
        if d.loads[before:] == [3]:
            return
    raise AssertionError(f"nothing was loaded: {d.loads}")


@pytest.mark.parametrize("kinds", CUTS, ids="+".join)
def test_a_node_comes_back_when_its_sessions_were_cut(engine, make, expected, kinds):
    p, d = make("p0"), make("d0")
    works(p, d, engine, expected, 10)
    for round_ in (20, 30):
        engine.cut(*kinds)
        works(p, d, engine, expected, round_)
    assert engine.sessions("scheduler") == engine.sessions("worker") == 2
    assert not any(loaded.failed for loaded in engine.of(Loaded))
    assert p.failed + d.failed == []


def test_a_node_follows_an_engine_into_another_epoch(engine, make, expected):
    p, d = make("p0"), make("d0")
    works(p, d, engine, expected, 10)
    engine.restart()
    works(p, d, engine, expected, 20)
    assert engine.epoch == EPOCH + 1
    for node in (p, d):
        worker = node.worker._worker
        assert worker._arena.epoch == engine.epoch
        assert worker._client.session.arena is worker._arena._mapping


def test_a_node_serves_while_the_socket_is_gone_and_comes_back(engine, make, expected, socket_path):
    p, d = make("p0"), make("d0")
    works(p, d, engine, expected, 10)
    engine.close()
    ids = prompt(20, 3 * BLOCK)
    assert p.ask("p", ids, 4, handoff="h", leg="prefill") == expected(ids)
    assert d.ask("d", ids, 4, handoff="h", leg="decode") == expected(ids)
    again = ToyEngine(socket_path)
    try:
        works(p, d, again, expected, 30)
    finally:
        again.close()


@pytest.mark.parametrize("kinds", CUTS, ids="+".join)
def test_a_prefill_that_loses_its_session_half_way_still_answers(engine, make, expected, kinds):
    # A batch of its own would be a model of its own.
    p, d = make("p0", batch=2 * BLOCK), make("d0", batch=2 * BLOCK)
    p.add("p", PROMPT, 4, handoff="h1", leg="prefill")
    p.step()
    engine.wait_for(Commit)
    engine.cut(*kinds)
    assert p.finish("p") == expected(PROMPT)
    assert len(engine.of(Store)) == 1
    assert engine.of(Abort) == []
    works(p, d, engine, expected, 20)


@pytest.mark.parametrize("kinds", CUTS, ids="+".join)
def test_a_load_that_was_scheduled_in_an_ended_session_ends_once(engine, make, expected, kinds):
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    d.add("d", PROMPT, 4, handoff="h1", leg="decode")
    # Nobody else gets the slots before this worker says hello again: the load itself may go on.
    d.step(between=lambda: engine.cut(*kinds))
    assert d.finish("d") == expected(PROMPT)
    assert d.failed == []
    works(p, d, engine, expected, 20)


def test_a_load_of_an_earlier_life_fails_once(engine, make, expected):
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    d.add("d", PROMPT, 4, handoff="h1", leg="decode")

    def another_life():
        engine.cut("scheduler", "worker")
        # As if the worker had joined it in a step between.
        until(lambda: not d.manager._client.check())
        d.worker._worker.follow(2)

    d.step(between=another_life)
    assert d.failed == ["d"]
    assert d.finish("d") == expected(PROMPT)
    assert d.failed == ["d"]


def test_a_store_of_an_earlier_life_is_not_written(engine, make, expected):
    p = make("p0")
    p.add("p", PROMPT, 2, handoff="h1", leg="prefill")

    def another_life():
        engine.cut("scheduler", "worker")
        p.worker._worker.follow(2)

    p.step(between=another_life)
    space = engine.spaces[0]
    assert not any(space.arena[space.header_bytes :])
    assert p.finish("p") == expected(PROMPT, 2)
    assert engine.of(Commit) == []


def test_leases_and_replies_do_not_outlive_their_session(engine, make, expected):
    p, d = make("p0"), make("d0")
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    d.add("d", PROMPT, 4, handoff="h1", leg="decode")
    manager = d.manager
    context = d.connector.connector_scheduler._req_status["d"].req_context
    d.connector.get_num_new_matched_tokens(d.scheduler.requests["d"], 0)
    assert manager._tracked["d"].reply is not None
    engine.cut("scheduler")
    manager.begin("other", None, 0, 0)
    manager.begin_attempt("d")
    assert manager._tracked["d"].reply is None
    assert set(manager.prepare_load([b"x"], context).refs) <= {0, 255}
    assert d.finish("d") == expected(PROMPT)


def test_a_worker_that_cannot_come_back_ends_the_schedulers_session(engine, make, expected, monkeypatch):
    p = make("p0")
    worker = p.worker._worker
    monkeypatch.setattr(worker._client, "reopen", lambda: False)
    engine.cut("worker")
    for at in range(3):
        ids = prompt(50 + at, BLOCK)
        assert p.ask(f"p{at}", ids, handoff=f"h{at}", leg="prefill") == expected(ids, 1)
        until(lambda: engine.sessions("scheduler") == 0)
    monkeypatch.undo()
    p.ask("p", PROMPT, handoff="h", leg="prefill")
    engine.wait_for(Commit)


def test_a_worker_that_is_refused_turns_the_whole_node_off(engine, make, expected):
    p = make("p0")
    p.worker._worker._client._turn_off("refused")
    until(lambda: engine.sessions("worker") == 0)
    p.manager._client._retry.until = 0.0
    assert p.ask("p", PROMPT, handoff="h", leg="prefill") == expected(PROMPT, 1)
    assert p.manager._client.off
    assert p.ask("p2", PROMPT, handoff="h2", leg="prefill") == expected(PROMPT, 1)


def test_a_stopped_engine_holds_no_step_for_longer_than_its_calls_may_take(engine, make, expected):
    p = make("p0", timeout_ms=50)
    p.ask("warm", prompt(60, BLOCK), handoff="h0", leg="prefill")
    stopped = threading.Event()
    real = engine._handle

    def hang(*args):
        stopped.wait(20)
        return real(*args)

    engine._handle = hang
    begun = time.monotonic()
    for at in range(10):
        ids = prompt(70 + at, 2 * BLOCK)
        assert p.ask(f"p{at}", ids, handoff=f"s{at}", leg="prefill") == expected(ids, 1)
    seconds = time.monotonic() - begun
    stopped.set()
    engine._handle = real
    # Three timeouts, then pauses of no length here: every request may wait for a lookup and a store.
    assert seconds < 10 * (2 * 0.05 + 0.3)
    engine.wait_for(Finish, 10)
