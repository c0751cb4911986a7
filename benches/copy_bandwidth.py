"""How fast the shim copies KV between a cache and the arena, beside a plain memcpy of the same bytes.

    INTERPRETER benches/copy_bandwidth.py [--mib 256] [--rounds 7] [--json FILE]

INTERPRETER is the one that `pegaflow prepare TOPOLOGY` prints: NumPy and torch of the runtime that will do it.
Each round measures, one after another: np.copyto between two plain buffers, np.copyto into and out of the arena's
memfd, save_rows, load_rows; all of it memory that was touched before. The ratios are medians over rounds of
(copy / memcpy of the same round), so a noisy neighbour hits both. One thread. "First touch" is the save into a
memfd whose pages do not exist yet: that is the kernel clearing pages, not copying.
"""

import argparse
import json

import kv
import numpy as np
import torch
from kv import Cache, Shape, median, own_arena, pattern, timed
from pegaflow_vllm.copy import load_rows, save_rows

SHAPES = [
    kv.WIDE,
    Shape("one tensor over all layers", 1, 36 * (64 << 10)),
    Shape("2 MiB row, small pages", 64, 32 << 10),
    Shape("64 KiB row", 4, 16 << 10),
    kv.NARROW,
]
PATTERNS = ["contiguous", "reversed", "scattered"]


def measure(shape: Shape, order: str, size: int, rounds: int) -> dict[str, object]:
    count = max(2, size // shape.row)
    places = count + count // 4
    cache = Cache(shape, places)
    arena = own_arena(shape, places)
    # One of the two lists is enough to break every run.
    blocks = pattern("scattered" if order == "scattered" else "contiguous", count, places)
    slots = pattern(order, count, places)
    copied = count * shape.row

    first = timed(lambda: save_rows(cache.pages, blocks, arena.rows, slots))
    check(cache, blocks, arena.rows, slots)
    arena.rows[:] = 0
    source, target = np.ones(copied, np.int8), np.ones(copied, np.int8)
    inside = arena.rows.reshape(-1)[:copied]
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", "into", "out", "save", "load")}
    for _ in range(rounds + 1):
        seconds["plain"].append(timed(lambda: np.copyto(target, source)))
        seconds["into"].append(timed(lambda: np.copyto(inside, source)))
        seconds["out"].append(timed(lambda: np.copyto(source, inside)))
        seconds["save"].append(timed(lambda: save_rows(cache.pages, blocks, arena.rows, slots)))
        seconds["load"].append(timed(lambda: load_rows(cache.pages, blocks, arena.rows, slots)))
    check(cache, blocks, arena.rows, slots)

    def share(of: str, beside: str) -> float:
        # The first round warms up.
        return median([b / a for a, b in zip(seconds[of][1:], seconds[beside][1:], strict=True)])

    result: dict[str, object] = {"shape": str(shape), "row_bytes": shape.row, "order": order, "bytes": copied}
    result.update({f"{name}_gb_s": copied / median(times[1:]) / 1e9 for name, times in seconds.items()})
    result["first_touch_gb_s"] = copied / first / 1e9
    result["save_of_plain"], result["load_of_plain"] = share("save", "plain"), share("load", "plain")
    result["save_of_memfd"], result["load_of_memfd"] = share("save", "into"), share("load", "out")
    return result


def check(cache: Cache, blocks: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
    for page in cache.pages:
        cells = rows[slots, page.start : page.start + page.size]
        assert np.array_equal(cells, page.tensor.numpy()[blocks]), "the copy is wrong"


def table(results: list[dict[str, object]]) -> str:
    lines = [
        "| row | pages | block order | memcpy GB/s | into / out of memfd "
        "| save GB/s | of memcpy | of memfd | load GB/s | of memcpy | of memfd | first touch GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            "| {row} KiB | {shape} | {order} | {plain_gb_s:.1f} | {into_gb_s:.1f} / {out_gb_s:.1f} | {save_gb_s:.1f} "
            "| {save_of_plain:.0%} | {save_of_memfd:.0%} | {load_gb_s:.1f} | {load_of_plain:.0%} | {load_of_memfd:.0%} "
            "| {first_touch_gb_s:.1f} |".format(row=int(str(r["row_bytes"])) >> 10, **r)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=argparse.FileType("w"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(shape, order, arguments.mib << 20, arguments.rounds) for shape in SHAPES for order in PATTERNS]
    print(table(results))
    if arguments.json:
        json.dump(results, arguments.json)


if __name__ == "__main__":
    main()
