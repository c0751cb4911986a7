"""The same KV through pegaflow's store, Redis over a Unix socket and LMCache's host store, on this machine.

    cargo build --release --example store-engine
    INTERPRETER benches/peers.py [--mib 256] [--rounds 5]

Needs `redis-server` on the PATH (or REDIS_SERVER) and the Python package `redis` where INTERPRETER finds it, e.g.
`pip install --no-deps --target DIR redis==8.1.0` and PYTHONPATH=DIR; benches/peers-requirements.txt has the versions.
Both sides start and end with a paged KV cache of one tensor per layer, with scattered blocks:

LMCache (without a GPU): `pip install --no-deps --target DIR lmcache==0.5.6` with what it imports, see the same file.

- save: from "these blocks are computed" to "another client finds them". pegaflow: store, copy, commit, and a lookup
  until all are hits. Redis: gather each chunk into one value, MSET in batches.
- load: from keys to blocks. pegaflow: lookup and copy. Redis: MGET in batches, scatter.
- lookup: which of 2,048 chunks are there. pegaflow: one call, which pins them too. Redis: EXISTS in one pipeline.
"""

import argparse
import importlib.util
import os
import subprocess
import tempfile
import time

import kv
import numpy as np
from kv import Cache, Engine, Shape, keys, median, pattern, timed
from pegaflow_vllm import protocol
from pegaflow_vllm.arena import Arena, parse_refs
from pegaflow_vllm.copy import load_rows, save_rows
from pegaflow_vllm.protocol import Commit, Finish

BATCH_BYTES = 32 << 20
"""What one MSET or MGET carries."""
LOOKED_UP = 2048
WARM_UP = 3
"""Rounds that touch all memory for the first time, on both sides."""


