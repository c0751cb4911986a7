"""CRC-32 of rows of the arena, as zlib computes it: natively where pegaflow_copy.so is there, else with zlib itself."""

import ctypes
import zlib

import numpy as np

from pegaflow_vllm import copy
from pegaflow_vllm.copy import Rows, check_rows


def row_sums(rows: np.ndarray, slots: np.ndarray, size: int) -> np.ndarray:
    """The CRC of the first `size` bytes of each of these rows."""
    slots = np.ascontiguousarray(slots, np.int64)
    sums = np.zeros(len(slots), np.uint32)
    if not len(slots):
        return sums
    check_rows(rows, slots)
    if not 0 <= size <= rows.shape[1]:
        raise IndexError(f"{size} bytes are more than a row of {rows.shape[1]}")
    if copy.native is not None:
        first, stride, count = rows.ctypes.data, rows.strides[0], len(slots)
        plan = Rows(first, stride, size, slots.ctypes.data, sums.ctypes.data, count)
        copy.native.pegaflow_crc32(ctypes.byref(plan))
    else:
        for at, slot in enumerate(slots):
            sums[at] = zlib.crc32(rows[slot, :size])
    return sums
