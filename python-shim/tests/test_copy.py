"""The copies alone, over random shapes and permutations, and their speed beside a memcpy."""

import statistics
import time

import numpy as np
import pytest
import torch

from pegaflow_vllm import copy
from pegaflow_vllm.copy import Page, load_rows, save_rows

SIZES = [1, 7, 8, 15, 64, 100, 4096, 5000, 16384, 16385, 40000]
GUARD = 99


@pytest.fixture(autouse=True, params=["native", "numpy"])
def how(request, native_copy, monkeypatch):
    monkeypatch.setattr(copy, "native", native_copy if request.param == "native" else None)
    return request.param


def random_pages(rng: np.random.Generator, blocks: int) -> tuple[list[Page], int]:
    """Layers of unlike width, some padded, one behind the other in a row with gaps; and the row's width."""
    pages, start = [], int(rng.integers(0, 3))
    for size in rng.choice(SIZES, rng.integers(1, 5)):
        padded = int(size) + int(rng.integers(0, 2)) * int(rng.integers(1, 70))
        whole = torch.from_numpy(rng.integers(-128, 128, (blocks, padded), dtype=np.int8))
        pages.append(Page(whole[:, : int(size)], start, int(size)))
        start += int(size) + int(rng.integers(0, 3))
    return pages, start


def random_rows(rng: np.random.Generator, slots: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """As one rank sees an arena: a part of each row; and the memory that it lies in."""
    stride = width + int(rng.integers(0, 130))
    offset = int(rng.integers(0, 130))
    memory = np.full(offset + (slots + 1) * stride, GUARD, np.int8)[offset:]
    return memory[: slots * stride].reshape(slots, stride)[:, :width], memory


@pytest.mark.parametrize("seed", range(60))
def test_any_blocks_to_any_slots_and_back(seed):
    rng = np.random.default_rng(seed)
    blocks_total, slots_total = int(rng.integers(1, 20)), int(rng.integers(1, 20))
    count = int(rng.integers(0, min(blocks_total, slots_total) + 1))
    pages, width = random_pages(rng, blocks_total)
    rows, flat = random_rows(rng, slots_total, width)
    blocks = rng.permutation(blocks_total)[:count].astype(np.int64)
    slots = rng.permutation(slots_total)[:count].astype(np.int64)
    if rng.integers(0, 3) == 0:  # one stretch
        blocks, slots = np.sort(blocks), np.sort(slots)

    expected = rows.copy()
    kept = [page.tensor.clone() for page in pages]
    for page in pages:
        expected[slots, page.columns] = page.tensor.numpy()[blocks]
    save_rows(pages, blocks, rows, slots)
    assert np.array_equal(rows, expected)
    assert all(torch.equal(page.tensor, copied) for page, copied in zip(pages, kept, strict=True))
    beside = np.setdiff1d(np.arange(len(flat)), np.add.outer(np.arange(slots_total) * rows.strides[0], range(width)))
    # Every byte of the memory that belongs to no row, the gaps between two rows included.
    assert (flat[beside] == GUARD).all()

    target = rng.permutation(blocks_total)[:count].astype(np.int64)
    for page in pages:
        page.tensor.fill_(GUARD)
    load_rows(pages, target, rows, slots)
    assert np.array_equal(rows, expected)
    others = np.setdiff1d(np.arange(blocks_total), target)
    for page, copied in zip(pages, kept, strict=True):
        assert torch.equal(page.tensor[target], copied[blocks])
        assert (page.tensor[others] == GUARD).all()


@pytest.mark.parametrize(
    ("blocks", "slots"),
    [([0, 4], [0, 1]), ([-1, 0], [0, 1]), ([0, 1], [0, 6]), ([0, 1], [-1, 0]), ([0], [0, 1]), ([0, 1], [0])],
)
def test_the_native_copy_touches_nothing_that_is_not_there(native_copy, monkeypatch, blocks, slots):
    monkeypatch.setattr(copy, "native", native_copy)
    pages = [Page(torch.zeros((4, 64), dtype=torch.int8), 0, 64)]
    rows = np.full((6, 64), GUARD, np.int8)
    with pytest.raises(IndexError):
        save_rows(pages, np.array(blocks), rows, np.array(slots))
    assert (rows == GUARD).all()
    too_wide = [Page(pages[0].tensor, 32, 64)]
    with pytest.raises(IndexError):
        load_rows(too_wide, np.array([0]), rows, np.array([0]))


def test_a_library_that_will_not_load_is_done_without(tmp_path):
    broken = tmp_path / "pegaflow_copy.so"
    broken.write_bytes(b"not a library")
    assert copy.load_library(broken) is None


def test_wide_rows_are_copied_at_half_the_speed_of_a_memcpy_or_better(how):
    """Generous: the figures are in docs/performance-store.md. NumPy is held to a quarter."""
    layers, page, count = 32, 64 << 10, 24
    pages = [Page(torch.ones((count, page), dtype=torch.int8), layer * page, page) for layer in range(layers)]
    rows = np.ones((count, layers * page), np.int8)
    source, target = np.ones(rows.size, np.int8), np.ones(rows.size, np.int8)
    blocks, slots = np.arange(count), np.arange(count)[::-1].copy()

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    shares = []
    for _ in range(7):
        memcpy = seconds(lambda: np.copyto(target, source))
        shares.append(
            2 * memcpy / seconds(lambda: (save_rows(pages, blocks, rows, slots), load_rows(pages, blocks, rows, slots)))
        )
    assert statistics.median(shares) > (0.5 if how == "native" else 0.25), shares
