"""Worker side: copies KV blocks between this rank's cache and its rows of the arena.

    new --> bound to life n --follow(n + 1): old session closed, new one opened, arena mapped anew--> bound to n + 1
                 |                                 |
                 +--- the session ends ---> stray <+ no session now: reported until the next life

A worker is bound to one life of the scheduler's session (client.py) and copies only what that life was granted:
its hello tells the engine that nothing of its earlier sessions is being copied any more, and from then on slots
of an earlier life may belong to others. So a worker that loses its session does not open another by itself; it
tells the scheduler, which begins the next life.

A chunk is one block of one KV group. Its row holds the pages of the group's layers one after another, so a row
is as wide as the widest group. A store is committed as soon as it is copied; a load whose slot changed owner before or
during the copy, or that cannot be done at all, is reported as failed. So is one that finds another checksum than was
saved (where the store keeps any); then the store is told which chunks those are.

    submit --> copier (copy.py: done at once; device.py: later) --> what follows the copy --> outcome --> get_finished

What follows a copy may run in a thread of the copier's, so the client is used under a lock, and vLLM's thread alone
looks at outcomes. A worker that leaves a life waits for its copies first; if they do not end, it goes on without the
store for good, since whoever gets those slots next must not find them written to.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

from pegaflow_vllm.arena import Arena, parse_refs
from pegaflow_vllm.client import Client
from pegaflow_vllm.copy import LOAD, SAVE, HostCopier, Page, Part
from pegaflow_vllm.guard import guarded, report
from pegaflow_vllm.manager import ChunkSpec
from pegaflow_vllm.meta import Stray
from pegaflow_vllm.protocol import Commit, Damaged, Discard, Loaded

REMEMBERED_STORES = 65536
WAIT_LIMIT = 60.0
"""Seconds for a copy whose blocks are wanted back; a device that takes longer does not work any more."""


class Layout:
    """Where the layers of each KV group lie in a row."""

    def __init__(self, kv_caches: Any):
        self.groups: list[list[Page]] = []
        for refs in kv_caches.group_data_refs:
            pages: list[Page] = []
            start = 0
            seen: set[int] = set()
            for ref in refs:
                if ref.tensor_idx in seen:
                    continue
                seen.add(ref.tensor_idx)
                tensor = kv_caches.tensors[ref.tensor_idx].tensor
                if tensor.ndim != 2 or tensor.element_size() != 1 or tensor.shape[1] < ref.page_size_bytes:
                    raise ValueError(
                        f"KV tensor {ref.tensor_idx} is {tuple(tensor.shape)} {tensor.dtype}, not (blocks, "
                        f"{ref.page_size_bytes}) bytes: this vLLM or model is not supported"
                    )
                pages.append(Page(tensor, start, ref.page_size_bytes))
                start += ref.page_size_bytes
            self.groups.append(pages)
        self.group_bytes = [sum(page.size for page in pages) for pages in self.groups]
        self.row_bytes = max(self.group_bytes, default=0)


@dataclass
class Failures:
    jobs: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Outcome:
    """A job that is over. `lost`: the blocks that a load should have filled and did not."""

    result: TransferResult
    lost: frozenset[int] | None


@dataclass
class Job:
    """One transfer, from vLLM's call to its outcome."""

    id: int
    start: float = field(default_factory=time.perf_counter)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


MakeCopier = Callable[[Layout, Arena], Any]


def copier_for(layout: Layout, arena: Arena) -> Any:
    """The one for where the cache is."""
    pages = [page for group in layout.groups for page in group]
    device = pages[0].tensor.device if pages else None
    if device is None or device.type == "cpu":
        return HostCopier(arena.rows)
    # Only where there is such a device: they import what other builds of vLLM do not have.
    from pegaflow_vllm.cuda import Cuda
    from pegaflow_vllm.device import DeviceCopier

    return DeviceCopier(Cuda(device, [page.size for page in pages]), arena)


