"""The mapped arena as one rank sees it: a table of rows, the generation of each slot, and maybe its row's checksum.

A checksum counts like a part of its row: it is written before the commit and compared before the second look at the
generation, so that one that differs under an unchanged generation is damage, and nobody else's row.
"""

import mmap

import numpy as np

from pegaflow_vllm.checksum import row_sums
from pegaflow_vllm.protocol import REF_DTYPE, Welcome


class Arena:
    def __init__(self, mapping: mmap.mmap, welcome: Welcome, row_bytes: int):
        end = welcome.header_bytes + welcome.slots * welcome.stride
        fits = welcome.rank_offset + row_bytes <= welcome.stride and 4 * welcome.slots <= welcome.header_bytes
        sums = welcome.checksum_offset
        if sums and (sums % 4 or sums < 4 * welcome.slots or sums + 4 * welcome.slots > welcome.header_bytes):
            fits = False
        if end > len(mapping) or not fits or welcome.slots == 0:
            raise ValueError(f"arena layout does not hold rows of {row_bytes} bytes: {welcome}")
        self._mapping = mapping
        self.size = len(mapping)
        self.header_bytes = welcome.header_bytes
        self.epoch = welcome.epoch
        self.slots = welcome.slots
        self.generations = np.frombuffer(mapping, dtype=np.uint32, count=welcome.slots)
        self.address = self.generations.ctypes.data
        self.sums = np.frombuffer(mapping, np.uint32, welcome.slots, sums) if sums else None
        whole = np.frombuffer(mapping, dtype=np.int8, count=welcome.slots * welcome.stride, offset=welcome.header_bytes)
        table = whole.reshape(welcome.slots, welcome.stride)
        self.rows = table[:, welcome.rank_offset : welcome.rank_offset + row_bytes]

    def slots_of(self, refs: np.ndarray) -> np.ndarray | None:
        """The slots that `refs` name, or None when one of them is not, or no longer, what was leased."""
        slots = refs["slot"].astype(np.int64)
        if slots.size and int(slots.max()) >= self.slots:
            return None
        return slots if self.current(slots, refs).all() else None

    def current(self, slots: np.ndarray, refs: np.ndarray) -> np.ndarray:
        """Which of these slots still hold what `refs` name."""
        return self.generations[slots] == refs["generation"]

    def keep_sums(self, slots: np.ndarray, size: int) -> None:
        """Keeps the checksums of these rows, of which the first `size` bytes are in use, if there is room for any."""
        if self.sums is not None:
            self.sums[slots] = row_sums(self.rows, slots, size)

    def wrong(self, slots: np.ndarray, size: int) -> np.ndarray:
        """Which of these rows have another checksum than the one that was kept."""
        if self.sums is None:
            return np.zeros(len(slots), bool)
        return row_sums(self.rows, slots, size) != self.sums[slots]


def parse_refs(refs: bytes) -> np.ndarray:
    return np.frombuffer(refs, dtype=REF_DTYPE)
