"""KV that all ranks have alike (MLA under tensor parallelism) is stored once.

vLLM says which KV that is; no model of that kind runs without a GPU, so the tests say it in its place.
"""

import dataclasses

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector

from node import BLOCK, PROMPT, hand_off, prompt
from pegaflow_vllm.protocol import Commit, Damaged, Hello, Loaded

RANKS = 2


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    stock = offloading_connector.build_offloading_config

    def build(*args, **kwargs):
        config = stock(*args, **kwargs)
        return dataclasses.replace(config, **changes)

    changes = {"replicated_layout": True}
    monkeypatch.setattr(offloading_connector, "build_offloading_config", build)
    return changes


def test_rank_0_stores_it_and_every_rank_loads_it(engine, make, expected):
    p, d = make("p0", ranks=RANKS), make("d0", ranks=RANKS)
    assert hand_off(p, d, engine, PROMPT, "h1") == expected(PROMPT)
    assert all(hello.replicated and hello.world == RANKS for hello in engine.of(Hello)[:6])
    (space,) = [space for space in engine.spaces if space.row_bytes]
    assert space.stride == space.row_bytes
    # One commit of five chunks, two loads.
    (commit,) = engine.of(Commit)
    assert len(commit.refs) == 5 * 8
    loads = engine.wait_for(Loaded, RANKS)
    assert [(loaded.chunks, loaded.failed) for loaded in loads] == [(5, 0)] * RANKS


def test_each_rank_loads_what_is_in_the_store(engine, make, expected):
    p, d = make("p0", ranks=RANKS), make("d0", ranks=RANKS)
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    space = engine.spaces[0]
    space.arena[space.header_bytes : space.header_bytes + 64] = bytes(64)
    # The ranks agree, or the node would say so, and are wrong together.
    assert d.ask("d", PROMPT, 4, handoff="h1", leg="decode") != expected(PROMPT)


def test_a_damaged_row_is_damaged_for_every_rank(engine, make, expected):
    engine.verify = True
    p, d = make("p0", ranks=RANKS), make("d0", ranks=RANKS)
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    engine.wait_for(Commit)
    space = engine.spaces[0]
    space.row(min(chunk.slot for chunk in space.chunks.values()))[:64] ^= 0x10
    assert d.ask("d", PROMPT, 4, handoff="h1", leg="decode") == expected(PROMPT)
    assert len(engine.wait_for(Damaged, RANKS)) == RANKS
    assert d.failed == ["d"]


def test_prompts_under_way_together_end(engine, make, expected):
    p = make("p0", batch=2 * BLOCK, ranks=RANKS)
    prompts = {f"p{n}": prompt(n, (n + 2) * BLOCK + n) for n in range(4)}
    for name, ids in prompts.items():
        p.add(name, ids, handoff=name, leg="prefill")
    for name, ids in prompts.items():
        assert p.finish(name) == expected(ids, 1)


@pytest.mark.parametrize("config", [{"replicated_layout": False}, {"canonical_layout": True}])
def test_without_it_every_rank_stores_its_own(engine, make, expected, alike, config):
    alike.clear()
    alike.update(config)
    p, d = make("p0", ranks=RANKS), make("d0", ranks=RANKS)
    p.ask("p", PROMPT, handoff="h1", leg="prefill")
    assert len(engine.wait_for(Commit, RANKS)) == RANKS
    assert d.ask("d", PROMPT, 4, handoff="h1", leg="decode") == expected(PROMPT)
    assert not any(hello.replicated for hello in engine.of(Hello))
