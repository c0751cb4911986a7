"""One fleet on one GPU: a hand-off's answer has the bits of the decode node's own, at many lengths of prompt.

    TOPOLOGY=target/gpu/shared.toml PEGAFLOW_BIN=target/release/pegaflow INTERPRETER tests/gpu/fleet.py

The decode node computes each prompt a second time under a salt of its own, so that it finds nothing in any cache.
The standard library is enough: the machine may have no network.
"""

import json
import os
import random
import subprocess
import sys
import urllib.request

URL = "http://127.0.0.1:8000"
NAME = "gpu-check"
LENGTHS = [1, 15, 16, 17, 33, 100, 512, 1000, 2049, 4000]
TOKENS = 32
HITS = "vllm:external_prefix_cache_hits_total"


def pegaflow(*args: str) -> None:
    subprocess.run([os.environ["PEGAFLOW_BIN"], *args], check=True)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return reply.read().decode()


def ask(url: str, ids: list[int], model: str, key: str = "", **extra: object) -> tuple:
    body = {
        "model": model,
        "prompt": ids,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        **extra,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        choice = json.load(reply)["choices"][0]
    return tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])


def hits() -> float:
    lines = get(f"{URL}/metrics/all").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(HITS) and 'node="decode"' in line)


def main() -> int:
    pegaflow("up", "--detach", os.environ["TOPOLOGY"], "--set", f'name="{NAME}"')
    try:
        node = json.loads(get(f"{URL}/status"))["fleet"]["nodes"]["decode"]
        with open(f"/proc/{node['pid']}/environ", "rb") as file:
            key = next(
                item.partition(b"=")[2].decode()
                for item in file.read().split(b"\0")
                if item.startswith(b"VLLM_API_KEY=")
            )
        model = json.loads(get(f"{URL}/v1/models"))["data"][0]["id"]
        wrong = 0
        for length in LENGTHS:
            rng = random.Random(length)
            ids = [rng.randrange(300, 2000) for _ in range(length)]
            before = hits()
            answer = ask(URL, ids, model)
            loaded = hits() - before
            alone = ask(f"http://{node['addr']}", ids, model, key, cache_salt=f"alone-{length}")
            same_tokens = answer[0] == alone[0]
            apart = max(abs(a - b) for a, b in zip(answer[1], alone[1], strict=True)) if same_tokens else None
            # Prompts of one block or less have nothing to load.
            fine = same_tokens and apart == 0.0 and (loaded > 0 or length <= 16)
            wrong += not fine
            print(json.dumps({"length": length, "ok": fine, "loaded": loaded, "tokens": same_tokens, "apart": apart}))
        return 1 if wrong else 0
    finally:
        pegaflow("down", NAME)


if __name__ == "__main__":
    sys.exit(main())
