"""Scheduler side: which chunks a hand-off stores, loads and leases. Runs in EngineCore's one thread.

One request's life here:

    begin (open) -> [attempt -> lookup.. -> attempt ended]* -> prepare_load -> complete_load (release)
                 -> prepare_store.. -> seal | abort
                 -> finish

An attempt is one call of the connector's get_num_new_matched_tokens: its first `lookup` asks the engine for all
keys of the prompt, the others are answered from that reply. A reply is used by a later attempt only while its
lease is held and it is younger than REPOLL_SECONDS.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadPolicy,
    PrepareStoreOutput,
    RequestOffloadingContext,
)

from pegaflow_vllm import protocol
from pegaflow_vllm.client import Client
from pegaflow_vllm.guard import guarded, report
from pegaflow_vllm.protocol import Abort, Finish, Open, Release, Seal

PENDING_DEADLINE = 0.5
"""Seconds that one request may wait for chunks that are still being written."""
REPOLL_SECONDS = 0.002

KeysOf = Callable[[str], list[bytes]]


class Leg(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Handoff:
    id: str
    leg: Leg

    @classmethod
    def of(cls, kv_transfer_params: Any) -> "Handoff | None":
        """The hand-off that a request's kv_transfer_params mark it for; None for all other requests."""
        mark = kv_transfer_params.get("pegaflow") if isinstance(kv_transfer_params, dict) else None
        if not isinstance(mark, dict):
            return None
        handoff, leg = mark.get("handoff"), mark.get("leg")
        if not isinstance(handoff, str) or not handoff or leg not in ("prefill", "decode"):
            report("mark", "ignoring malformed kv_transfer_params.pegaflow %r", mark)
            return None
        return cls(handoff, Leg(leg))


class ChunkSpec(LoadStoreSpec):
    """Names arena slots to the workers: refs in the order of vLLM's blocks, valid in one arena epoch."""

    def __init__(self, epoch: int, refs: bytes):
        self.epoch = epoch
        self.refs = refs

    def __repr__(self) -> str:
        return f"ChunkSpec({len(self.refs) // protocol.REF_BYTES} chunks)"


@dataclass
class Reply:
    """The engine's answer for all keys of a prompt; its hits are leased to the request."""

    states: dict[bytes, int]
    refs: dict[bytes, bytes]
    at: float


@dataclass
class Tracked:
    """A request that takes part in a hand-off."""

    id: str
    handoff: Handoff
    prompt_tokens: int
    reply: Reply | None = None
    asked: bool = False
    """`reply` belongs to the current attempt."""
    pending_until: float | None = None
    loading: bool = False
    load_failed: bool = False
    storing: bool = field(init=False)
    """More chunks may be offered; ends with the seal, a refusal or an abort."""
    finished: bool = False

    def __post_init__(self) -> None:
        self.storing = self.handoff.leg is Leg.PREFILL


