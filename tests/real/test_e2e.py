"""`pegaflow up configs/1p1d-cpu.toml` on real vLLM: the issue's acceptance list, a test for each line.

The tests run in the order of the file: those that kill something come last.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import load
import machine
from arena import Arena
from load import Load, client
from pegaflow import GONE_LIMIT, Fleet, Reference
from prompts import BLOCK, MAX_TOKENS, ROUNDING, Exact, ask, full_chunks, leg, prompt

HITS = "vllm:external_prefix_cache_hits_total"
# 1 to 40 chunks, on and around chunk boundaries.
LENGTHS = [32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 255, 256, 257, 320, 321]
LENGTHS += [500, 511, 512, 640, 900, 1000, 1279, 1280, 1281, 1, 5, 31]
# A hand-off that waits for the router's or the engine's limits (30 s and more) is above it. A shorter wait, for
# the shim's pending deadline, ends in a miss, which the hits on decode show.
QUICK = 5.0


def test_openai_client_gets_a_completion(fleet: Fleet, model: str):
    reply = client(fleet.url).completions.create(model=model, prompt="The quick brown fox", max_tokens=16)
    assert reply.choices[0].text
    assert reply.usage.completion_tokens > 0


def test_the_banners_curl_answers(fleet: Fleet):
    banner = fleet.output().partition("pegaflow is ready")[2]
    command = banner[banner.index("curl ") :].partition("}'")[0] + "}'"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"]


def test_openai_client_gets_a_streamed_chat(fleet: Fleet, model: str):
    messages = [{"role": "user", "content": "Tell me about water and hills, please. " * 10}]
    api = client(fleet.url)
    stream = api.chat.completions.create(model=model, messages=messages, max_tokens=16, stream=True)
    chunks = [chunk for chunk in stream if chunk.choices]
    assert len(chunks) > 4, "the answer came in one piece"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def said(response: httpx.Response) -> str:
    """The text of an answer of /v1/responses or /v1/messages, streamed or not."""
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[5:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert not any(event.get("type") == "error" for event in events), response.text
        deltas = [
            event["delta"] for event in events if str(event.get("type", "")).endswith(("text.delta", "block_delta"))
        ]
        return "".join(delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas)
    reply = response.json()
    parts = reply["content"] if "content" in reply else reply["output"][-1]["content"]
    return "".join(part["text"] for part in parts)


def test_other_endpoints_answer_as_a_plain_node_does(fleet: Fleet, reference: Reference, model: str):
    talk = "Tell me about rivers and stones, please. " * 8
    asked = [
        ("/v1/responses", {"input": talk, "max_output_tokens": 12, "temperature": 0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": talk}], "max_tokens": 12, "temperature": 0}),
    ]
    with httpx.Client(timeout=60) as http:
        for path, body in asked:
            for stream in (False, True):
                whole = {**body, "model": model, "stream": stream}
                ours, right = (http.post(url + path, json=whole) for url in (fleet.url, reference.url))
                assert (ours.status_code, right.status_code) == (200, 200), ours.text + right.text
                assert said(ours) == said(right) != "", f"{path}, stream {stream}"
        tokens = {"model": model, "prompt": talk}
        ours, right = (http.post(url + "/tokenize", json=tokens) for url in (fleet.url, reference.url))
        assert ours.json() == right.json()
        assert ours.json()["count"] > 10
        refused = http.post(fleet.url + "/v1/embeddings", json={"model": model, "input": "x"})
        assert (
            refused.status_code == http.post(reference.url + "/v1/embeddings", json={"input": "x"}).status_code != 200
        )
    counted = 'pegaflow_router_requests_total{endpoint="other",outcome="ok"'
    assert (
        sum(
            float(line.split()[-1])
            for line in httpx.get(f"{fleet.url}/metrics", timeout=30).text.splitlines()
            if line.startswith(counted)
        )
        >= 5
    )


def test_bit_exact_and_every_full_chunk_loaded(fleet: Fleet, reference: Reference, model: str):
    prompts = [prompt(1, length) for length in LENGTHS]
    chunks = sum(map(full_chunks, prompts))
    assert sum(1 <= full_chunks(ids) <= 40 for ids in prompts) >= 20
    expected = [ask(reference.url, ids, model=model) for ids in prompts]

    hits = fleet.node_metric("decode", HITS)
    loaded, saved = (fleet.metric(f"pegaflow_engine_{name}_chunks_total") for name in ("loaded", "saved"))
    answers = [ask(fleet.url, ids, model=model) for ids in prompts]
    differences = {
        len(ids): answer.difference(right) for ids, answer, right in zip(prompts, answers, expected, strict=True)
    }
    print("difference by prompt length:", differences)
    assert max(differences.values()) <= ROUNDING

    # Of a prompt that is an exact multiple of the block, vLLM loads every block and recomputes its last
    # token only; of any other, it loads every full block and recomputes the rest.
    assert fleet.node_metric("decode", HITS) - hits == chunks * BLOCK
    assert fleet.metric("pegaflow_engine_loaded_chunks_total") - loaded == chunks
    assert fleet.metric("pegaflow_engine_saved_chunks_total") - saved == chunks

    for answer in answers:
        assert len(answer.tokens) == MAX_TOKENS
        assert len(set(answer.tokens)) >= 20, f"repetitive output proves nothing: {answer.tokens}"
    assert len({answer.tokens for answer in answers}) == len(answers), "different prompts, equal answers"


def through_store(fleet: Fleet, model: str, seed: int, *, damage: bool) -> tuple[list[int], Exact]:
    """A hand-off with both legs sent by hand, so that something can happen in between."""
    ids = prompt(seed, 10 * BLOCK + 5)
    handoff = f"test-{seed}"
    with Arena(fleet.pid) as arena:
        before, saved = arena.pages(), fleet.metric("pegaflow_engine_saved_chunks_total")
        ask(fleet.node_url("prefill"), ids, model=model, max_tokens=1, **leg(handoff, "prefill"))
        machine.wait_until(
            lambda: fleet.metric("pegaflow_engine_saved_chunks_total") - saved == full_chunks(ids),
            10,
            "prefill has saved the prompt",
        )
        changed = arena.changed_since(before)
        assert changed, "the arena did not change"
        if damage:
            # The arena begins with its header; the last page that changed is in a chunk.
            arena.damage(changed[-1])
    hits = fleet.node_metric("decode", HITS)
    answer = ask(fleet.node_url("decode"), ids, model=model, **leg(handoff, "decode"))
    assert fleet.node_metric("decode", HITS) - hits == full_chunks(ids) * BLOCK, "decode did not load it"
    return ids, answer


def test_control_an_undamaged_chunk_compares_equal(fleet: Fleet, reference: Reference, model: str):
    ids, answer = through_store(fleet, model, 2, damage=False)
    assert answer.difference(ask(reference.url, ids, model=model)) <= ROUNDING


def test_control_a_damaged_chunk_makes_the_comparison_fail(fleet: Fleet, reference: Reference, model: str):
    ids, answer = through_store(fleet, model, 3, damage=True)
    assert answer.difference(ask(reference.url, ids, model=model)) > ROUNDING


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK])
def test_no_hand_off_waits_for_a_timeout(fleet: Fleet, model: str, length: int):
    fallbacks = fleet.metric("pegaflow_router_fallbacks_total")
    hits, pending = fleet.node_metric("decode", HITS), fleet.metric("pegaflow_engine_lookup_pending_total")
    ids = prompt(4, length)
    answers, seconds = [], []
    for _ in range(3):
        started = time.monotonic()
        answers.append(ask(fleet.url, ids, model=model))
        seconds.append(time.monotonic() - started)
    print("seconds:", [round(value, 3) for value in seconds])
    assert max(seconds) < QUICK
    assert fleet.metric("pegaflow_router_fallbacks_total") == fallbacks
    assert fleet.metric("pegaflow_engine_lookup_pending_total") == pending
    assert fleet.node_metric("decode", HITS) - hits >= full_chunks(ids) * BLOCK, "decode loaded nothing the first time"
    assert answers[0] == answers[1] == answers[2], "the same prompt, different answers"


def test_200_concurrent_mixed_requests(fleet: Fleet, model: str):
    served = fleet.node_metric("decode", "vllm:request_success_total")
    endings = load.burst(fleet.url, model, 200, 16)
    assert [ending.index for ending in endings] == list(range(200))
    failed = [ending for ending in endings if not ending.complete]
    assert not failed, failed[:5]
    assert {ending.tokens for ending in endings} == {16}
    assert len({ending.text for ending in endings}) > 190, "answers were mixed up"
    # Every request was answered by decode once: none lost, none computed twice.
    assert fleet.node_metric("decode", "vllm:request_success_total") - served == 200
    assert fleet.metric("pegaflow_router_in_flight") == 0
    print("slowest:", round(max(ending.seconds for ending in endings), 1), "s")


def kill_leader_under_load(fleet: Fleet, model: str, name: str) -> list[load.Ending]:
    """kill -9 of a node's API server; returns how the requests ended."""
    node = fleet.node(name)
    tree = machine.tree(node["pid"])
    assert len(tree) >= 2, f"API server and EngineCore: {machine.describe(tree)}"
    shm = machine.shm_files()
    of_node = machine.shm_in_use(tree)
    with Load(fleet.url, model, workers=6, max_tokens=48) as running:
        machine.wait_until(lambda: len(running.endings) >= 6, 120, "the load runs")
        os.kill(node["pid"], signal.SIGKILL)
        killed_at = len(running.endings)
        # The node that starts again needs the processor as well.
        running.pause = 2.0
        seconds = fleet.wait_for_return(name, node["incarnation"])
        machine.wait_until(lambda: len(running.endings) >= killed_at + 12, 120, "the load goes on")
        endings = running.stop()
    print(f"{name} was back after {seconds:.1f} s; {len(endings)} requests,", sum(e.lost for e in endings), "lost")
    assert not {pid for pid in tree if machine.alive(pid)}, machine.describe(tree)
    assert not machine.shm_left(shm - of_node), "left in /dev/shm by the dead node, or by the new one"
    return endings


