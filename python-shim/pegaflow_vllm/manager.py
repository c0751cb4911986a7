"""Scheduler side: which chunks a hand-off stores, loads and leases. Runs in EngineCore's one thread.

One request's life here:

    begin (open) -> [attempt -> lookup.. -> attempt ended]* -> prepare_load -> complete_load (release)
                 -> prepare_store.. -> seal | abort                                   a prefill leg
                 -> prepare_store of generated tokens, once it has finished           a decode leg, if told to
                 -> finish

When the client's session ends, replies and hand-offs of that life are forgotten: a request under way computes
what it does not have yet. A request that begins is what makes the client try for another session.

An attempt is one call of the connector's get_num_new_matched_tokens: its first `lookup` asks the engine for all
keys of the prompt, the others are answered from that reply. A reply is used by a later attempt only while its
lease is held and it is younger than REPOLL_SECONDS.
"""

import time
from collections.abc import Callable, Collection, Iterable
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
from pegaflow_vllm.announce import Announcements, Say
from pegaflow_vllm.client import Client
from pegaflow_vllm.guard import guarded
from pegaflow_vllm.meta import Step, Stray
from pegaflow_vllm.protocol import Abort, Finish, Open, Release, Seal
from pegaflow_vllm.tracked import Handoff, Leg, Reply, Tracked

PENDING_DEADLINE = 0.5
"""Seconds that one request may wait for chunks that are still being written."""
REPOLL_SECONDS = 0.002

KeysOf = Callable[[str], list[bytes]]
"""Keys of a request by its id."""


class ChunkSpec(LoadStoreSpec):
    """Names arena slots to the workers: refs in the order of vLLM's blocks.

    Valid in one arena epoch, and in one life of the scheduler's session.
    """

    def __init__(self, epoch: int, refs: bytes, life: int = 0):
        self.epoch = epoch
        self.refs = refs
        self.life = life

    def __repr__(self) -> str:
        return f"ChunkSpec({len(self.refs) // protocol.REF_BYTES} chunks)"