class Worker(OffloadingWorker):
    def __init__(self, layout: Layout, client: Client, make_copier: MakeCopier = copier_for):
        self._layout = layout
        self._client = client
        self._lock = threading.RLock()
        """Around the client: what follows a copy may come from another thread."""
        self._make_copier = make_copier
        self._arena: Arena | None = None
        self._copier: Any = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._under_way: dict[int, Job] = {}
        self._stored: dict[int, None] = {}
        self._failures = Failures()
        self._life = 0
        """Of the scheduler's session; 0 until it is known."""
        self._map()

    # -- called by vLLM

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any, **_: Any) -> bool:
        if job_id in self._stored:  # vLLM 0.26 submits an early job once more
            return True
        self._stored[job_id] = None
        if len(self._stored) > REMEMBERED_STORES:
            del self._stored[next(iter(self._stored))]
        job = self._begin(job_id)
        if not self._store(job, src_spec, dst_spec):
            self._end(job, 0)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **_: Any) -> bool:
        job = self._begin(job_id)
        if not self._load(job, src_spec, dst_spec):
            self._loaded(job, src_spec, dst_spec, None)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Jobs that are over since the last call; all of them as successes, since vLLM asserts that they are. Which of
        these loads failed, `take_failures` says then."""
        results = []
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            results.append(outcome.result)
            self._under_way.pop(outcome.result.job_id, None)
            if outcome.lost is not None:
                self._failures.jobs.add(outcome.result.job_id)
                self._failures.blocks |= outcome.lost
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Until these are copied: vLLM is about to give their blocks to others."""
        deadline = time.monotonic() + WAIT_LIMIT
        for job_id in job_ids:
            job = self._under_way.get(job_id)
            if job is not None and not job.over.wait(max(0.0, deadline - time.monotonic())):
                # What it reads from now on is not what it was to save.
                self._leave(f"copy {job_id} took longer than {WAIT_LIMIT:.0f} s")
                return

    def shutdown(self) -> None:
        self._unmap()
        with self._lock:
            self._client.close()

    # -- called by the connector

    def take_failures(self) -> Failures:
        """The failed ones of the load jobs that `get_finished` gave since the last call, and their blocks."""
        failures, self._failures = self._failures, Failures()
        return failures

    @guarded()
    def follow(self, life: int) -> None:
        """Joins the scheduler's life `life` before anything of it is copied; 0 is none."""
        if life <= self._life:
            return
        first, self._life = self._life == 0, life
        # Nothing was ever copied in the session that was opened before the scheduler had one.
        with self._lock:
            if first and self._client.check():
                return
        if not self._unmap():
            self._leave("copies of an earlier session do not end")
            return
        with self._lock:
            reopened = self._client.reopen()
        if reopened:
            self._map()

    @guarded()
    def stray(self) -> Stray | None:
        """Says so when this worker has no session in the scheduler's life."""
        with self._lock:
            if self._life == 0 or self._client.check():
                return None
            return Stray(self._life, self._client.off)

    @guarded()
    def discard(self, refs: bytes) -> None:
        """Gives up chunks that were granted to this node and will not be written."""
        self._send(Discard(refs=refs))

    # -- inside

    def _map(self) -> None:
        session = self._client.session
        if session is None or session.arena is None:
            return
        try:
            self._arena = Arena(session.arena, session.welcome, self._layout.row_bytes)
            self._copier = self._make_copier(self._layout, self._arena)
        except Exception as error:
            self._arena = None
            report("arena", "%s; this worker goes on without the store", error)
            self._client.close()

    def _unmap(self) -> bool:
        """Ends the copies; False if they do not end."""
        copier, self._copier = self._copier, None
        if copier is not None and not copier.close():
            # It keeps the arena, so that nothing is unmapped under it.
            return False
        self._arena = None
        return True

    def _leave(self, why: str) -> None:
        """For good. What is committed after this, the engine refuses."""
        report("leave", "%s; this worker goes on without the store", why)
        self._arena = None
        with self._lock:
            self._client.drop(why, for_good=True)

    def _begin(self, job_id: int) -> Job:
        job = self._under_way[job_id] = Job(job_id)
        return job

    def _end(self, job: Job, size: int, lost: frozenset[int] | None = None) -> None:
        self._outcomes.put(Outcome(TransferResult(job.id, True, size, job.seconds), lost))
        job.over.set()

    def _send(self, message: Any) -> None:
        with self._lock:
            self._client.send(message)

    @guarded(bool)
    def _store(self, job: Job, src_spec: Any, dst_spec: ChunkSpec) -> bool:
        """True: the job's end is seen to."""
        if dst_spec.life != self._life or not self._client.alive:
            # The engine took these chunks back when that session ended.
            return False
        copied = self._parts(src_spec, dst_spec, "store")
        if copied is None:
            self._send(Discard(refs=dst_spec.refs))
            return False
        arena, parts = copied
        self._copier.submit(SAVE, parts, lambda error: self._saved(job, arena, parts, dst_spec, error))
        return True

    def _saved(self, job: Job, arena: Arena, parts: list[Part], spec: ChunkSpec, error: BaseException | None) -> None:
        self._end(job, self._commit(job, arena, parts, spec, error) or 0)

    @guarded()
    def _commit(self, job: Job, arena: Arena, parts: list[Part], spec: ChunkSpec, error: BaseException | None) -> int:
        if error is not None:
            report("save", "a store of %d chunks failed: %r", len(parse_refs(spec.refs)), error)
            self._send(Discard(refs=spec.refs))
            return 0
        for part in parts:
            arena.keep_sums(part.slots, width_of(part))
        size = size_of(parts)
        self._send(Commit(refs=spec.refs, bytes=size, micros=int(job.seconds * 1e6)))
        return size

    @guarded(bool)
    def _load(self, job: Job, src_spec: ChunkSpec, dst_spec: Any) -> bool:
        """True: the job's end is seen to."""
        copied = self._parts(dst_spec, src_spec, "load")
        if copied is None:
            return False
        arena, parts = copied

        def then(error: BaseException | None) -> None:
            self._loaded(job, src_spec, dst_spec, self._check(arena, parts, src_spec, error))

        self._copier.submit(LOAD, parts, then)
        return True

    @guarded()
    def _check(self, arena: Arena, parts: list[Part], spec: ChunkSpec, error: BaseException | None) -> int | None:
        """The bytes of a load that can be trusted."""
        refs = parse_refs(spec.refs)
        if error is not None:
            report("load", "a load of %d chunks failed: %r", len(refs), error)
            return None
        wrong = [arena.wrong(part.slots, width_of(part)) for part in parts]
        current = arena.current(refs["slot"].astype(np.int64), refs)
        # Of a chunk that was overtaken meanwhile, the checksum says nothing.
        damaged = refs[np.concatenate([*wrong, np.zeros(0, bool)]) & current]
        if len(damaged):
            report("damage", "%d of %d chunks are not what was saved: the arena was damaged", len(damaged), len(refs))
            self._send(Damaged(refs=damaged.tobytes()))
            return None
        if not current.all():
            report("load", "a load of %d chunks was overtaken by new owners of its slots", len(refs))
            return None
        return size_of(parts)

    def _loaded(self, job: Job, spec: ChunkSpec, dst_spec: Any, size: int | None) -> None:
        self._tell_loaded(job, spec, size)
        lost = frozenset(int(block) for block in dst_spec.block_ids) if size is None else None
        self._end(job, size or 0, lost)

    @guarded()
    def _tell_loaded(self, job: Job, spec: ChunkSpec, size: int | None) -> None:
        count = len(parse_refs(spec.refs))
        self._send(
            Loaded(
                chunks=0 if size is None else count,
                bytes=size or 0,
                micros=int(job.seconds * 1e6),
                failed=count if size is None else 0,
            )
        )

    @guarded()
    def _parts(self, blocks_spec: Any, spec: ChunkSpec, what: str) -> tuple[Arena, list[Part]] | None:
        """What is to be copied, if these chunks are still what the scheduler was granted."""
        arena, refs = self._arena, parse_refs(spec.refs)
        # Epoch 0: the scheduler's session opened before any arena existed.
        ours = arena is not None and spec.life == self._life and spec.epoch in (0, arena.epoch)
        slots = arena.slots_of(refs) if ours else None
        if slots is None:
            report(what, "a %s of %d chunks names slots that are not ours any more", what, len(refs))
            return None
        parts = [
            Part(self._layout.groups[group], blocks, chunk_slots)
            for group, blocks, chunk_slots in self._by_group(blocks_spec, slots)
        ]
        return arena, parts

    def _by_group(self, blocks_spec: Any, slots: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Splits blocks and slots, both ordered by group, into (group, blocks, slots)."""
        blocks = np.asarray(blocks_spec.block_ids, dtype=np.int64)
        sizes: Sequence[int] = getattr(blocks_spec, "group_sizes", None) or [len(blocks)]
        if len(blocks) != len(slots) or sum(sizes) != len(blocks) or len(sizes) > len(self._layout.groups):
            raise ValueError(f"{len(blocks)} blocks in groups {list(sizes)} do not match {len(slots)} chunks")
        parts = []
        at = 0
        for group, count in enumerate(sizes):
            if count:
                parts.append((group, blocks[at : at + count], slots[at : at + count]))
            at += count
        return parts


def width_of(part: Part) -> int:
    """The bytes of a row that this part's group uses."""
    return sum(page.size for page in part.pages)


def size_of(parts: list[Part]) -> int:
    return sum(width_of(part) * len(part.blocks) for part in parts)
