"""What the Python benchmarks of the store share: KV caches, block lists, an arena, a running engine, timing."""

import mmap
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python-shim"))

from pegaflow_vllm import copy  # noqa: E402
from pegaflow_vllm.arena import Arena  # noqa: E402
from pegaflow_vllm.client import Client  # noqa: E402
from pegaflow_vllm.copy import Page  # noqa: E402
from pegaflow_vllm.protocol import VERSION, Hello, Welcome  # noqa: E402

# What pegaflow puts beside the shim; PEGAFLOW_COPY=numpy measures what is used where that cannot be loaded.
if os.environ.get("PEGAFLOW_COPY") != "numpy":
    build = runpy.run_path(str(ROOT / "python-shim/native/build.py"))["build"]
    copy.native = copy.load_library(build())
    assert copy.native is not None

ENGINE = os.environ.get("PEGAFLOW_STORE_ENGINE", str(ROOT / "target/release/examples/store-engine"))
TOKEN = "benchmark"
CALL_TIMEOUT = 10.0


@dataclass(frozen=True)
class Shape:
    """A chunk's row: `layers` pages of `page` bytes."""

    name: str
    layers: int
    page: int

    @property
    def row(self) -> int:
        return self.layers * self.page

    def __str__(self) -> str:
        return f"{self.name}: {self.layers} x {self.page >> 10} KiB"


WIDE = Shape("8B model", 36, 64 << 10)
NARROW = Shape("tiny model", 4, 8 << 10)


class Cache:
    """A KV cache with one tensor per layer, as vLLM has it."""

    def __init__(self, shape: Shape, blocks: int):
        self.blocks = blocks
        filler = torch.arange(shape.page, dtype=torch.int32)
        tensors = [
            ((torch.arange(blocks, dtype=torch.int32)[:, None] * 31 + filler * 7 + layer) % 251 - 125).to(torch.int8)
            for layer in range(shape.layers)
        ]
        self.pages = [Page(tensor, layer * shape.page, shape.page) for layer, tensor in enumerate(tensors)]


def pattern(name: str, count: int, size: int) -> np.ndarray:
    """`count` of `size` places, as vLLM's or the engine's free list may hand them out."""
    if name == "scattered":
        return np.random.default_rng(size).permutation(size)[:count].astype(np.int64)
    places = np.arange(count, dtype=np.int64)
    return places[::-1].copy() if name == "reversed" else places


def own_arena(shape: Shape, slots: int) -> Arena:
    """An arena of this process alone, not touched yet."""
    header = -(-4 * slots // 4096) * 4096
    size = header + slots * shape.row
    fd = os.memfd_create("bench-arena", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    os.close(fd)
    welcome = Welcome(
        epoch=1,
        session=1,
        slots=slots,
        stride=shape.row,
        rank_offset=0,
        header_bytes=header,
        arena_bytes=size,
        checksum_offset=0,
    )
    return Arena(mapping, welcome, shape.row)


class Engine:
    """The release build's engine alone on a socket."""

    def __init__(self, shape: Shape, slots: int):
        self._shape = shape
        self._folder = tempfile.TemporaryDirectory(prefix="pf")
        self.socket = f"{self._folder.name}/s"
        capacity = (slots + 2) * (shape.row + 68)
        self._process = subprocess.Popen(
            [ENGINE, self.socket, str(capacity)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise SystemExit(f"{ENGINE} does not start; build it: cargo build --release --example store-engine")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def join(self, node: str, kind: str) -> Client:
        return join(self.socket, self._shape, node, kind)


def join(socket: str, shape: Shape, node: str, kind: str) -> Client:
    client = Client(socket, CALL_TIMEOUT)
    hello = Hello(
        version=VERSION,
        token=TOKEN,
        node=node,
        incarnation=1,
        kind=kind,
        rank=0,
        world=1,
        namespace={"model": "benchmark"},
        row_bytes=shape.row if kind == "worker" else 0,
        pid=os.getpid(),
    )
    if not client.connect(hello):
        raise SystemExit(f"no session at {socket}")
    return client


def keys(seed: int, count: int) -> list[bytes]:
    """As vLLM makes them: a 32-byte hash and the KV group 0."""
    hashes = np.random.default_rng(seed).bytes(32 * count)
    return [hashes[at : at + 32] + bytes(4) for at in range(0, len(hashes), 32)]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return statistics.median(values)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
