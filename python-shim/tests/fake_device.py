"""A Device in host memory: what cuda.py asks of a driver, scripted. Copies are real, when the test lets them go."""

import ctypes
import threading
from typing import Any

import numpy as np

from pegaflow_vllm.device import DeviceCopier

LIMIT = 20.0


class Event:
    def __init__(self, copy: tuple[np.ndarray, np.ndarray, np.ndarray]):
        self.go = threading.Event()
        self.error: Exception | None = None
        self._copy = copy

    def synchronize(self) -> None:
        assert self.go.wait(LIMIT), "the test never let this copy go"
        if self.error is not None:
            raise self.error
        for source, target, size in zip(*(each.tolist() for each in self._copy), strict=True):
            ctypes.memmove(target, source, size)


class FakeDevice:
    """`hold`: copies wait for `events[i].go`. `refuse_from`: which registration is the first to fail."""

    def __init__(self, *, hold: bool = False, refuse_from: int | None = None):
        self.hold, self.refuse_from = hold, refuse_from
        self.events: list[Event] = []
        self.ways: list[str] = []
        self.pinned: dict[int, int] = {}
        self.pins = 0
        self.whole = threading.Event()
        self.entered: set[str] = set()
        self.fail: Exception | None = None

    def enter(self) -> None:
        self.entered.add(threading.current_thread().name)

    def start(self, way: str, sources: np.ndarray, targets: np.ndarray, sizes: np.ndarray) -> Any:
        if self.fail is not None:
            raise self.fail
        assert sources.dtype == targets.dtype == sizes.dtype == np.int64
        event = Event((sources, targets, sizes))
        self.ways.append(way)
        self.events.append(event)
        if not self.hold:
            event.go.set()
        return event

    def register(self, address: int, size: int) -> bool:
        self.pins += 1
        if self.refuse_from is not None and self.pins >= self.refuse_from:
            return False
        self.pinned[address] = size
        return True

    def unregister(self, address: int) -> None:
        del self.pinned[address]

    def registered(self) -> None:
        self.whole.set()


def waiting(copier: DeviceCopier) -> DeviceCopier:
    """Its `submit` returns when all is over, as tests that know nothing of devices expect."""
    submit = copier.submit

    def and_wait(way, parts, then) -> None:
        over = threading.Event()

        def both(error) -> None:
            then(error)
            over.set()

        submit(way, parts, both)
        assert over.wait(LIMIT)

    copier.submit = and_wait
    return copier
