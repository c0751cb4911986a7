"""The copies between the pages of a KV cache and the rows of the arena."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Page:
    """One layer's share of a chunk: `tensor` is (blocks, bytes) in int8, `start` its place in the row."""

    tensor: torch.Tensor
    start: int
    size: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size)


def save_rows(pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """Copies each of `blocks`, all pages of it, into the row that stands at its place in `slots`."""
    for page in pages:
        _copy_to_rows(page, blocks, rows, slots)


def load_rows(pages: Sequence[Page], blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    """The way back."""
    for page in pages:
        _copy_from_rows(page, blocks, rows, slots)


def _runs(blocks: np.ndarray, slots: np.ndarray) -> list[tuple[int, int, int]]:
    """(first block, first slot, length) of every stretch where both ascend by one."""
    breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(slots) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(blocks)])))
    return [(int(blocks[at]), int(slots[at]), int(n)) for at, n in zip(starts, lengths, strict=True)]


def _copy_to_rows(page: Page, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    cells = rows[:, page.columns]
    if page.tensor.device.type == "cpu":
        cache = page.tensor.numpy()
        for block, slot, count in _runs(blocks, slots):
            cells[slot : slot + count] = cache[block : block + count, : page.size]
        return
    index = torch.from_numpy(blocks).to(page.tensor.device)
    cells[slots] = page.tensor[:, : page.size].index_select(0, index).cpu().numpy()


def _copy_from_rows(page: Page, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    cells = rows[:, page.columns]
    if page.tensor.device.type == "cpu":
        cache = page.tensor.numpy()
        for block, slot, count in _runs(blocks, slots):
            cache[block : block + count, : page.size] = cells[slot : slot + count]
        return
    index = torch.from_numpy(blocks).to(page.tensor.device)
    page.tensor[:, : page.size].index_copy_(0, index, torch.from_numpy(cells[slots]).to(page.tensor.device))
