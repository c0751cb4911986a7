"""What the fleet answers and what a plain node answers to the same request, field by field.

Only ids, times and routing headers may differ; the end of `system_fingerprint` is an id of the node's configuration,
which has a store in the fleet. Every case is asked not streamed and, where it can be, streamed; a
prompt that is long enough is handed off, so both sides of the split are looked at.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pegaflow import Fleet, Reference

pytestmark = pytest.mark.soak

LONG = " ".join(f"hill{number} and river{number}," for number in range(60))
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Bern", "Rome"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]},
    },
}
IDS = list(range(300, 420))

COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": LONG},
    "short prompt": {"prompt": "Hi"},
    "token ids in": {"prompt": IDS},
    "token ids out": {"prompt": LONG, "return_token_ids": True},
    "default limit": {"prompt": LONG, "max_tokens": None},
    "one token": {"prompt": LONG, "max_tokens": 1},
    "logprobs": {"prompt": LONG, "logprobs": 3},
    "prompt logprobs": {"prompt": IDS, "prompt_logprobs": 1, "stream": False},
    "echo": {"prompt": "A hill", "echo": True},
    "echo and logprobs": {"prompt": "A hill", "echo": True, "logprobs": 1},
    "batch of texts": {"prompt": [LONG, "A river", LONG + "!"]},
    "batch of ids": {"prompt": [IDS, IDS[:40]]},
    "n": {"prompt": LONG, "n": 3, "temperature": 0.7, "seed": 5},
    "seed": {"prompt": LONG, "temperature": 0.9, "seed": 11},
    "stop token": {"prompt": LONG, "stop_token_ids": list(range(300, 1200)), "ignore_eos": False},
    "min tokens": {"prompt": LONG, "min_tokens": 8, "ignore_eos": False},
    "penalties": {"prompt": LONG, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "logit bias": {"prompt": LONG, "logit_bias": {"301": 50}},
    "salt": {"prompt": LONG, "cache_salt": "pepper"},
    "truncated prompt": {"prompt": LONG, "truncate_prompt_tokens": 40},
    "guided": {"prompt": LONG, "structured_outputs": {"choice": ["hill", "river"]}},
    "one megabyte": {"prompt": "word " * 200_000},
}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two limits": {"max_completion_tokens": 7, "max_tokens": 3},
    "system and history": {
        "messages": [
            {"role": "system", "content": "You are a hill."},
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "text", "text": "And the rivers, ünïcödé 🏔?"}]},
        ]
    },
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "n": {"n": 2, "temperature": 0.7, "seed": 3},
    "named tool": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "ignore_eos": False,
    },
    "required tool": {"tools": [WEATHER], "tool_choice": "required", "ignore_eos": False},
    "tools, none": {"tools": [WEATHER], "tool_choice": "none"},
    "tools, auto": {"tools": [WEATHER], "tool_choice": "auto"},
    "json schema": {"response_format": SCHEMA, "max_tokens": 60, "ignore_eos": False},
    "json object": {"response_format": {"type": "json_object"}, "max_tokens": 20},
    "prefix of an answer": {
        "messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "The hill"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "an image that no model here sees": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                ],
            }
        ]
    },
}
MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "limit of nothing": ("completions", {"prompt": LONG, "max_tokens": -1}),
    "limit above the model's": ("completions", {"prompt": LONG, "max_tokens": 10_000_000}),
    "hot": ("completions", {"prompt": LONG, "temperature": -1}),
    "min above max": ("completions", {"prompt": LONG, "max_tokens": 4, "min_tokens": 5}),
    "options without a stream": (
        "completions",
        {"prompt": LONG, "stream": False, "stream_options": {"include_usage": True}},
    ),
    "no messages": ("chat/completions", {"messages": None}),
    "unknown role": ("chat/completions", {"messages": [{"role": "hill", "content": 3}]}),
    "prompt of a wrong type": ("completions", {"prompt": {"a": 1}}),
}


def cases() -> Iterator[Any]:
    named = [("completion", name, "completions", extra) for name, extra in COMPLETIONS.items()]
    named += [("chat", name, "chat/completions", extra) for name, extra in CHATS.items()]
    named += [("mistake", name, path, extra) for name, (path, extra) in MISTAKES.items()]
    for kind, name, path, extra in named:
        for way in ways(extra):
            yield pytest.param(path, extra, way, id=f"{kind}, {name}, {way}")


def ways(extra: dict[str, Any]) -> list[str]:
    """How a case can be asked; the usage of an answer that is not streamed is always in it."""
    return ["whole"] if extra.get("stream") is False else ["whole", "stream", "stream with usage"]


@pytest.mark.parametrize(("path", "extra", "way"), cases())
def test_the_fleet_answers_as_a_plain_node(
    fleet: Fleet, reference: Reference, model: str, path: str, extra: dict[str, Any], way: str
):
    stream = way != "whole"
    body: dict[str, Any] = {"model": model, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": stream}
    if path == "chat/completions":
        body["messages"] = [{"role": "user", "content": LONG}]
    if way == "stream with usage":
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    body |= extra
    ours, right = (answer(url, path, body) for url in (fleet.url, reference.url))
    assert ours == right


def answer(url: str, path: str, body: dict[str, Any]) -> Any:
    """Status, type and content, without what may differ."""
    reply = httpx.post(f"{url}/v1/{path}", json=body, timeout=120)
    kind = reply.headers["content-type"].partition(";")[0]
    if kind != "text/event-stream":
        return reply.status_code, kind, named_alike(reply.json())
    events = [event for event in reply.text.split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events), reply.text
    assert events[-1] == "data: [DONE]", events[-1]
    assert events.count("data: [DONE]") == 1
    return reply.status_code, kind, joined([json.loads(event[6:]) for event in events[:-1]])


def named_alike(value: Any) -> Any:
    """Without ids and times, wherever they are."""
    match value:
        case {"system_fingerprint": str() as mark}:
            version, _, config = mark.rpartition("-")
            assert version.startswith("vllm-"), mark
            assert len(config) == 8, mark
            return named_alike(value | {"system_fingerprint": None}) | {"system_fingerprint": version}
        case dict():
            return {
                key: named_alike(inner) for key, inner in value.items() if key not in ("id", "created", "request_id")
            }
        case list():
            return [named_alike(inner) for inner in value]
        case _:
            return value


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one value. How many tokens are in one event is a matter of time: text and lists are joined per
    choice, all other fields keep every value that they had, in order and once.
    """
    assert len({event.get("id") for event in events}) == 1, "a stream has one id"
    whole: dict[str, Any] = {}
    for event in events:
        choices = event.pop("choices", [])
        merge(whole, named_alike(event), "")
        for choice in choices:
            merge(whole.setdefault("choices", {}).setdefault(choice["index"], {}), named_alike(choice), "")
    # Counts that were told on the way depend on it as well: the last ones are those of the whole.
    if "usage" in whole:
        counts = whole["usage"].items()
        whole["usage"] = {key: seen[-1] if isinstance(seen, list) else seen for key, seen in counts}
    return whole


def merge(into: dict[str, Any], part: dict[str, Any], path: str) -> None:
    for key, value in part.items():
        where = f"{path}.{key}"
        match value:
            case dict():
                if isinstance(into.get(key), list):
                    # It was null before.
                    into[f"{key} at first"] = into.pop(key)
                merge(into.setdefault(key, {}), value, where)
            case list() if key == "tool_calls":
                for call in value:
                    merge(into.setdefault(key, {}).setdefault(call.get("index", 0), {}), call, where)
            case list():
                into.setdefault(key, []).extend(value)
            case str() if key in ("text", "content", "arguments"):
                into[key] = into.get(key, "") + value
            case _:
                seen = into.setdefault(key, [])
                if isinstance(seen, list) and value not in seen:
                    seen.append(value)
