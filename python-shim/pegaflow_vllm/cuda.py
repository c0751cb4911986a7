"""CUDA (and ROCm, through the same calls of torch) as device.py wants it: vLLM's own batched asynchronous copies."""

from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops

from pegaflow_vllm.copy import LOAD, SAVE
from pegaflow_vllm.guard import report

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of this process."""


class Cuda:
    def __init__(self, device: torch.device, page_sizes: list[int]):
        self._device = device
        self._streams = {way: torch.cuda.Stream(device) for way in (SAVE, LOAD)}
        self._small = _for_small_pages(page_sizes)
        self._swap = ops.swap_blocks_batch

    def enter(self) -> None:
        torch.cuda.set_device(self._device)

    def start(self, way: str, sources: np.ndarray, targets: np.ndarray, sizes: np.ndarray) -> Any:
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        lists = [torch.from_numpy(each) for each in (sources, targets, sizes)]
        copy = self._swap if way == LOAD else ops.swap_blocks_batch
        try:
            with torch.cuda.stream(stream):
                if len(sizes):
                    # Host memory that nobody writes while it is loaded may be read ahead; a cache may not.
                    copy(*lists, is_src_access_order_any=way == LOAD)
                # Blocking: the thread that waits for it sleeps, and takes no core from the engine.
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
        except Exception:
            # Some of it may be under way, and whoever gets those slots or blocks next must not find them written to.
            stream.synchronize()
            raise
        return _Copy(event, lists)

    def register(self, address: int, size: int) -> bool:
        return int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)) == 0

    def unregister(self, address: int) -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(address))
        if code:
            report("unregister", "the driver did not let go of the store's memory (code %d)", code)

    def registered(self) -> None:
        if self._small is not None:
            self._swap = self._small


class _Copy:
    def __init__(self, event: torch.cuda.Event, lists: list[torch.Tensor]):
        self._event = event
        # The driver may read them until then.
        self._lists = lists

    def synchronize(self) -> None:
        self._event.synchronize()


def _for_small_pages(page_sizes: list[int]) -> Any:
    """vLLM's kernel that loads many small pages faster than the copy engine does, where it has one for these sizes; it
    reads host memory, so that has to be pinned."""
    try:
        from vllm.v1.kv_offload.cpu import swap_blocks_triton as kernel
    except ImportError:
        return None
    largest = max(page_sizes, default=0)
    if torch.version.hip or largest >= kernel.THRESHOLD_BYTES or any(size % 8 for size in page_sizes):
        return None
    chunk = min(1 << (largest - 1).bit_length(), 8192)

    def copy(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, **options: Any) -> None:
        kernel.swap_blocks_batch(sources, targets, sizes, bytes_per_chunk=chunk, **options)

    return copy
