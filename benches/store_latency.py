"""What a call of the store costs the shim, through the socket of a real engine.

    cargo build --release --example store-engine
    INTERPRETER benches/store_latency.py [--seconds 10]

First one client alone: lookup+pin of a prefix that is all hits, with the parts of it that can be had alone. Then
1,000 lookups a second (open loop: a call that starts late because the one before it was slow counts from when it
was due), alone and beside another process that saves 2 GB/s as a worker does. Prints one JSON object a line.
"""

import argparse
import json
import select
import subprocess
import sys
import time

import kv
import numpy as np
from kv import WIDE, Cache, Engine, Shape, join, keys, median, pattern, percentile, timed
from pegaflow_vllm import protocol
from pegaflow_vllm.arena import Arena, parse_refs
from pegaflow_vllm.client import Client
from pegaflow_vllm.copy import save_rows
from pegaflow_vllm.protocol import Commit, Finish, Found, Lookup

THIN = Shape("index only", 1, 1 << 10)
SLOTS = 400
BATCH = 8
"""Chunks that one save brings."""


def fill(engine: Engine, names: list[bytes]) -> tuple[Client, Client]:
    """Makes chunks ready whose bytes are nobody's concern; answers with their owner's sessions."""
    worker, scheduler = engine.join("p", "worker"), engine.join("p", "scheduler")
    granted = scheduler.store("fill", None, names)
    assert granted is not None, "no answer"
    assert granted.ok, "the arena is too small"
    worker.send(Commit(refs=granted.refs, bytes=0, micros=1))
    while lookup(scheduler, "fill", names).states.count(protocol.PENDING):
        pass
    scheduler.send(Finish(request="fill"))
    return worker, scheduler


def lookup(client: Client, request: str, names: list[bytes]) -> Found:
    found = client.lookup(request, None, names)
    assert found is not None, "no answer"
    return found


def close(*clients: Client) -> None:
    for client in clients:
        client.close()


def line(name: str, seconds: list[float], **more: object) -> None:
    figures = {
        "name": name,
        "samples": len(seconds),
        "p50_us": round(median(seconds) * 1e6),
        "p99_us": round(percentile(seconds, 0.99) * 1e6),
        "max_us": round(max(seconds) * 1e6),
    }
    print(json.dumps(figures | more), flush=True)


def one_client(count: int, rounds: int) -> None:
    names = keys(1, count)
    with Engine(THIN, 2 * count) as engine:
        owner = fill(engine, names)
        client = engine.join("d", "scheduler")
        seconds = []
        for _ in range(rounds):
            seconds.append(timed(lambda: lookup(client, "r", names)))
            client.send(Finish(request="r"))
            lookup(client, "s", names[:1])  # answered after `finish` has been handled
        found = lookup(client, "r", names)
        assert found.states == bytes([protocol.HIT]) * count
        close(*owner, client)
    line(f"python: lookup+pin of {count}", seconds[rounds // 10 :])

    def encode() -> bytes:
        joined, size = protocol.join_keys(names)
        return protocol.frame(Lookup(seq=1, request="r", handoff=None, keys=joined, key_len=size))

    body = protocol.frame(found)[protocol.LENGTH.size :]

    def book() -> None:
        dict(zip(names, range(len(names)), strict=True))

    parts = {"encode": encode, "decode": lambda: protocol.decode_answer(body), "the manager's tables": book}
    for name, work in parts.items():
        line(f"python: of it, {name}", [timed(work) for _ in range(rounds)])


def beside_saves(count: int, rate: float, seconds: float) -> None:
    names = keys(1, count)
    with Engine(WIDE, SLOTS) as engine:
        owner = fill(engine, names)
        client = engine.join("d", "scheduler")
        saver = None
        if rate:
            command = [sys.executable, __file__, "--saver", engine.socket, str(rate)]
            saver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert saver.stdout is not None
            saver.stdout.readline()
        took = []
        due = time.perf_counter()
        end = due + seconds
        while due < end:
            early = due - time.perf_counter()
            if early > 0:
                time.sleep(early)
            started = time.perf_counter() if early > 0 else due
            lookup(client, "r", names)
            took.append(time.perf_counter() - started)
            client.send(Finish(request="r"))
            due += 1e-3
        saved = float(saver.communicate()[0]) if saver is not None else 0.0
        close(*owner, client)
    line(f"python: lookup of {count}, 1000/s", took, saves_gb_s=round(saved, 2))


def save_until_closed(socket: str, rate: float) -> None:
    """The saver process: whole chunks through the shim's own copy until standard input ends."""
    worker, scheduler = join(socket, WIDE, "s", "worker"), join(socket, WIDE, "s", "scheduler")
    session = worker.session
    assert session is not None
    assert session.arena is not None
    arena = Arena(session.arena, session.welcome, WIDE.row)
    arena.rows[:] = 0  # the first touch of memory is not what is measured
    cache = Cache(WIDE, 64)
    print("ready", flush=True)
    saved, started = 0, time.perf_counter()
    due, seed = started, 1000
    while not select.select([sys.stdin], [], [], 0)[0]:
        seed += 1
        granted = scheduler.store("save", None, keys(seed, BATCH))
        assert granted is not None, "no answer"
        assert granted.ok, "saves found no room"
        refs = parse_refs(granted.refs)
        blocks = (pattern("contiguous", BATCH, BATCH) + seed * BATCH) % cache.blocks
        save_rows(cache.pages, blocks, arena.rows, refs["slot"].astype(np.int64))
        worker.send(Commit(refs=granted.refs, bytes=BATCH * WIDE.row, micros=1))
        scheduler.send(Finish(request="save"))
        saved += BATCH * WIDE.row
        pause = BATCH * WIDE.row / rate
        due = max(due + pause, time.perf_counter() - pause)
        time.sleep(max(0.0, due - time.perf_counter()))
    print(saved / (time.perf_counter() - started) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--saver", nargs=2, metavar=("SOCKET", "BYTES_PER_SECOND"))
    arguments = parser.parse_args()
    if arguments.saver:
        save_until_closed(arguments.saver[0], float(arguments.saver[1]))
        return
    for count in (64, 512, 2048):
        one_client(count, 400)
    for rate in (0.0, 2e9):
        beside_saves(256, rate, arguments.seconds)


if __name__ == "__main__":
    kv.torch.set_num_threads(1)
    main()
