"""What saving generated tokens buys on a chat of several turns, on real vLLM.

    target/test-venv/bin/python benches/multi_turn.py configs/1p1d-cpu.toml

Starts the topology without and with `[kv] save_decoded`, and holds the same conversations with both: every turn's
prompt is all that was said before, in token ids, and some new tokens. Prints a Markdown table per turn: TTFT, and
for each node the prompt tokens that it had in its own cache, loaded from the store, and computed. Then how many
answers are the same token by token. vLLM on CPU need not agree with itself to the last bit when a prompt is
computed in other pieces, so answers that differ are counted, with the log probability where they part.
"""

import argparse
import json
import random
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from compare import Fleet

VOCABULARY = range(300, 2000)
NODES = ("prefill", "decode")
LOCAL, LOADED = "vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total"
PROMPT = "vllm:prompt_tokens_total"


@dataclass
class Turn:
    ttft: float
    tokens: list[int]
    logprobs: list[float]
    work: dict[str, dict[str, float]] = field(default_factory=dict)


def topology(source: Path, folder: Path, save: bool) -> str:
    """A copy that listens at a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = source.read_text()
    for old, new in {
        "[kv]": f"[kv]\nsave_decoded = {str(save).lower()}",
        'listen = "127.0.0.1:8000"': f'listen = "127.0.0.1:{port}"',
    }.items():
        if text.count(old) != 1:
            raise SystemExit(f"{source} must have one line {old!r}")
        text = text.replace(old, new)
    file = folder / f"multi-turn-{save}.toml"
    file.write_text(text)
    return str(file)


def figures(client: httpx.Client, addresses: dict[str, str]) -> dict[str, dict[str, float]]:
    found = {}
    for node, address in addresses.items():
        lines = client.get(f"http://{address}/metrics").text.splitlines()
        found[node] = {
            name: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))
            for name in (PROMPT, LOCAL, LOADED)
        }
    return found


def settled(client: httpx.Client, addresses: dict[str, str]) -> dict[str, dict[str, float]]:
    """Figures that have stopped moving: they are published a moment after the answer."""
    last = figures(client, addresses)
    for _ in range(20):
        time.sleep(0.3)
        now = figures(client, addresses)
        if now == last:
            return now
        last = now
    return last


def ask(client: httpx.Client, base: str, model: str, prompt: list[int], tokens: int) -> Turn:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    started, turn = time.monotonic(), Turn(0.0, [], [])
    with client.stream("POST", base + "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"the answer broke off: {event['error']}")
            for choice in event["choices"]:
                turn.ttft = turn.ttft or time.monotonic() - started
                turn.tokens += choice.get("token_ids") or []
                turn.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
    return turn


def converse(file: str, args: argparse.Namespace) -> list[list[Turn]]:
    with Fleet(file) as fleet, httpx.Client(timeout=120) as client:
        model = client.get(fleet.base + "/v1/models").json()["data"][0]["id"]
        nodes = client.get(fleet.base + "/status").json()["fleet"]["nodes"]
        addresses = {name: nodes[name]["addr"] for name in NODES}
        rng = random.Random(args.seed)

        def said(count: int) -> list[int]:
            return [rng.choice(VOCABULARY) for _ in range(count)]

        ask(client, fleet.base, model, said(args.first), 8)
        conversations = []
        for _ in range(args.conversations):
            history, turns = [], []
            for number in range(args.turns):
                history += said(args.first if number == 0 else args.new)
                before = settled(client, addresses)
                turn = ask(client, fleet.base, model, history, args.answer)
                after = settled(client, addresses)
                turn.work = {
                    node: {name: after[node][name] - before[node][name] for name in after[node]} for node in NODES
                }
                history += turn.tokens
                turns.append(turn)
            conversations.append(turns)
        return conversations


def table(title: str, conversations: list[list[Turn]]) -> None:
    print(f"\n{title}\n")
    head = ["turn", "prompt", "TTFT ms (median)"]
    head += [f"{node}: {what}" for node in NODES for what in ("own cache", "store", "computed")]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for number, turns in enumerate(zip(*conversations, strict=True), 1):
        row: list[object] = [number, round(turns[0].work["prefill"][PROMPT])]
        row.append(round(1000 * statistics.median(turn.ttft for turn in turns)))
        for node in NODES:
            mean = {name: statistics.mean(turn.work[node][name] for turn in turns) for name in (PROMPT, LOCAL, LOADED)}
            row += [round(mean[LOCAL]), round(mean[LOADED]), round(mean[PROMPT] - mean[LOCAL] - mean[LOADED])]
        print("| " + " | ".join(map(str, row)) + " |")


def compare(without: list[list[Turn]], saved: list[list[Turn]]) -> None:
    equal = total = 0
    widest = 0.0
    for one, other in zip(without, saved, strict=True):
        for number, (left, right) in enumerate(zip(one, other, strict=True), 1):
            total += 1
            if left.tokens != right.tokens:
                pairs = enumerate(zip(left.tokens, right.tokens, strict=True))
                at = next(index for index, (a, b) in pairs if a != b)
                print(f"turn {number} parts at token {at}: {left.logprobs[at]:.4f} against {right.logprobs[at]:.4f}")
                # What is said after it is another conversation.
                total += len(one) - number
                break
            equal += 1
            widest = max(widest, *(abs(a - b) for a, b in zip(left.logprobs, right.logprobs, strict=True)))
    print(f"\n{equal} of {total} answers are the same; log probabilities of these differ by at most {widest:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", type=Path)
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--first", type=int, default=330, help="tokens of the first prompt")
    parser.add_argument("--new", type=int, default=40, help="tokens that each later turn adds")
    parser.add_argument("--answer", type=int, default=160, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for save in (False, True):
            results[save] = converse(topology(args.topology, Path(folder), save), args)
            table(f"save_decoded = {str(save).lower()}", results[save])
    compare(results[False], results[True])


if __name__ == "__main__":
    main()
