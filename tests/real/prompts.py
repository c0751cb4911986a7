"""Prompts of token ids, and what a node answers to them bit by bit."""

import random
from dataclasses import dataclass
from pathlib import Path

import httpx

BLOCK = 32
MAX_TOKENS = 32
# How far logprobs of equal tokens may be apart. On processors with AMX a plain vLLM differs from itself when it finds
# a prompt's full chunks in its own prefix cache (docs/reliability.md, "Equal bits"); elsewhere it never does.
ROUNDING = 0.05 if " amx_bf16" in Path("/proc/cpuinfo").read_text() else 0.0
VOCABULARY = range(300, 2000)


def prompt(seed: int, length: int) -> list[int]:
    """Its own from the first token on, so that no prefix is shared by chance."""
    rng = random.Random(seed * 100_003 + length)
    return [rng.choice(VOCABULARY) for _ in range(length)]


def full_chunks(ids: list[int]) -> int:
    return len(ids) // BLOCK


@dataclass(frozen=True)
class Exact:
    """An answer as exact as the API tells it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def difference(self, other: "Exact") -> float:
        """The largest distance between logprobs; infinite where the tokens differ."""
        if self.tokens != other.tokens or len(self.logprobs) != len(other.logprobs):
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))

    def departure(self, other: "Exact") -> tuple[int, float]:
        """How many tokens are equal, and the largest distance between logprobs up to the first that is not, that one
        included: small where two tokens were about as likely, which a batch's rounding decides. What follows are two
        texts."""
        assert len(self.tokens) == len(other.tokens)
        pairs = list(zip(self.tokens, other.tokens, strict=True))
        equal = next((at for at, (one, another) in enumerate(pairs) if one != another), len(pairs))
        upto = slice(0, equal + 1)
        apart = [abs(a - b) for a, b in zip(self.logprobs[upto], other.logprobs[upto], strict=True)]
        return equal, max(apart)


class NodeUrl(str):
    """Where one node of a fleet listens, and the key that it wants to be shown."""

    key: str

    @classmethod
    def of(cls, node: dict) -> "NodeUrl":
        url = cls(f"http://{node['addr']}")
        environment = Path(f"/proc/{node['pid']}/environ").read_bytes().split(b"\0")
        url.key = next(item for item in environment if item.startswith(b"VLLM_API_KEY=")).decode().partition("=")[2]
        return url


def ask(url: str, ids: list[int], *, model: str, **extra: object) -> Exact:
    body = {
        "model": model,
        "prompt": ids,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    } | extra
    headers = {"Authorization": f"Bearer {url.key}"} if isinstance(url, NodeUrl) else {}
    reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return Exact(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))


def leg(handoff: str, which: str) -> dict:
    """What the router writes into one leg of a hand-off."""
    return {"kv_transfer_params": {"pegaflow": {"handoff": handoff, "leg": which}}}
