"""What `[kv] verify` adds to a save and a load: the checksum of every row, beside the copy of the same rows.

    INTERPRETER benches/checksums.py [--mib 128] [--rounds 9]

INTERPRETER is the one that `pegaflow prepare TOPOLOGY` prints. Each round measures, one after another, on the same
scattered blocks: save_rows, load_rows, row_sums natively, and row_sums with zlib. One thread. GB/s are medians; a
share is the median over rounds of (copy / (copy + checksum) of the same round): the speed that is left.
"""

import argparse

import kv
import numpy as np
from kv import Cache, Shape, median, own_arena, pattern, timed
from pegaflow_vllm import copy
from pegaflow_vllm.checksum import row_sums
from pegaflow_vllm.copy import load_rows, save_rows


def with_zlib(rows: np.ndarray, slots: np.ndarray, size: int) -> None:
    library, copy.native = copy.native, None
    try:
        row_sums(rows, slots, size)
    finally:
        copy.native = library


def line(shape: Shape, size: int, rounds: int) -> str:
    count = max(2, size // shape.row)
    cache, arena = Cache(shape, count), own_arena(shape, count)
    blocks, slots = pattern("scattered", count, count), pattern("contiguous", count, count)
    work = {
        "save": lambda: save_rows(cache.pages, blocks, arena.rows, slots),
        "load": lambda: load_rows(cache.pages, blocks, arena.rows, slots),
        "native": lambda: row_sums(arena.rows, slots, shape.row),
        "zlib": lambda: with_zlib(arena.rows, slots, shape.row),
    }
    # The first round warms up.
    seconds = [{name: timed(one) for name, one in work.items()} for _ in range(rounds + 1)][1:]
    speed = {name: count * shape.row / median([times[name] for times in seconds]) / 1e9 for name in work}
    left = {
        name: median([times[name] / (times[name] + times["native"]) for times in seconds]) for name in ("save", "load")
    }
    return (
        f"| {shape} | {speed['save']:.1f} | {speed['load']:.1f} | {speed['native']:.1f} | {speed['zlib']:.1f} | "
        f"{left['save']:.0%} | {left['load']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="bytes a round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print("| row | save GB/s | load GB/s | checksum GB/s | zlib's GB/s | save, of before | load, of before |")
    print("|---|---|---|---|---|---|---|")
    for shape in (kv.WIDE, Shape("64 KiB row", 4, 16 << 10), kv.NARROW):
        print(line(shape, args.mib << 20, args.rounds), flush=True)


if __name__ == "__main__":
    main()
