"""Other shapes of a fleet on real vLLM: tensor parallel over two ranks, and two prefill with two decode nodes.

Each is compared, bit by bit, with an independent node of the same kind that has no connector.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import machine
from beside import LENGTHS, check, compared, edited, loaded, names
from conftest import own_workers
from prompts import BLOCK, MAX_TOKENS, ask, full_chunks, prompt


def tp2(text: str) -> str:
    text = own_workers(text)
    assert text.count('kv_cache = "1GiB"') == 2
    return text.replace('kv_cache = "1GiB"', 'tensor_parallel = 2\nkv_cache = "1GiB"')


def two_of_each(text: str) -> str:
    names = ['name = "prefill"\n', 'name = "decode"\n']
    assert all(text.count(name) == 1 for name in names)
    for name in names:
        text = text.replace(name, f"{name}count = 2\n")
    return text


def test_two_ranks_a_node_are_bit_exact(tmp_path: Path):
    for fleet, reference, model in compared(edited(tmp_path, "tp2", tp2), tmp_path):
        for role in ("prefill", "decode"):
            tree = machine.tree(fleet.node(role)["pid"])
            workers = [pid for pid in tree if machine.argv(pid)[0].startswith("VLLM::Worker")]
            assert len(workers) == 2, machine.describe(tree)
        prompts = [prompt(41, length) for length in LENGTHS]
        chunks = sum(map(full_chunks, prompts))
        expected = [ask(reference.url, ids, model=model) for ids in prompts]
        saved = fleet.metric("pegaflow_engine_saved_chunks_total")
        before = loaded(fleet)
        answers = [ask(fleet.url, ids, model=model) for ids in prompts]
        check(answers, expected, prompts)
        assert loaded(fleet)["decode"] - before["decode"] == chunks * BLOCK
        # Each rank wrote its part of each row.
        assert fleet.metric("pegaflow_engine_saved_chunks_total") - saved == 2 * chunks


@pytest.mark.soak
def test_two_of_each_are_bit_exact_and_all_take_part(tmp_path: Path):
    for fleet, reference, model in compared(edited(tmp_path, "2p2d", two_of_each), tmp_path):
        prompts = [prompt(42 + turn, length) for turn in range(3) for length in LENGTHS]
        expected = [ask(reference.url, ids, model=model) for ids in prompts]
        before = loaded(fleet)
        prefilled = {name: fleet.node_metric(name, "vllm:prompt_tokens_total") for name in names(fleet, "prefill")}
        # One after the other: in a batch with others, a prompt may round otherwise on a plain node, too.
        answers = [ask(fleet.url, ids, model=model) for ids in prompts]
        check(answers, expected, prompts)
        got = {name: tokens - before[name] for name, tokens in loaded(fleet).items()}
        assert sum(got.values()) == sum(map(full_chunks, prompts)) * BLOCK
        assert len(got) == 2
        assert all(got.values()), got
        for name, tokens in prefilled.items():
            assert fleet.node_metric(name, "vllm:prompt_tokens_total") > tokens, f"{name} did nothing"
        # At once: nothing is lost.
        fresh = [prompt(91 + turn, length) for turn in range(3) for length in LENGTHS]
        asking = partial(ask, fleet.url, model=model)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(asking, fresh))
        assert {len(answer.tokens) for answer in together} == {MAX_TOKENS}
        assert len({answer.tokens for answer in together}) == len(fresh), "answers were mixed up"
