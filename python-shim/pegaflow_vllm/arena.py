"""The mapped arena as one rank sees it: a table of rows, and the generation of each slot."""

import mmap

import numpy as np

from pegaflow_vllm.protocol import REF_DTYPE, Welcome


class Arena:
    def __init__(self, mapping: mmap.mmap, welcome: Welcome, row_bytes: int):
        end = welcome.header_bytes + welcome.slots * welcome.stride
        fits = welcome.rank_offset + row_bytes <= welcome.stride and 4 * welcome.slots <= welcome.header_bytes
        if end > len(mapping) or not fits or welcome.slots == 0:
            raise ValueError(f"arena layout does not hold rows of {row_bytes} bytes: {welcome}")
        self._mapping = mapping
        self.epoch = welcome.epoch
        self.slots = welcome.slots
        self.generations = np.frombuffer(mapping, dtype=np.uint32, count=welcome.slots)
        whole = np.frombuffer(mapping, dtype=np.int8, count=welcome.slots * welcome.stride, offset=welcome.header_bytes)
        table = whole.reshape(welcome.slots, welcome.stride)
        self.rows = table[:, welcome.rank_offset : welcome.rank_offset + row_bytes]

    def slots_of(self, refs: np.ndarray) -> np.ndarray | None:
        """The slots that `refs` name, or None when one of them is not, or no longer, what was leased."""
        slots = refs["slot"].astype(np.int64)
        if slots.size and int(slots.max()) >= self.slots:
            return None
        return slots if self.current(slots, refs) else None

    def current(self, slots: np.ndarray, refs: np.ndarray) -> bool:
        return bool(np.array_equal(self.generations[slots], refs["generation"]))


def parse_refs(refs: bytes) -> np.ndarray:
    return np.frombuffer(refs, dtype=REF_DTYPE)
