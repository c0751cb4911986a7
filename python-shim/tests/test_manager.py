from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadPolicy

from pegaflow_vllm import protocol
from pegaflow_vllm.manager import PENDING_DEADLINE, REPOLL_SECONDS, Handoff, Leg, Manager
from pegaflow_vllm.protocol import Abort, Finish, Found, Granted, Open, Release, Seal

KEYS = [b"aaaa", b"bbbb", b"cccc"]


def ref(slot: int, generation: int = 1) -> bytes:
    return np.array([(slot, generation)], dtype=protocol.REF_DTYPE).tobytes()


class FakeClient:
    """Answers from `states`; None stands for no answer in time."""

    def __init__(self):
        self.alive = True
        self.life = 1
        self.session = SimpleNamespace(welcome=SimpleNamespace(epoch=5))
        self.sent: list[protocol.Message] = []
        self.lookups: list[list[bytes]] = []
        self.stores: list[list[bytes]] = []
        self.states: bytes | None = b""
        self.grant: Granted | None = None

    def lookup(self, request, handoff, keys):
        self.lookups.append(keys)
        if self.states is None:
            return None
        refs = b"".join(ref(10 + n) if state == protocol.HIT else bytes(8) for n, state in enumerate(self.states))
        return Found(seq=1, states=self.states, refs=refs)

    def store(self, request, handoff, keys):
        self.stores.append(keys)
        return self.grant

    def send(self, message):
        self.sent.append(message)
        return True

    def check(self):
        return self.alive

    def retry(self):
        return self.alive

    def drop(self, why, *, for_good=False):
        self.alive = False

    def close(self):
        self.alive = False


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def manager(client, clock):
    return Manager(client, clock)


def mark(leg: str) -> dict:
    return {"pegaflow": {"handoff": "h1", "leg": leg}}


def context(request_id: str = "r1", keys=KEYS) -> SimpleNamespace:
    return SimpleNamespace(req_id=request_id, _offload_key_positions={key: n for n, key in enumerate(keys)})


def start(manager, leg: str, client) -> SimpleNamespace:
    manager.begin("r1", mark(leg), 96, 3)
    manager.on_new_request(context())
    manager.begin_attempt("r1")
    client.sent.clear() if leg == "decode" else None
    return context()


def look(manager, ctx) -> list[LookupResult]:
    return [manager.lookup(key, ctx) for key in KEYS]


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"pegaflow": None},
        {"pegaflow": {"handoff": "h"}},
        {"pegaflow": {"handoff": "h", "leg": "both"}},
        {"pegaflow": {"handoff": 1, "leg": "decode"}},
        {"pegaflow": {"handoff": "h", "leg": ["decode"]}},
        "pegaflow",
    ],
)
def test_a_request_without_a_mark_costs_no_round_trip(manager, client, params):
    manager.begin("r1", params, 96, 3)
    ctx = context()
    assert manager.on_new_request(ctx).policy is not OffloadPolicy.REQUEST_LEVEL
    manager.begin_attempt("r1")
    assert look(manager, ctx) == [LookupResult.MISS] * 3
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []
    manager.on_request_finished(ctx)
    assert (client.lookups, client.stores, client.sent) == ([], [], [])


def test_marks():
    assert Handoff.of(mark("prefill")) == Handoff("h1", Leg.PREFILL)
    assert Handoff.of(mark("decode")) == Handoff("h1", Leg.DECODE)


def test_all_keys_are_asked_in_one_round_trip(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\0"
    assert look(manager, ctx) == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]
    assert client.lookups == [KEYS]
    manager.end_attempt("r1", 64)
    spec = manager.prepare_load(KEYS[:2], ctx)
    assert (spec.refs, spec.epoch) == (ref(10) + ref(11), 5)
    assert client.sent == []
    manager.complete_load(KEYS[:2], ctx)
    assert client.sent == [Release(request="r1")]
    manager.on_request_finished(ctx)
    assert client.sent[1:] == [Finish(request="r1")]


def test_keys_come_from_the_connector_where_the_context_has_none(manager, client):
    start(manager, "decode", client)
    ctx = SimpleNamespace(req_id="r1")
    manager.keys_of = lambda request: KEYS if request == "r1" else []
    client.states = b"\1\1\1"
    assert look(manager, ctx) == [LookupResult.HIT] * 3
    assert client.lookups == [KEYS]