class Manager(OffloadingManager):
    def __init__(
        self,
        client: Client,
        clock: Callable[[], float] = time.monotonic,
        *,
        save_decoded: bool = False,
        say: Say | None = None,
    ):
        self._client = client
        self._clock = clock
        self._save_decoded = save_decoded
        self._announcements = Announcements(say)
        self._life = client.life
        """Of the session that everything tracked belongs to; 0 for none."""
        self._tracked: dict[str, Tracked] = {}
        self.keys_of: KeysOf | None = None
        """Set by the connector: a prompt's keys on versions whose ReqContext does not hold them."""
        self.generated_of: KeysOf | None = None
        """Set by the connector: keys of chunks that reach beyond the prompt."""

    # -- called by the connector

    @guarded()
    def begin(self, request_id: str, params: Any, prompt_tokens: int, chunks: int) -> None:
        """First sight of a request; `chunks` is how many full chunks its prompt has over all groups."""
        handoff = Handoff.of(params)
        if handoff is None:
            return
        self._client.retry()
        if not self._follow_session():
            if handoff.leg is Leg.PREFILL:
                self._announcements.refused(handoff.id, "engine_down")
            return
        tracked = Tracked(request_id, handoff, prompt_tokens)
        self._tracked[request_id] = tracked
        if handoff.leg is Leg.PREFILL:
            self._client.send(Open(request=request_id, handoff=handoff.id, chunks=chunks))
            self._announcements.opened(request_id, handoff.id)
        else:
            tracked.saving = self._save_decoded

    @guarded(bool)
    def saves_generated(self, request_id: str) -> bool:
        tracked = self._tracked.get(request_id)
        return tracked is not None and tracked.saving

    @guarded()
    def begin_attempt(self, request_id: str) -> None:
        self._follow_session()
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
            self._announcements.sealed(request_id)

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

    @guarded(lambda: Step(0))
    def step(self) -> Step:
        """What the workers have to know in this step."""
        if not self._follow_session():
            return Step(0)
        orphans = self._client.take_orphans()
        return Step(self._client.life, orphans) if self._client.alive else Step(0)

    @guarded()
    def strayed(self, stray: Stray) -> None:
        """A worker has no session: nothing that this life grants would ever be written."""
        if self._client.alive and (stray.life == self._client.life or stray.for_good):
            self._client.drop("a worker of this node has no session", for_good=stray.for_good)
            self._follow_session()

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
        state = protocol.MISS if tracked.reply is None else tracked.reply.state(key)
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
        if tracked is None or not keys:
            return self._nothing_to_store()
        if tracked.saving:
            return self._save(tracked, keys)
        if not tracked.storing:
            return self._nothing_to_store()
        granted = self._client.store(tracked.id, tracked.handoff.id, keys)
        if granted is None:
            # The grant may still come, as an orphan.
            self._abort(tracked)
            return None
        if not granted.ok:
            tracked.storing = False
            self._announcements.failed(tracked.id, "no_space")
            return None
        output = self._granted(keys, granted)
        self._announcements.granted(tracked.id, output.keys_to_store)
        return output

    @guarded()
    def complete_store(self, keys: Collection[bytes], req_context: Any, success: bool = True) -> None:
        if success:
            self._announcements.stored(req_context.req_id, keys)
        else:
            self._announcements.failed(req_context.req_id, "save_failed")

    def _save(self, tracked: Tracked, keys: list[bytes]) -> PrepareStoreOutput:
        """Saves chunks that nobody waits for. What is refused is not offered again: it would leave a gap."""
        if not tracked.recomputed and self.generated_of is not None:
            # The rest came from the store, or lies in this node's own cache as well as in P's.
            generated = set(self.generated_of(tracked.id))
            keys = [key for key in keys if key in generated]
        if not keys or tracked.loading:
            return self._nothing_to_store()
        granted = self._client.store(tracked.id, None, keys)
        if granted is None or not granted.ok:
            tracked.saving = False
            return self._nothing_to_store()
        return self._granted(keys, granted)

    def _nothing_to_store(self) -> PrepareStoreOutput:
        return PrepareStoreOutput([], self._spec(b""), [])

    def _granted(self, keys: list[bytes], granted: protocol.Granted) -> PrepareStoreOutput:
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
        self._announcements.fail_all("aborted")
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

    def _follow_session(self) -> bool:
        """True while there is a session; what belongs to an earlier one is forgotten."""
        life = self._client.life if self._client.check() else 0
        if life != self._life:
            self._life = life
            self._announcements.fail_all("producer_died")
            for tracked in self._tracked.values():
                # The engine has ended the leases and failed the hand-offs itself.
                tracked.reply = tracked.pending_until = None
                tracked.storing = tracked.saving = False
        return life != 0

    def _ask(self, tracked: Tracked, req_context: Any) -> None:
        tracked.asked = True
        now = self._clock()
        if tracked.reply is not None and now - tracked.reply.at < REPOLL_SECONDS:
            return
        keys = self._prompt_keys(tracked.id, req_context)
        found = self._client.lookup(tracked.id, tracked.handoff.id, keys)
        if found is None:
            tracked.reply = None
            tracked.recomputed = True
            # The engine may have leased the hits of an answer that came too late.
            self._client.send(Release(request=tracked.id))
            return
        positions = dict(zip(keys, range(len(keys)), strict=True))
        tracked.reply = Reply(positions, found.states, found.refs, now)
        tracked.recomputed = found.states.count(protocol.HIT) != len(found.states)
        if protocol.PENDING not in found.states:
            return
        if tracked.pending_until is None:
            tracked.pending_until = now + PENDING_DEADLINE
        elif now >= tracked.pending_until:
            tracked.reply.waits = False

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
        return self._spec(b"".join(map(tracked.reply.ref, keys)))

    def _spec(self, refs: bytes) -> ChunkSpec:
        session = self._client.session
        return ChunkSpec(session.welcome.epoch if session is not None else 0, refs, self._client.life)

    def _release(self, tracked: Tracked) -> None:
        if tracked.reply is None or tracked.loading:
            return
        tracked.reply = None
        self._client.send(Release(request=tracked.id))

    def _abort(self, tracked: Tracked) -> None:
        if tracked.storing:
            tracked.storing = False
            self._client.send(Abort(handoff=tracked.handoff.id))
            self._announcements.failed(tracked.id, "aborted")

    def _finish(self, tracked: Tracked) -> None:
        self._tracked.pop(tracked.id, None)
        self._client.send(Finish(request=tracked.id))