def test_killed_prefill_leader_loses_nothing_and_returns(fleet: Fleet, model: str):
    endings = kill_leader_under_load(fleet, model, "prefill")
    failed = [ending for ending in endings if not ending.complete]
    assert not failed, failed


def test_killed_decode_leader_loses_nothing_and_returns(fleet: Fleet, model: str):
    endings = kill_leader_under_load(fleet, model, "decode")
    # Streams that had begun go on at prefill.
    failed = [ending for ending in endings if not ending.complete]
    assert not failed, failed


STREAMED = 300
"""Tokens: enough for both streams to be under way when the engine dies."""


def tell(url: str, model: str, endpoint: str, on_piece: Callable[[int], None]) -> list:
    """A whole stream's chunks."""
    text = " ".join(f"{endpoint}{place}" for place in range(150))
    asked = {"model": model, "max_tokens": STREAMED, "temperature": 0, "extra_body": load.EXTRA}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    api = client(url)
    if endpoint == "chat":
        stream = api.chat.completions.create(messages=[{"role": "user", "content": text}], **asked)
    else:
        stream = api.completions.create(prompt=text, **asked)
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        on_piece(len(chunks))
    return chunks


def text_of(chunks: list) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join((c.delta.content if hasattr(c, "delta") else c.text) or "" for c in choices)