class Manager(OffloadingManager):
    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic):
        self._client = client
        self._clock = clock
        self._tracked: dict[str, Tracked] = {}
        self.keys_of: KeysOf | None = None
        """Set by the connector: a prompt's keys on versions whose ReqContext does not hold them."""

    # -- called by the connector

    @guarded()
    def begin(self, request_id: str, params: Any, prompt_tokens: int, chunks: int) -> None:
        """First sight of a request; `chunks` is how many full chunks its prompt has over all groups."""
        handoff = Handoff.of(params)
        if handoff is None or not self._client.alive:
            return
        self._tracked[request_id] = Tracked(request_id, handoff, prompt_tokens)
        if handoff.leg is Leg.PREFILL:
            self._client.send(Open(request=request_id, handoff=handoff.id, chunks=chunks))

    @guarded()
    def begin_attempt(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            tracked.asked = False

    @guarded()
    def end_attempt(self, request_id: str, matched: int | None) -> None:
        """`matched`: tokens to load; None when the request is polled again."""
        tracked = self._tracked.get(request_id)
        if tracked is not None and matched == 0:
            self._release(tracked)

    @guarded()
    def unused(self, request_id: str) -> None:
        """The request was scheduled without loading anything."""
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._release(tracked)

    @guarded(list)
    def unsealed(self) -> list[tuple[str, int]]:
        """Request id and prompt length of every prefill that still offers chunks."""
        return [(tracked.id, tracked.prompt_tokens) for tracked in self._tracked.values() if tracked.storing]

    @guarded()
    def seal(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is not None and tracked.storing:
            tracked.storing = False
            self._client.send(Seal(handoff=tracked.handoff.id))

    @guarded()
    def ending(self, request_id: str) -> None:
        """The request has finished or was aborted: a hand-off that is not sealed now never will be."""
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._abort(tracked)

    @guarded()
    def loads_failed(self, request_ids: Iterable[str]) -> None:
        """Answer these with a miss from now on: they would load, fail and load again for ever."""
        for request_id in request_ids:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.load_failed = True
                self._release(tracked)

    @guarded(bytes)
    def take_orphans(self) -> bytes:
        """Refs that were granted too late to be written: the workers are to discard them."""
        return self._client.take_orphans()

    # -- called by vLLM

    @guarded(RequestOffloadingContext)
    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        tracked = self._tracked.get(req_context.req_id)
        if tracked is not None and tracked.handoff.leg is Leg.PREFILL:
            # Offer chunks that P found in its own prefix cache as well.
            return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)
        return RequestOffloadingContext()

    @guarded(lambda: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        tracked = self._tracked.get(req_context.req_id)
        if tracked is None or tracked.load_failed or not self._client.alive:
            return LookupResult.MISS
        if not tracked.asked:
            self._ask(tracked, req_context)
        state = protocol.MISS if tracked.reply is None else tracked.reply.states.get(key, protocol.MISS)
        if state == protocol.HIT:
            return LookupResult.HIT
        if state == protocol.PENDING and tracked.pending_until is not None:
            return LookupResult.HIT_PENDING
        return LookupResult.MISS

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> LoadStoreSpec:
        keys = list(keys)
        return self._prepare_load(keys, req_context) or self._spec(protocol.LOST_REF * len(keys))

    @guarded()
    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        tracked = self._tracked.get(req_context.req_id)
        if tracked is None:
            return
        tracked.loading = False
        if tracked.finished:
            self._finish(tracked)
        else:
            self._release(tracked)

    @guarded(lambda: PrepareStoreOutput([], ChunkSpec(0, b""), []))
    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput | None:
        keys = list(keys)
        tracked = self._tracked.get(req_context.req_id)
        if tracked is None or not tracked.storing or not keys:
            return PrepareStoreOutput([], self._spec(b""), [])
        granted = self._client.store(tracked.id, tracked.handoff.id, keys)
        if granted is None:
            # The grant may still come, as an orphan.
            self._abort(tracked)
            return None
        if not granted.ok:
            tracked.storing = False
            return None
        new = np.frombuffer(granted.new, dtype="<u4")
        order = np.argsort(new, kind="stable")  # vLLM walks blocks in the order of `keys`
        refs = np.frombuffer(granted.refs, dtype=protocol.REF_DTYPE)[order]
        return PrepareStoreOutput([keys[index] for index in new[order]], self._spec(refs.tobytes()), [])

    @guarded()
    def on_request_finished(self, req_context: Any) -> None:
        tracked = self._tracked.get(req_context.req_id)
        if tracked is None:
            return
        tracked.finished = True
        if not tracked.loading:
            self._finish(tracked)

    @guarded()
    def reset_cache(self) -> None:
        # vLLM has dropped its transfer jobs: their completions will not come.
        for tracked in list(self._tracked.values()):
            tracked.loading = False
            if tracked.finished:
                self._finish(tracked)
            else:
                self._release(tracked)

    @guarded()
    def shutdown(self) -> None:
        self._client.close()

    # -- inside

    def _ask(self, tracked: Tracked, req_context: Any) -> None:
        tracked.asked = True
        now = self._clock()
        if tracked.reply is not None and now - tracked.reply.at < REPOLL_SECONDS:
            return
        keys = self._prompt_keys(tracked.id, req_context)
        found = self._client.lookup(tracked.id, tracked.handoff.id, keys)
        if found is None:
            tracked.reply = None
            # The engine may have leased the hits of an answer that came too late.
            self._client.send(Release(request=tracked.id))
            return
        refs = dict(zip(keys, protocol.split_refs(found.refs), strict=True))
        tracked.reply = Reply(dict(zip(keys, found.states, strict=True)), refs, now)
        if protocol.PENDING not in found.states:
            return
        if tracked.pending_until is None:
            tracked.pending_until = now + PENDING_DEADLINE
        elif now >= tracked.pending_until:
            tracked.reply.states.update(
                (key, protocol.MISS) for key, state in tracked.reply.states.items() if state == protocol.PENDING
            )

    def _prompt_keys(self, request_id: str, req_context: Any) -> list[bytes]:
        positions = getattr(req_context, "_offload_key_positions", None)
        if positions:
            return list(positions)
        return self.keys_of(request_id) if self.keys_of is not None else []

    @guarded()
    def _prepare_load(self, keys: list[bytes], req_context: Any) -> ChunkSpec | None:
        tracked = self._tracked.get(req_context.req_id)
        if tracked is None or tracked.reply is None:
            return None
        tracked.loading = True
        reply = tracked.reply
        refs = (reply.refs[key] if reply.states.get(key) == protocol.HIT else protocol.LOST_REF for key in keys)
        return self._spec(b"".join(refs))

    def _spec(self, refs: bytes) -> ChunkSpec:
        session = self._client.session
        return ChunkSpec(session.welcome.epoch if session is not None else 0, refs)

    def _release(self, tracked: Tracked) -> None:
        if tracked.reply is None or tracked.loading:
            return
        tracked.reply = None
        self._client.send(Release(request=tracked.id))

    def _abort(self, tracked: Tracked) -> None:
        if tracked.storing:
            tracked.storing = False
            self._client.send(Abort(handoff=tracked.handoff.id))

    def _finish(self, tracked: Tracked) -> None:
        self._tracked.pop(tracked.id, None)
        self._client.send(Finish(request=tracked.id))
