"""Worker side: copies KV blocks between this rank's cache and its rows of the arena.

    new --> bound to life n --follow(n + 1): old session closed, new one opened, arena mapped anew--> bound to n + 1
                 |                                 |
                 +--- the session ends ---> stray <+ no session now: reported until the next life

A worker is bound to one life of the scheduler's session (client.py) and copies only what that life was granted:
its hello tells the engine that nothing of its earlier sessions is being copied any more, and from then on slots
of an earlier life may belong to others. So a worker that loses its session does not open another by itself; it
tells the scheduler, which begins the next life.

A chunk is one block of one KV group. Its row holds the pages of the group's layers one after another, so a row
is as wide as the widest group. Copies are synchronous. A store is committed as soon as it is copied; a load
whose slot changed owner before or during the copy, or that cannot be done at all, is reported as failed. So is one
that finds another checksum than was saved (where the store keeps any); then the store is told which chunks those are.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

from pegaflow_vllm.arena import Arena, parse_refs
from pegaflow_vllm.client import Client
from pegaflow_vllm.copy import Page, load_rows, save_rows
from pegaflow_vllm.guard import guarded, report
from pegaflow_vllm.manager import ChunkSpec
from pegaflow_vllm.meta import Stray
from pegaflow_vllm.protocol import Commit, Damaged, Discard, Loaded

REMEMBERED_STORES = 65536


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


class Worker(OffloadingWorker):
    def __init__(self, layout: Layout, client: Client):
        self._layout = layout
        self._client = client
        self._arena: Arena | None = None
        self._done: list[TransferResult] = []
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
        start = time.perf_counter()
        size = self._store(src_spec, dst_spec, start) or 0
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - start))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **_: Any) -> bool:
        start = time.perf_counter()
        size = self._load(src_spec, dst_spec)
        seconds = time.perf_counter() - start
        if size is None:
            self._failures.jobs.add(job_id)
            self._failures.blocks.update(int(block) for block in dst_spec.block_ids)
        self._tell_loaded(src_spec, size, seconds)
        # A load that failed must finish like any other: vLLM asserts success here.
        self._done.append(TransferResult(job_id, True, size or 0, seconds))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Copies are done when they are submitted."""

    def shutdown(self) -> None:
        self._client.close()

    # -- called by the connector

    def take_failures(self) -> Failures:
        """Load jobs that failed since the last call, and the blocks they should have filled."""
        failures, self._failures = self._failures, Failures()
        return failures

    @guarded()
    def follow(self, life: int) -> None:
        """Joins the scheduler's life `life` before anything of it is copied; 0 is none."""
        if life <= self._life:
            return
        first, self._life = self._life == 0, life
        # Nothing was ever copied in the session that was opened before the scheduler had one.
        if first and self._client.check():
            return
        self._arena = None
        if self._client.reopen():
            self._map()

    @guarded()
    def stray(self) -> Stray | None:
        """Says so when this worker has no session in the scheduler's life."""
        if self._life == 0 or self._client.check():
            return None
        return Stray(self._life, self._client.off)

    @guarded()
    def discard(self, refs: bytes) -> None:
        """Gives up chunks that were granted to this node and will not be written."""
        self._client.send(Discard(refs=refs))

    # -- inside

    def _map(self) -> None:
        session = self._client.session
        if session is None or session.arena is None:
            return
        try:
            self._arena = Arena(session.arena, session.welcome, self._layout.row_bytes)
        except ValueError as error:
            report("arena", "%s; this worker goes on without the store", error)
            self._client.close()

    @guarded()
    def _store(self, src_spec: Any, dst_spec: ChunkSpec, start: float) -> int | None:
        if dst_spec.life != self._life or not self._client.alive:
            # The engine took these chunks back when that session ended.
            return None
        size = self._copy_out(src_spec, dst_spec)
        if size is None:
            self._client.send(Discard(refs=dst_spec.refs))
            return None
        micros = int((time.perf_counter() - start) * 1e6)
        self._client.send(Commit(refs=dst_spec.refs, bytes=size, micros=micros))
        return size

    @guarded()
    def _copy_out(self, src_spec: Any, dst_spec: ChunkSpec) -> int | None:
        arena, refs = self._arena, parse_refs(dst_spec.refs)
        slots = self._usable(arena, dst_spec, refs)
        if arena is None or slots is None:
            report("store", "a store of %d chunks names slots that are not ours", len(refs))
            return None
        size = 0
        for group, blocks, chunk_slots in self._by_group(src_spec, slots):
            save_rows(self._layout.groups[group], blocks, arena.rows, chunk_slots)
            arena.keep_sums(chunk_slots, self._layout.group_bytes[group])
            size += self._layout.group_bytes[group] * len(blocks)
        return size

    @guarded()
    def _load(self, src_spec: ChunkSpec, dst_spec: Any) -> int | None:
        arena, refs = self._arena, parse_refs(src_spec.refs)
        slots = self._usable(arena, src_spec, refs)
        if arena is None or slots is None:
            report("load", "a load of %d chunks lost its lease", len(refs))
            return None
        size = 0
        wrong = []
        for group, blocks, chunk_slots in self._by_group(dst_spec, slots):
            load_rows(self._layout.groups[group], blocks, arena.rows, chunk_slots)
            wrong.append(arena.wrong(chunk_slots, self._layout.group_bytes[group]))
            size += self._layout.group_bytes[group] * len(blocks)
        current = arena.current(slots, refs)
        # Of a chunk that was overtaken meanwhile, the checksum says nothing.
        damaged = refs[np.concatenate([*wrong, np.zeros(0, bool)]) & current]
        if len(damaged):
            report("damage", "%d of %d chunks are not what was saved: the arena was damaged", len(damaged), len(refs))
            self._client.send(Damaged(refs=damaged.tobytes()))
            return None
        if not current.all():
            report("load", "a load of %d chunks was overtaken by new owners of its slots", len(refs))
            return None
        return size

    def _usable(self, arena: Arena | None, spec: ChunkSpec, refs: np.ndarray) -> np.ndarray | None:
        # Epoch 0: the scheduler's session opened before any arena existed.
        if arena is None or spec.life != self._life or spec.epoch not in (0, arena.epoch):
            return None
        return arena.slots_of(refs)

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

    @guarded()
    def _tell_loaded(self, spec: ChunkSpec, size: int | None, seconds: float) -> None:
        count = len(parse_refs(spec.refs))
        self._client.send(
            Loaded(
                chunks=0 if size is None else count,
                bytes=size or 0,
                micros=int(seconds * 1e6),
                failed=count if size is None else 0,
            )
        )
