"""The shim's copies on a real GPU, without a model: is every byte right, and how near to the raw copy are they?

    PYTHONPATH=python-shim:python-shim/tests INTERPRETER tests/gpu/worker.py [--device cuda|fake] [--gib N] [CHECK...]

INTERPRETER has vLLM for CUDA. With `--device fake` the same checks run in host memory over the scripted device of the
shim's own tests: that shows that this script works, and says nothing of a GPU. Prints one line of JSON per check; the
exit code is 1 if any failed.
"""

import argparse
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from pegaflow_vllm.arena import Arena
from pegaflow_vllm.copy import LOAD, SAVE, Page, Part
from pegaflow_vllm.device import PAGE, DeviceCopier
from pegaflow_vllm.protocol import Welcome

LIMIT = 120.0
WANTED = 0.90
"""Of the raw pinned copy's bandwidth."""
ROUNDS = 7


class Bench:
    """A cache of `layers` tensors on the device, and an arena of as many rows as it has blocks."""

    def __init__(self, where: str, layers: int, page: int, blocks: int):
        self.where = where
        self.torch_device = torch.device("cuda:0" if where == "cuda" else "cpu")
        generator = torch.Generator().manual_seed(7)
        self.cache = [
            torch.randint(-128, 128, (blocks, page), dtype=torch.int8, generator=generator).to(self.torch_device)
            for _ in range(layers)
        ]
        self.pages = [Page(tensor, layer * page, page) for layer, tensor in enumerate(self.cache)]
        row = layers * page
        stride = -(-row // 64) * 64
        header = -(-4 * blocks // PAGE) * PAGE
        size = -(-(header + blocks * stride) // PAGE) * PAGE
        self.file = os.memfd_create("pegaflow-gpu-check")
        os.ftruncate(self.file, size)
        welcome = Welcome(
            epoch=1,
            session=1,
            slots=blocks,
            stride=stride,
            rank_offset=0,
            header_bytes=header,
            arena_bytes=size,
            checksum_offset=0,
        )
        self.arena = Arena(mmap.mmap(self.file, size), welcome, row)
        started = time.perf_counter()
        self.arena.rows[:] = 1  # Its pages are there before anything is measured, as the engine's are.
        self.touched = time.perf_counter() - started
        self.device = self._device([page] * layers)
        started = time.perf_counter()
        self.copier = DeviceCopier(self.device, self.arena)
        self.copier._threads[0].join(LIMIT)
        self.pinning = time.perf_counter() - started

    def _device(self, sizes: list[int]):
        if self.where == "fake":
            from fake_device import FakeDevice

            return FakeDevice()
        from pegaflow_vllm.cuda import Cuda

        return Cuda(self.torch_device, sizes)

    def copy(self, way: str, blocks: np.ndarray, slots: np.ndarray) -> float:
        """Seconds until what follows the copy has run."""
        over, errors = threading.Event(), []

        def then(error) -> None:
            errors.append(error)
            over.set()

        started = time.perf_counter()
        self.copier.submit(way, [Part(self.pages, blocks, slots)], then)
        assert over.wait(LIMIT), f"a {way} did not end"
        assert errors == [None], errors
        return time.perf_counter() - started

    def bytes_of(self, blocks: np.ndarray) -> int:
        return len(blocks) * sum(page.size for page in self.pages)


def register(where: str, size: int) -> dict:
    """How long the arena takes to be pinned."""
    bench = Bench(where, 1, 1 << 20, size >> 20)
    pinned = len(bench.copier._pieces)
    assert pinned, "nothing was pinned: see the log above"
    assert bench.copier.close()
    return {"seconds_per_gib": round(bench.pinning / (bench.arena.size / (1 << 30)), 3), "pieces": pinned}


def exact(where: str, size: int) -> dict:
    """Random blocks to random rows and back, large pages and small ones: every byte, and none beside."""
    for layers, page in [(4, 256 << 10), (8, 4 << 10), (3, 520)]:
        bench = Bench(where, layers, page, 96)
        kept = [tensor.cpu().clone() for tensor in bench.cache]
        rng = np.random.default_rng(page)
        for _ in range(20):
            count = int(rng.integers(1, 60))
            source, slots, target = (rng.permutation(96)[:count].astype(np.int64) for _ in range(3))
            bench.arena.rows[:] = 99
            bench.copy(SAVE, source, slots)
            expected = np.full_like(bench.arena.rows, 99)
            for part, tensor in zip(bench.pages, kept, strict=True):
                expected[slots, part.columns] = tensor.numpy()[source]
            assert np.array_equal(bench.arena.rows, expected), "what was saved differs"
            for tensor in bench.cache:
                tensor.fill_(5)
            bench.copy(LOAD, target, slots)
            for tensor, original in zip(bench.cache, kept, strict=True):
                wanted = torch.full_like(original, 5)
                wanted[target] = original[source]
                assert torch.equal(tensor.cpu(), wanted), "what was loaded differs"
                tensor.copy_(original)
        assert bench.copier.close()
    return {"rounds": 60}


def after_computing(where: str, size: int) -> dict:
    """A save sees what was still being computed when it was submitted."""
    bench = Bench(where, 2, 1 << 20, 32)
    every = np.arange(32)
    for turn in range(20):
        if where == "cuda":
            torch.cuda._sleep(20_000_000)
        for tensor in bench.cache:
            tensor.fill_(turn)
        bench.copy(SAVE, every, every)
        assert (bench.arena.rows == turn).all(), "a save overtook the computation"
    assert bench.copier.close()
    return {"rounds": 20}


def bandwidth(where: str, size: int) -> dict:
    """Against one pinned copy of as many bytes; the median of ratios, both in turn."""
    found = {}
    for name, layers, page in [("large", 32, 128 << 10), ("small", 32, 16 << 10)]:
        blocks = min(size // (layers * page), 256)
        bench = Bench(where, layers, page, blocks)
        rng = np.random.default_rng(1)
        chosen, slots = rng.permutation(blocks).astype(np.int64), rng.permutation(blocks).astype(np.int64)
        total = bench.bytes_of(chosen)
        here = torch.empty(total, dtype=torch.int8, pin_memory=where == "cuda")
        there = torch.empty(total, dtype=torch.int8, device=bench.torch_device)
        for way in (SAVE, LOAD):
            source, target = (there, here) if way == SAVE else (here, there)
            ratios, speeds = [], []
            for _ in range(ROUNDS):
                raw = _raw(target, source)
                ours = bench.copy(way, chosen, slots)
                ratios.append(raw / ours)
                speeds.append(total / ours / 1e9)
            found[f"{name}_{way}"] = {"of_raw": round(_median(ratios), 3), "GB/s": round(_median(speeds), 2)}
        assert bench.copier.close()
    below = [name for name, figures in found.items() if name.startswith("large") and figures["of_raw"] < WANTED]
    if where == "cuda" and below:
        raise AssertionError(f"below {WANTED:.0%} of a raw pinned copy: {below} of {found}")
    return found


def _raw(target: torch.Tensor, source: torch.Tensor) -> float:
    started = time.perf_counter()
    target.copy_(source, non_blocking=True)
    if "cuda" in (source.device.type, target.device.type):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def killed(where: str, size: int) -> dict:
    """kill -9 in the middle of copies: the rows of others stay as they are, and the GPU's memory comes back."""
    bench = Bench(where, 4, 256 << 10, 64)
    bench.arena.rows[:] = 42
    before = _free(where)
    command = [sys.executable, __file__, "--device", where, "--victim", str(bench.file)]
    child = subprocess.Popen(command, pass_fds=[bench.file], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "copying", "the victim did not start"
        time.sleep(0.3)
        assert _free(where) < before or where == "fake"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    # The victim copies to the first half only.
    assert (bench.arena.rows[32:] == 42).all(), "rows of others were damaged"
    end = time.monotonic() + 30
    while _free(where) < before - (64 << 20):
        assert time.monotonic() < end, f"{before - _free(where)} bytes of the GPU did not come back"
        time.sleep(0.1)
    every = np.arange(64)
    bench.copy(SAVE, every, every)
    bench.copy(LOAD, every, every)
    assert bench.copier.close()
    return {"gpu_memory": "back to its baseline" if where == "cuda" else "not looked at"}


def victim(where: str, file: int) -> None:
    bench = Bench(where, 4, 256 << 10, 64)
    mapping = mmap.mmap(file, os.fstat(file).st_size)
    bench.arena.rows = np.frombuffer(mapping, np.int8, 64 * (1 << 20), PAGE).reshape(64, 1 << 20)
    half = np.arange(32)
    print("copying", flush=True)
    while True:
        bench.copy(SAVE, half, half)


def _free(where: str) -> int:
    return torch.cuda.mem_get_info(0)[0] if where == "cuda" else 0


CHECKS = {check.__name__: check for check in (register, exact, after_computing, bandwidth, killed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--device", choices=["cuda", "fake"], default="cuda")
    parser.add_argument("--gib", type=float, default=4.0, help="of arena to pin, and at most to copy at once")
    parser.add_argument("--victim", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.victim is not None:
        victim(args.device, args.victim)
    failed = 0
    for name in args.checks or CHECKS:
        try:
            answer = {"ok": True} | CHECKS[name](args.device, int(args.gib * (1 << 30)))
        except Exception as error:
            failed, answer = 1, {"ok": False, "why": f"{type(error).__name__}: {error}"}
        gpu = torch.cuda.get_device_name(0) if args.device == "cuda" and torch.cuda.is_available() else "none"
        print(json.dumps({"check": name, "gpu": gpu} | answer), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
