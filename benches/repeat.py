"""What a prompt costs the first time and when the store already holds it, on an idle fleet.

    target/test-venv/bin/python benches/repeat.py configs/1p1d-cpu.toml

Prints a Markdown table: the client's TTFT, and how much of it is waiting for "KV ready" and for decode's first byte.
"""

import argparse
import asyncio
import random
import statistics

import httpx
from compare import Fleet, one

PHASES = ("pegaflow_router_handoff_wait_seconds", "pegaflow_router_leg_first_byte_seconds")
ALREADY = 'pegaflow_engine_handoffs_total{outcome="already_stored"}'


async def figures(client, base):
    lines = (await client.get(base + "/metrics")).text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    wanted = [f"{phase}_{part}" for phase in PHASES for part in ("sum", "count")] + [ALREADY]
    return {name: sum(float(v) for k, v in samples.items() if name in (k, k.split("{")[0])) for name in wanted}


async def asked(client, base, model, prompts, args):
    """Every prompt once, one after the other: TTFT in ms, and what the figures rose by."""
    before = await figures(client, base)
    ttft = [(await one(client, base, model, prompt, args.output_tokens))[0] * 1e3 for prompt in prompts]
    after = await figures(client, base)
    return ttft, {name: after[name] - before[name] for name in after}


async def measure(base, args):
    dice = random.Random(args.seed)
    prompts = [[dice.randrange(300, 2000) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
    async with httpx.AsyncClient(timeout=120) as client:
        model = (await client.get(base + "/v1/models")).json()["data"][0]["id"]
        warm_up = [dice.randrange(300, 2000) for _ in range(args.prompt_tokens)]
        await one(client, base, model, warm_up, 8)
        print("| the prompt is | TTFT median ms | KV ready, mean ms | decode's first byte, mean ms | prefill skipped |")
        print("|---|---|---|---|---|")
        for name in ("new", "in the store"):
            ttft, rose = await asked(client, base, model, prompts, args)
            means = [1e3 * rose[f"{phase}_sum"] / rose[f"{phase}_count"] for phase in PHASES]
            cells = [name, statistics.median(ttft), *means]
            print("| " + " | ".join(c if isinstance(c, str) else f"{c:.1f}" for c in cells), end="")
            print(f" | {rose[ALREADY]:.0f} of {len(prompts)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--output-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with Fleet(args.topology) as fleet:
        asyncio.run(measure(fleet.base, args))


if __name__ == "__main__":
    main()
