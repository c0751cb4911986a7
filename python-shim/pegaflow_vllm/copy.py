"""The copies between the pages of a KV cache and the rows of the arena.

    cache in host memory -- pegaflow_copy.so is there --> one native call for all pages of all blocks
                         \\- it is not, or will not load -> NumPy, a stretch of neighbouring blocks at a time
    cache on a device ----------------------------------> device.py

pegaflow puts the library (native/copy.rs; checksum.py uses it too) beside this file. It changes how fast a copy is,
nothing else.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pegaflow_vllm.guard import report

LIBRARY = Path(__file__).with_name("pegaflow_copy.so")

# struct Lane of native/copy.rs.
_LANE = np.dtype([(name, np.uintp) for name in ("cache", "cache_stride", "arena", "arena_stride", "size")])


class _Plan(ctypes.Structure):
    _fields_ = (
        ("lanes", ctypes.c_void_p),
        ("lanes_len", ctypes.c_size_t),
        ("blocks", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


class Rows(ctypes.Structure):
    """struct Rows of native/checksum.rs."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("stride", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("slots", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


@dataclass(frozen=True)
class Page:
    """One layer's share of a chunk: `tensor` is (blocks, bytes) in int8, `start` its place in the row."""

    tensor: torch.Tensor
    start: int
    size: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size)


SAVE, LOAD = "save", "load"


@dataclass(frozen=True)
class Part:
    """Some chunks of one KV group: each of `blocks` (int64), all pages of it, has its row at its place in `slots`."""

    pages: Sequence[Page]
    blocks: np.ndarray
    slots: np.ndarray


class HostCopier:
    """For caches in host memory: a copy is done when `submit` returns. device.py has the other one."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def submit(self, way: str, parts: Sequence[Part], then: Callable[[BaseException | None], None]) -> None:
        """Copies, then calls `then` with what went wrong if anything did. Raises nothing."""
        error = None
        try:
            for part in parts:
                (save_rows if way == SAVE else load_rows)(part.pages, part.blocks, self._rows, part.slots)
        except Exception as failed:
            error = failed
        then(error)

    def close(self) -> bool:
        """Nothing is ever under way."""
        return True


def load_library(path: Path) -> ctypes.CDLL | None:
    """The native copy; None (and logged) where there is none for this machine."""
    try:
        library = ctypes.CDLL(str(path))
        for function in (library.pegaflow_save, library.pegaflow_load):
            function.argtypes = (ctypes.POINTER(_Plan),)
            function.restype = None
        library.pegaflow_crc32.argtypes = (ctypes.POINTER(Rows),)
        library.pegaflow_crc32.restype = None
    except (OSError, AttributeError) as error:
        report("native", "copying with NumPy, which is slower: %s", error)
        return None
    return library


native = load_library(LIBRARY) if LIBRARY.exists() else None


def save_rows(pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """Copies each of `blocks`, all pages of it, into the row that stands at its place in `slots`."""
    if not pages or not len(blocks):
        return
    if native is not None:
        _copy_natively(native.pegaflow_save, pages, blocks, rows, slots)
        return
    for page in pages:
        _copy_to_rows(page, blocks, rows, slots)


def load_rows(pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """The way back."""
    if not pages or not len(blocks):
        return
    if native is not None:
        _copy_natively(native.pegaflow_load, pages, blocks, rows, slots)
        return
    for page in pages:
        _copy_from_rows(page, blocks, rows, slots)


def _copy_natively(function, pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    blocks, slots = np.ascontiguousarray(blocks, np.int64), np.ascontiguousarray(slots, np.int64)
    check(pages, blocks, rows, slots)
    lanes = np.empty(len(pages), _LANE)
    for lane, page in enumerate(pages):
        cache = page.tensor
        lanes[lane] = (cache.data_ptr(), cache.stride(0), rows.ctypes.data + page.start, rows.strides[0], page.size)
    plan = _Plan(lanes.ctypes.data, len(lanes), blocks.ctypes.data, slots.ctypes.data, len(blocks))
    function(plan)


def check_rows(rows: np.ndarray, slots: np.ndarray) -> None:
    """What native code relies on: `slots`, one at least, are among `rows` of bytes."""
    places = rows.shape[0]
    if slots.ndim != 1 or int(slots.min()) < 0 or int(slots.max()) >= places:
        raise IndexError(f"slots {slots.min()}..{slots.max()} are not all among {places}")
    if rows.dtype != np.int8 or rows.strides[1] != 1:
        raise ValueError(f"rows of {rows.dtype} with strides {rows.strides} are not bytes side by side")


def check(pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """What a copy of raw addresses relies on; it looks at nothing itself."""
    width = rows.shape[1]
    if blocks.shape != slots.shape:
        raise IndexError(f"{blocks.shape} blocks do not match {slots.shape} slots")
    check_rows(rows, slots)
    first, last = int(blocks.min()), int(blocks.max())
    for page in pages:
        tensor = page.tensor
        if first < 0 or last >= tensor.shape[0]:
            raise IndexError(f"blocks {first}..{last} are not all among {tensor.shape[0]}")
        if tensor.element_size() != 1 or tensor.stride(1) != 1 or page.size > tensor.shape[1]:
            raise ValueError(
                f"a cache of {tuple(tensor.shape)} {tensor.dtype} does not hold pages of {page.size} bytes"
            )
        if page.start < 0 or page.start + page.size > width:
            raise IndexError(f"page {page.start}+{page.size} does not fit into a row of {width} bytes")


def _runs(blocks: np.ndarray, slots: np.ndarray) -> list[tuple[int, int, int]]:
    """(first block, first slot, length) of every stretch where both ascend by one."""
    breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(slots) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(blocks)])))
    return [(int(blocks[at]), int(slots[at]), int(n)) for at, n in zip(starts, lengths, strict=True)]


def _copy_to_rows(page: Page, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    cells = rows[:, page.columns]
    cache = page.tensor.numpy()
    for block, slot, count in _runs(blocks, slots):
        cells[slot : slot + count] = cache[block : block + count, : page.size]


def _copy_from_rows(page: Page, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    cells = rows[:, page.columns]
    cache = page.tensor.numpy()
    for block, slot, count in _runs(blocks, slots):
        cache[block : block + count, : page.size] = cells[slot : slot + count]
