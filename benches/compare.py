"""Cold start and TTFT/TPOT/ITL of several topologies under the same open-loop load, on real vLLM.

    target/test-venv/bin/python benches/compare.py configs/1p1d-cpu.toml configs/unified2-cpu.toml

Each topology is started in turn, warmed up, and given the same prompts at the same Poisson arrivals (same seed).
Prints a Markdown table. TTFT: request sent to first token. ITL: between two tokens. TPOT: (last token - first token)
/ (tokens - 1).
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import httpx

BINARY = os.environ.get("PEGAFLOW_BIN", "target/release/pegaflow")


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Fleet:
    """One `pegaflow up`, from start to ready to stopped."""

    def __init__(self, topology, environment=None):
        self.topology = topology
        self.environment = os.environ | (environment or {})
        with open(topology, "rb") as file:
            config = tomllib.load(file)
        self.base = "http://" + config.get("router", {}).get("listen", "127.0.0.1:8000")

    def __enter__(self):
        started = time.monotonic()
        self.process = subprocess.Popen(
            [BINARY, "up", self.topology], stdout=subprocess.PIPE, env=self.environment, text=True
        )
        for line in self.process.stdout:
            if "pegaflow is ready" in line:
                break
        else:
            raise SystemExit(f"{self.topology} did not become ready")
        self.ready_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


async def one(client, base, model, prompt, tokens):
    """Times of the tokens of one request, relative to its start."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    started, times = time.monotonic(), []
    async with client.stream("POST", base + "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if '"error"' in line[:20]:
                    raise RuntimeError(line)
                times.append(time.monotonic() - started)
    return times


async def load(base, args):
    dice = random.Random(args.seed)
    prompts = [[dice.randrange(300, 2000) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
    gaps = [dice.expovariate(args.rate) for _ in range(args.requests)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        models = (await client.get(base + "/v1/models")).json()
        model = models["data"][0]["id"]
        for _ in range(3):
            warm_up = [dice.randrange(300, 2000) for _ in range(args.prompt_tokens)]
            await asyncio.gather(*(one(client, base, model, warm_up, 8) for _ in range(2)))
        tasks = []
        for prompt, gap in zip(prompts, gaps, strict=True):
            await asyncio.sleep(gap)
            request = one(client, base, model, prompt, args.output_tokens)
            tasks.append(asyncio.create_task(request))
        return await asyncio.gather(*tasks, return_exceptions=True)


def cold_start(topology):
    """Start to ready with nothing in the caches (vLLM downloaded, model generated), then with everything in them."""
    with tempfile.TemporaryDirectory() as empty:
        caches = {"PEGAFLOW_CACHE_DIR": f"{empty}/pegaflow", "UV_CACHE_DIR": f"{empty}/uv", "PIP_NO_CACHE_DIR": "1"}
        print("| start of " + os.path.basename(topology) + " | seconds to ready |\n|---|---|")
        for name in ("fresh machine: install vLLM, generate the model", "cached", "cached, again"):
            with Fleet(topology, caches) as fleet:
                print(f"| {name} | {fleet.ready_seconds:.1f} |", flush=True)
    print()


def report(name, ready, results):
    good = [times for times in results if isinstance(times, list) and len(times) > 1]
    ttft = [times[0] * 1e3 for times in good]
    itl = [(b - a) * 1e3 for times in good for a, b in itertools.pairwise(times)]
    tpot = [(times[-1] - times[0]) / (len(times) - 1) * 1e3 for times in good]
    cells = [
        name,
        f"{ready:.1f}",
        f"{statistics.mean(ttft):.0f}",
        f"{percentile(ttft, 0.99):.0f}",
        f"{statistics.mean(tpot):.1f}",
        f"{percentile(tpot, 0.99):.1f}",
        f"{percentile(itl, 0.5):.1f}",
        f"{percentile(itl, 0.99):.1f}",
        f"{max(itl):.0f}",
        str(len(results) - len(good)),
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topologies", nargs="+")
    parser.add_argument("--rate", type=float, default=1.2, help="requests per second")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="measure starts of the first topology before the load")
    args = parser.parse_args()
    if args.cold:
        cold_start(args.topologies[0])
    print(
        f"{args.requests} requests, {args.prompt_tokens} prompt tokens, "
        f"{args.output_tokens} output tokens, Poisson {args.rate}/s, seed {args.seed}\n"
    )
    print(
        "| topology | start to ready s | TTFT mean ms | TTFT p99 | TPOT mean | TPOT p99 "
        "| ITL p50 | ITL p99 | ITL max | failed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for _ in range(args.rounds):
        for topology in args.topologies:
            with Fleet(topology) as fleet:
                results = asyncio.run(load(fleet.base, args))
            print(report(os.path.basename(topology), fleet.ready_seconds, results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
