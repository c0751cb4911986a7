"""A variant of the shipped CPU topology beside an independent node of the same kind that has no connector."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from conftest import served_model, serving, topology
from pegaflow import Fleet, Reference
from prompts import ROUNDING, Exact

HITS = "vllm:external_prefix_cache_hits_total"
# On and around chunk boundaries.
LENGTHS = [31, 32, 33, 64, 65, 100, 320, 321, 900, 1500]


def edited(folder: Path, name: str, edit: Callable[[str], str]) -> Fleet:
    file, url = topology(folder, name, {'capacity = "1GiB"': 'capacity = "256MiB"'})
    file.write_text(edit(file.read_text()))
    return Fleet(file, url, folder)


def compared(fleet: Fleet, folder: Path) -> Iterator[tuple[Fleet, Reference, str]]:
    reference = None
    for up in serving(fleet):
        decode = next(name for name in names(up, "decode"))
        reference = Reference(up, folder, like=decode)
        try:
            reference.wait()
            yield up, reference, served_model(up)
        finally:
            reference.close()


def names(fleet: Fleet, role: str) -> list[str]:
    nodes = httpx.get(f"{fleet.url}/status", timeout=30).json()["fleet"]["nodes"]
    return sorted(name for name, node in nodes.items() if node["role"] == role)


def loaded(fleet: Fleet) -> dict[str, float]:
    """Tokens that each decode node found in the store."""
    return {name: fleet.node_metric(name, HITS) for name in names(fleet, "decode")}


def check(answers: list[Exact], expected: list[Exact], prompts: list[list[int]]) -> None:
    apart = {len(ids): one.difference(other) for ids, one, other in zip(prompts, answers, expected, strict=True)}
    print("difference by prompt length:", apart)
    assert max(apart.values()) <= ROUNDING
    assert all(len(set(answer.tokens)) >= 20 for answer in answers), "repetitive output proves nothing"
