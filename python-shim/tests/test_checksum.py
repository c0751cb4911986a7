"""The checksums alone: those of zlib, for any row, however they are computed; and their speed beside zlib's."""

import runpy
import statistics
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from pegaflow_vllm import copy
from pegaflow_vllm.checksum import row_sums

# Around what is folded at a time (64), taken from a table at a time (8), and the multiples of both.
EDGES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 71, 72, 127, 128, 129, 191, 192, 255, 256, 257, 4096, 65537]


@pytest.fixture(scope="session")
def tables_only():
    """The library as it works on a processor without PCLMULQDQ."""
    native = Path(__file__).parent.parent / "native"
    library = copy.load_library(Path(runpy.run_path(str(native / "build.py"))["build"]("--cfg=pegaflow_tables_only")))
    assert library is not None
    return library


@pytest.fixture(autouse=True, params=["native", "tables", "zlib"])
def how(request, native_copy, tables_only, monkeypatch):
    monkeypatch.setattr(copy, "native", {"native": native_copy, "tables": tables_only, "zlib": None}[request.param])
    return request.param


@pytest.mark.parametrize("seed", range(40))
def test_the_sums_are_those_of_zlib_for_any_size_and_alignment(seed):
    rng = np.random.default_rng(seed)
    width, places, offset = int(rng.integers(1, 5000)), int(rng.integers(1, 9)), int(rng.integers(0, 130))
    stride = width + int(rng.integers(0, 130))
    memory = rng.integers(-128, 128, offset + places * stride, dtype=np.int8)[offset:]
    rows = memory.reshape(places, stride)[:, :width]
    for _ in range(20):
        slots = rng.integers(0, places, int(rng.integers(1, 12)))
        size = int(rng.integers(0, width + 1))
        assert row_sums(rows, slots, size).tolist() == [zlib.crc32(rows[slot, :size].tobytes()) for slot in slots]


@pytest.mark.parametrize("size", EDGES)
def test_every_length_around_the_edges_of_a_step(size):
    rng = np.random.default_rng(size)
    memory = rng.integers(-128, 128, size + 65, dtype=np.int8)
    rows = [memory[shift : shift + size + 1].reshape(1, -1) for shift in range(0, 64, 7)]
    for row in [*rows, np.zeros((1, size + 1), np.int8), np.full((1, size + 1), -1, np.int8)]:
        assert row_sums(row, np.array([0]), size).tolist() == [zlib.crc32(row[0, :size].tobytes())]


def test_any_flipped_bit_shows():
    rows = np.random.default_rng(1).integers(-128, 128, (1, 333), dtype=np.int8)
    right = row_sums(rows, np.array([0]), 333)[0]
    for at in range(333):
        for bit in range(7):
            rows[0, at] ^= 1 << bit
            assert row_sums(rows, np.array([0]), 333)[0] != right
            rows[0, at] ^= 1 << bit


@pytest.mark.parametrize(("slots", "size"), [([3], 8), ([-1], 8), ([0], 9), ([0], -1)])
def test_nothing_is_read_that_is_not_there(slots, size):
    with pytest.raises(IndexError):
        row_sums(np.zeros((3, 8), np.int8), np.array(slots), size)
    assert row_sums(np.zeros((3, 8), np.int8), np.array([], np.int64), 8).tolist() == []


def test_wide_rows_are_summed_no_slower_than_zlib_does(how):
    """Generous: the figures are in docs/performance-store.md."""
    rows = np.ones((8, 2 << 20), np.int8)
    slots = np.arange(8)

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    shares = []
    for _ in range(9):
        plain = seconds(lambda: [zlib.crc32(row) for row in rows])
        shares.append(plain / seconds(lambda: row_sums(rows, slots, 2 << 20)))
    print(how, "times zlib's speed:", [round(share, 2) for share in shares])
    assert statistics.median(shares) > (1.0 if how == "native" else 0.1), shares