def test_streams_outlive_their_decode_node_exactly(fleet: Fleet, reference: Reference, model: str):
    """The engine is killed while it generates: clients read what a plain node answers, in one piece."""
    node = fleet.node("decode")
    engine = next(pid for pid in machine.tree(node["pid"]) if machine.argv(pid)[0].startswith("VLLM::EngineCore"))
    replays = fleet.metric("pegaflow_router_replays_total")
    endpoints = ("completions", "chat")
    far = threading.Barrier(len(endpoints), lambda: os.kill(engine, signal.SIGKILL), timeout=60)

    def on_piece(number: int) -> None:
        if number == 20:
            far.wait()

    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(tell, fleet.url, model, endpoint, on_piece) for endpoint in endpoints]
        answers = [stream.result(timeout=120) for stream in streams]
    assert fleet.metric("pegaflow_router_replays_total") - replays == len(endpoints)
    for endpoint, chunks in zip(endpoints, answers, strict=True):
        right = tell(reference.url, model, endpoint, lambda _: None)
        assert text_of(chunks) == text_of(right) != "", endpoint
        assert chunks[-1].usage.completion_tokens == right[-1].usage.completion_tokens == STREAMED
        assert chunks[-1].usage.prompt_tokens == right[-1].usage.prompt_tokens
        assert len({chunk.id for chunk in chunks}) == 1
    fleet.wait_for_return("decode", node["incarnation"])


def test_bit_exact_again_after_the_restarts(fleet: Fleet, reference: Reference, model: str):
    hits = fleet.node_metric("decode", HITS)
    for length in (65, 640):
        ids = prompt(5, length)
        assert ask(fleet.url, ids, model=model).difference(ask(reference.url, ids, model=model)) <= ROUNDING
    assert fleet.node_metric("decode", HITS) - hits == (2 + 20) * BLOCK


def test_killed_pegaflow_leaves_nothing_and_the_next_up_works(fleet: Fleet, reference: Reference, model: str):
    # The reference's own shared memory is no leftover of pegaflow.
    reference.close()
    tree = machine.tree(fleet.pid)
    assert len(tree) >= 9, machine.describe(tree)
    os.kill(fleet.pid, signal.SIGKILL)
    fleet.process.wait()
    fleet.assert_nothing_left(tree, GONE_LIMIT)
    print(f"ready again after {fleet.up():.1f} s")
    assert client(fleet.url).completions.create(model=model, prompt="again " * 40, max_tokens=4).choices[0].text


def test_sigterm_leaves_nothing(fleet: Fleet):
    fleet.stop()
