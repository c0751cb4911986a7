"""Copies between a KV cache on an accelerator and the arena: all at once, beside the computing.

    submit --> addresses of every page --> the device's stream of that way --> event
                                                                                 |
    then(error), in the completion thread, <-- the event has come <-- waits -----+

There is one stream for saves and one for loads, so a way keeps its order and the two do not wait for each other. Each
copy waits for what the computing stream had to do when it was submitted: a save reads what was computed, a load comes
after whatever was still to be written to its blocks. What follows a copy (commit, second look at the generations)
runs in the completion thread as soon as the event has come, not when the engine takes its next step.

The arena is registered with the driver by a thread of its own, in pieces that end where a row ends, while the node
goes on starting; until then, and where it cannot be done, copies go through the driver's own buffers, which is slower.
"""

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pegaflow_vllm.arena import Arena
from pegaflow_vllm.copy import LOAD, SAVE, Part, check
from pegaflow_vllm.guard import logger, report

PIECE = 1 << 30
"""Bytes that are registered in one call, about: the driver holds up other calls meanwhile."""
PAGE = 4096
JOIN_LIMIT = 10.0
"""Seconds for what is under way when the copier closes."""

Then = Callable[[BaseException | None], None]


class Device(Protocol):
    """What is needed of an accelerator; cuda.py has one, tests have another."""

    def enter(self) -> None:
        """Makes it the calling thread's device."""

    def start(self, way: str, sources: np.ndarray, targets: np.ndarray, sizes: np.ndarray) -> Any:
        """Copies `sizes[i]` bytes from address `sources[i]` to `targets[i]` (int64, each) on the stream of that way,
        after what the computing stream has to do now. Returns something with `synchronize()`. If it raises, nothing
        of it is under way any more."""

    def register(self, address: int, size: int) -> bool:
        """Pins host memory for this process; False where the driver will not."""

    def unregister(self, address: int) -> None: ...

    def registered(self) -> None:
        """The whole arena is: from now on kernels may read it, too."""


@dataclass(frozen=True)
class _UnderWay:
    event: Any
    then: Then


class DeviceCopier:
    def __init__(self, device: Device, arena: Arena):
        self._device = device
        self._arena = arena
        self._closed = threading.Event()
        self._pieces: list[int] = []
        self._ways: dict[str, queue.SimpleQueue[_UnderWay | None]] = {}
        self._threads = [threading.Thread(target=self._register, name="pegaflow-pin", daemon=True)]
        for way in (SAVE, LOAD):
            waiting: queue.SimpleQueue[_UnderWay | None] = queue.SimpleQueue()
            self._ways[way] = waiting
            self._threads.append(
                threading.Thread(target=self._complete, args=(waiting,), name=f"pegaflow-{way}", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def submit(self, way: str, parts: Sequence[Part], then: Then) -> None:
        """Starts a copy; `then` is called once, with what went wrong if anything did. Raises nothing."""
        try:
            event = self._device.start(way, *self._addresses(way, parts))
        except Exception as error:
            then(error)
            return
        self._ways[way].put(_UnderWay(event, then))

    def close(self) -> bool:
        """Waits for what is under way and lets go of the arena; False if that takes too long: then nobody may unmap
        the arena, or give its slots to others, while this process lives."""
        self._closed.set()
        for waiting in self._ways.values():
            waiting.put(None)
        deadline = time.monotonic() + JOIN_LIMIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._unregister()
        return True

    # -- inside

    def _addresses(self, way: str, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What to copy from, where to, and how much: one of each for every page of every block."""
        rows = self._arena.rows
        caches, places, sizes = [], [], []
        for part in parts:
            check(part.pages, part.blocks, rows, part.slots)
            bases = np.array([page.tensor.data_ptr() for page in part.pages], np.int64)
            widths = np.array([page.tensor.stride(0) for page in part.pages], np.int64)
            starts = np.array([page.start for page in part.pages], np.int64)
            # Block by block: the pages of a row lie side by side.
            caches.append((bases + part.blocks[:, None] * widths).ravel())
            places.append((rows.ctypes.data + part.slots[:, None] * rows.strides[0] + starts).ravel())
            sizes.append(np.tile([page.size for page in part.pages], len(part.blocks)))
        cache, place, size = (np.concatenate([*each, np.empty(0, np.int64)]) for each in (caches, places, sizes))
        return (cache, place, size) if way == SAVE else (place, cache, size)

    def _complete(self, waiting: "queue.SimpleQueue[_UnderWay | None]") -> None:
        self._enter()
        while (under_way := waiting.get()) is not None:
            error = None
            try:
                under_way.event.synchronize()
            except Exception as failed:
                error = failed
            try:
                under_way.then(error)
            except Exception:
                # This thread goes on: others wait for it.
                report("after", "what follows a copy failed", exc_info=True)

    def _register(self) -> None:
        self._enter()
        start = time.perf_counter()
        address, size = self._arena.address, self._arena.size
        for at, upto in pieces(self._arena.header_bytes, self._arena.rows.strides[0], size):
            if self._closed.is_set():
                return
            if not self._pin(address + at, upto - at):
                report(
                    "pin",
                    "only %.1f of %.1f GiB of the store could be pinned (memlock? `pegaflow doctor` measures it); "
                    "copies are slower",
                    at / (1 << 30),
                    size / (1 << 30),
                )
                self._unregister()
                return
        self._device.registered()
        logger.info("pegaflow: %.1f GiB of the store pinned in %.2f s", size / (1 << 30), time.perf_counter() - start)

    def _unregister(self) -> None:
        while self._pieces:
            self._device.unregister(self._pieces.pop())

    def _pin(self, address: int, size: int) -> bool:
        try:
            done = self._device.register(address, size)
        except Exception as error:
            report("register", "the driver refused the store's memory: %r", error)
            return False
        if done:
            self._pieces.append(address)
        return done

    def _enter(self) -> None:
        try:
            self._device.enter()
        except Exception as error:
            report("device", "this thread has no device: %r", error)


def pieces(header: int, stride: int, size: int) -> list[tuple[int, int]]:
    """Cuts an arena of `size` bytes where both a row and a page end: no copy of a row straddles two registrations,
    and no page is in two."""
    step = math.lcm(stride, PAGE)
    step *= max(PIECE // step, 1)
    cuts = [0, *range(header + step, size, step), size]
    return list(itertools.pairwise(cuts))