def test_a_new_attempt_never_sees_an_old_reply(manager, client, clock):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\1"
    look(manager, ctx)
    manager.end_attempt("r1", 96)
    manager.prepare_load(KEYS, ctx)
    manager.complete_load(KEYS, ctx)
    # Preempted: by now the chunks are gone.
    client.states = b"\0\0\0"
    manager.begin_attempt("r1")
    assert look(manager, ctx) == [LookupResult.MISS] * 3


def test_an_unallocated_request_asks_again(manager, client, clock):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\1"
    look(manager, ctx)
    manager.end_attempt("r1", 96)
    clock.now += 1.0
    client.states = b"\1\0\0"
    manager.begin_attempt("r1")
    assert look(manager, ctx) == [LookupResult.HIT, LookupResult.MISS, LookupResult.MISS]
    assert client.sent == []  # the second lookup replaced the first one's leases


def test_hits_that_are_not_used_are_released(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\0\1\1"
    look(manager, ctx)
    manager.end_attempt("r1", 0)
    assert client.sent == [Release(request="r1")]
    manager.unused("r1")
    assert client.sent == [Release(request="r1")]


def test_a_pending_chunk_is_polled_gently_and_not_for_ever(manager, client, clock):
    ctx = start(manager, "decode", client)
    client.states = b"\1\2\0"
    begun = clock.now
    polls = 0
    while True:
        manager.begin_attempt("r1")
        polls += 1
        if look(manager, ctx)[1] is not LookupResult.HIT_PENDING:
            break
        manager.end_attempt("r1", None)
        clock.now += REPOLL_SECONDS / 10
    assert PENDING_DEADLINE <= clock.now - begun < PENDING_DEADLINE + 2 * REPOLL_SECONDS
    assert len(client.lookups) <= PENDING_DEADLINE / REPOLL_SECONDS + 2 < polls / 4
    assert look(manager, ctx) == [LookupResult.HIT, LookupResult.MISS, LookupResult.MISS]


def test_a_pending_chunk_that_becomes_ready_is_a_hit(manager, client, clock):
    ctx = start(manager, "decode", client)
    client.states = b"\2\2\2"
    assert look(manager, ctx) == [LookupResult.HIT_PENDING] * 3
    manager.end_attempt("r1", None)
    clock.now += 2 * REPOLL_SECONDS
    client.states = b"\1\1\1"
    manager.begin_attempt("r1")
    assert look(manager, ctx) == [LookupResult.HIT] * 3


def test_no_answer_is_a_miss_and_gives_back_what_a_late_answer_leased(manager, client):
    ctx = start(manager, "decode", client)
    client.states = None
    assert look(manager, ctx) == [LookupResult.MISS] * 3
    assert len(client.lookups) == 1
    assert client.sent == [Release(request="r1")]


def test_a_lost_lease_becomes_a_slot_that_cannot_be_loaded(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\1\0\0"
    look(manager, ctx)
    spec = manager.prepare_load([KEYS[0], KEYS[1], b"????"], ctx)
    assert spec.refs == ref(10) + protocol.LOST_REF * 2
    assert manager.prepare_load(KEYS, context("unknown")).refs == protocol.LOST_REF * 3


def test_after_a_failed_load_a_request_misses(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\1"
    look(manager, ctx)
    manager.prepare_load(KEYS, ctx)
    manager.complete_load(KEYS, ctx)
    manager.loads_failed({"r1"})
    manager.begin_attempt("r1")
    assert look(manager, ctx) == [LookupResult.MISS] * 3
    assert len(client.lookups) == 1


def test_leases_outlive_a_request_that_ends_while_it_loads(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\1"
    look(manager, ctx)
    manager.prepare_load(KEYS, ctx)
    manager.ending("r1")
    manager.on_request_finished(ctx)
    assert client.sent == []
    manager.complete_load(KEYS, ctx)
    assert client.sent == [Finish(request="r1")]


def test_a_prefill_opens_stores_seals_and_finishes(manager, client):
    ctx = start(manager, "prefill", client)
    assert manager.on_new_request(ctx).policy is OffloadPolicy.REQUEST_LEVEL
    # Indices as the engine likes; vLLM needs them in the order of the keys.
    client.grant = Granted(seq=1, ok=True, new=np.array([2, 0], dtype="<u4").tobytes(), refs=ref(22) + ref(20))
    output = manager.prepare_store(KEYS, ctx)
    assert output.keys_to_store == [KEYS[0], KEYS[2]]
    assert (output.store_spec.refs, output.store_spec.epoch) == (ref(20) + ref(22), 5)
    assert manager.unsealed() == [("r1", 96)]
    manager.seal("r1")
    manager.seal("r1")
    assert manager.unsealed() == []
    # What vLLM offers after the seal is not part of the hand-off.
    assert manager.prepare_store([b"dddd"], ctx).keys_to_store == []
    assert len(client.stores) == 1
    manager.ending("r1")
    manager.on_request_finished(ctx)
    assert client.sent == [
        Open(request="r1", handoff="h1", chunks=3),
        Seal(handoff="h1"),
        Finish(request="r1"),
    ]


def test_a_prefill_that_ends_early_is_aborted_once(manager, client):
    ctx = start(manager, "prefill", client)
    manager.ending("r1")
    manager.ending("r1")
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []
    manager.seal("r1")
    manager.on_request_finished(ctx)
    assert client.sent[1:] == [Abort(handoff="h1"), Finish(request="r1")]


def test_a_refused_store_is_reported_once_and_not_retried(manager, client):
    ctx = start(manager, "prefill", client)
    client.grant = Granted(seq=1, ok=False, new=b"", refs=b"")
    assert manager.prepare_store(KEYS, ctx) is None
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []
    manager.seal("r1")
    assert len(client.stores) == 1
    assert client.sent[1:] == []


def test_a_store_without_an_answer_aborts_the_handoff(manager, client):
    ctx = start(manager, "prefill", client)
    client.grant = None
    assert manager.prepare_store(KEYS, ctx) is None
    assert client.sent[1:] == [Abort(handoff="h1")]
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []


def test_a_decode_leg_stores_nothing(manager, client):
    ctx = start(manager, "decode", client)
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []
    assert client.stores == []


def test_a_dead_store_is_a_miss_without_a_call(manager, client):
    ctx = start(manager, "decode", client)
    client.alive = False
    assert look(manager, ctx) == [LookupResult.MISS] * 3
    assert client.lookups == []


def test_nothing_raises_into_vllm(manager, client):
    ctx = start(manager, "prefill", client)

    def explode(*_):
        raise RuntimeError("bug")

    client.lookup = client.store = client.send = explode
    assert look(manager, ctx) == [LookupResult.MISS] * 3
    assert manager.prepare_store(KEYS, ctx).keys_to_store == []
    assert manager.prepare_load(KEYS, ctx).refs == protocol.LOST_REF * 3
    manager.begin("r2", mark("prefill"), 1, 0)
    manager.complete_load(KEYS, ctx)
    manager.seal("r1")
    manager.ending("r2")
    manager.on_request_finished(ctx)
    manager.reset_cache()


def test_a_cache_reset_ends_the_leases_of_dropped_loads(manager, client):
    ctx = start(manager, "decode", client)
    client.states = b"\1\1\1"
    look(manager, ctx)
    manager.prepare_load(KEYS, ctx)
    manager.reset_cache()
    assert client.sent == [Release(request="r1")]


def test_a_router_is_told_when_all_that_was_granted_is_stored(client, clock):
    told = []
    manager = Manager(client, clock, say=lambda handoff, failed: told.append((handoff, failed)))
    ctx = start(manager, "prefill", client)
    client.grant = Granted(seq=1, ok=True, new=np.array([0, 2], "<u4").tobytes(), refs=ref(1) + ref(2))
    manager.prepare_store(KEYS, ctx)
    manager.seal("r1")
    manager.on_request_finished(ctx)
    assert told == []
    manager.complete_store([KEYS[0]], ctx)
    assert told == []
    manager.complete_store([KEYS[2]], ctx)
    assert told == [("h1", None)]


def test_a_router_is_told_what_will_not_be_stored(client, clock):
    told = []

    def fresh() -> Manager:
        told.clear()
        return Manager(client, clock, say=lambda handoff, failed: told.append((handoff, failed)))

    manager = fresh()
    ctx = start(manager, "prefill", client)
    client.grant = Granted(seq=1, ok=False, new=b"", refs=b"")
    manager.prepare_store(KEYS, ctx)
    assert told == [("h1", "no_space")]

    manager = fresh()
    start(manager, "prefill", client)
    manager.ending("r1")
    assert told == [("h1", "aborted")]

    manager = fresh()
    start(manager, "prefill", client)
    client.life = 2
    manager.step()
    assert told == [("h1", "producer_died")]

    client.life = 1
    manager = fresh()
    client.alive = False
    manager.begin("r1", mark("prefill"), 96, 3)
    manager.begin("r2", mark("decode"), 96, 3)
    assert told == [("h1", "engine_down")]