class Pegaflow:
    name = "pegaflow"

    def __init__(self, shape: Shape, slots: int):
        self._engine = Engine(shape, slots)
        self._worker = self._engine.join("p", "worker")
        self._producer = self._engine.join("p", "scheduler")
        self._consumer = self._engine.join("d", "scheduler")
        session = self._worker.session
        assert session is not None
        assert session.arena is not None
        self._arena = Arena(session.arena, session.welcome, shape.row)
        self._shape = shape

    def save(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        granted = self._producer.store("save", None, names)
        assert granted is not None
        assert granted.ok
        refs = parse_refs(granted.refs)
        new = np.frombuffer(granted.new, "<u4")
        save_rows(cache.pages, blocks[new], self._arena.rows, refs["slot"].astype(np.int64))
        self._worker.send(Commit(refs=granted.refs, bytes=len(names) * self._shape.row, micros=1))
        give_up = time.monotonic() + 20
        while self.lookup(names) != len(names):
            assert time.monotonic() < give_up, "saved chunks do not become hits"
        self._producer.send(Finish(request="save"))

    def load(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        found = self._consumer.lookup("load", None, names)
        assert found is not None
        slots = self._arena.slots_of(parse_refs(found.refs))
        assert slots is not None
        load_rows(cache.pages, blocks, self._arena.rows, slots)
        self._consumer.send(Finish(request="load"))

    def lookup(self, names: list[bytes]) -> int:
        found = self._consumer.lookup("look", None, names)
        assert found is not None
        self._consumer.send(Finish(request="look"))
        return found.states.count(protocol.HIT)

    def close(self) -> None:
        for client in (self._worker, self._producer, self._consumer):
            client.close()
        self._engine.__exit__()


class Redis:
    name = "redis"

    def __init__(self, shape: Shape, slots: int):
        import redis

        self._folder = tempfile.TemporaryDirectory(prefix="pf")
        path = f"{self._folder.name}/redis"
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", self._folder.name]
        server = os.environ.get("REDIS_SERVER", "redis-server")
        self._process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
        self._client = redis.Redis(unix_socket_path=path)
        give_up = time.monotonic() + 20
        while True:
            try:
                self._client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.02)
        self.name = f"redis {self._client.info()['redis_version']}, redis-py {redis.__version__}"
        self._shape = shape
        self._batch = max(1, BATCH_BYTES // shape.row)

    def save(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        for at in range(0, len(names), self._batch):
            part = slice(at, at + self._batch)
            values = np.empty((len(names[part]), self._shape.row), np.int8)
            save_rows(cache.pages, blocks[part], values, np.arange(len(values)))
            self._client.mset(dict(zip(names[part], map(memoryview, values), strict=True)))

    def load(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        for at in range(0, len(names), self._batch):
            part = slice(at, at + self._batch)
            for block, value in zip(blocks[part], self._client.mget(names[part]), strict=True):
                row = np.frombuffer(value, np.int8).reshape(1, -1)
                load_rows(cache.pages, np.array([block]), row, np.array([0]))

    def lookup(self, names: list[bytes]) -> int:
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        return sum(pipeline.execute())

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(30)
        self._folder.cleanup()


class LMCache:
    """LocalCPUBackend inside this process: no socket, no other client. The gather is the shim's: its own is CUDA."""

    name = "LMCache"

    def __init__(self, shape: Shape, slots: int):
        import lmcache
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.pin_monitor import PinMonitor
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        gib = (slots + 2) * shape.row / (1 << 30)
        config = LMCacheEngineConfig.from_defaults(chunk_size=16, local_cpu=True, max_local_cpu_size=gib)
        PinMonitor.GetOrCreate(config)
        # 2-byte elements: layers, K and V, tokens, heads, the rest.
        layout = (shape.layers, 2, 16, 1, shape.page // 64)
        metadata = LMCacheMetadata("benchmark", 1, 1, 0, 0, torch.bfloat16, layout)
        self._backend = LocalCPUBackend(config, metadata, dst_device="cpu")
        self._size = torch.Size((2, shape.layers, 16, shape.page // 64))
        self._format, self._dtype, self._key = MemoryFormat.KV_2LTD, torch.bfloat16, CacheEngineKey
        self._row = shape.row
        self.name = f"LMCache {getattr(lmcache, '__version__', '?')} LocalCPUBackend, in process"

    def _keys(self, names: list[bytes]) -> list:
        return [self._key("benchmark", 1, 0, int.from_bytes(name[:8], "little"), self._dtype) for name in names]

    def _bytes(self, chunk) -> np.ndarray:
        return chunk.raw_data.view(kv.torch.int8).numpy()[: self._row].reshape(1, -1)

    def save(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        for key, block in zip(self._keys(names), blocks, strict=True):
            chunk = self._backend.allocate(self._size, self._dtype, self._format)
            save_rows(cache.pages, np.array([block]), self._bytes(chunk), np.array([0]))
            self._backend.submit_put_task(key, chunk)
            chunk.ref_count_down()

    def load(self, cache: Cache, blocks: np.ndarray, names: list[bytes]) -> None:
        for key, block in zip(self._keys(names), blocks, strict=True):
            chunk = self._backend.get_blocking(key)
            load_rows(cache.pages, np.array([block]), self._bytes(chunk), np.array([0]))
            chunk.ref_count_down()

    def lookup(self, names: list[bytes]) -> int:
        keys = self._keys(names)
        found = sum(self._backend.contains(key, pin=True) for key in keys)
        for key in keys:
            self._backend.unpin(key)
        return found

    def close(self) -> None:
        self._backend.close()


def measure(kind: type, shape: Shape, size: int, rounds: int) -> str:
    count = max(2, size // shape.row)
    cache = Cache(shape, count + count // 4)
    expected = [page.tensor.clone() for page in cache.pages]
    blocks = pattern("scattered", count, cache.blocks)
    # pegaflow lets requests pin 80 % of its slots at most.
    store = kind(shape, count + count // 2)
    saves, loads = [], []
    try:
        for seed in range(WARM_UP + rounds):
            # pegaflow keeps what it has, so new keys evict the old ones; Redis overwrites.
            names = keys(seed if kind is Pegaflow else 0, count)
            saves.append(timed(lambda names=names: store.save(cache, blocks, names)))
            loads.append(timed(lambda names=names: store.load(cache, blocks, names)))
        assert all(np.array_equal(a.tensor, b) for a, b in zip(cache.pages, expected, strict=True)), "bytes were lost"
    finally:
        name = store.name
        store.close()
    gb = count * shape.row / 1e9
    return f"| {name} | {shape} | {gb / median(saves[WARM_UP:]):.2f} | {gb / median(loads[WARM_UP:]):.2f} |"


def look_up(kind: type, rounds: int) -> str:
    # LMCache allocates 4 KiB at least.
    shape = Shape("index only", 1, 4 << 10)
    cache = Cache(shape, LOOKED_UP)
    names = keys(1, LOOKED_UP)
    store = kind(shape, 2 * LOOKED_UP)
    try:
        store.save(cache, np.arange(LOOKED_UP), names)
        assert store.lookup(names) == LOOKED_UP
        took = [timed(lambda: store.lookup(names)) for _ in range(20 * rounds)]
    finally:
        name = store.name
        store.close()
    return f"| {name} | {median(took) * 1e3:.2f} |"


def peers() -> list[type]:
    return [Pegaflow, Redis] + ([LMCache] if importlib.util.find_spec("lmcache") else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| store | row | save GB/s | load GB/s |\n|---|---|---|---|")
    for shape in (kv.WIDE, kv.NARROW):
        for kind in peers():
            print(measure(kind, shape, arguments.mib << 20, arguments.rounds), flush=True)
    print(f"\n| store | lookup of {LOOKED_UP}, ms |\n|---|---|")
    for kind in peers():
        print(look_up(kind, arguments.rounds), flush=True)


if __name__ == "__main__":
    kv.torch.set_num_threads(1)
    main()
