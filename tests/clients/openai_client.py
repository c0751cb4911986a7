"""OpenAI's Python client."""

from functools import partial

import openai

from checks import (
    BASE,
    KEY,
    LONG,
    MESSAGES,
    MODEL,
    PROMPT,
    UNKNOWN,
    WRONG_KEY,
    assert_cancelled,
    assert_unknown,
    assert_usage,
    cancelled,
    error_of,
    run,
)

client = openai.OpenAI(base_url=f"{BASE}/v1", api_key=KEY, max_retries=0, timeout=120)
SHORT = {"model": MODEL, "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def chat_and_streamed_chat_with_usage() -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **SHORT)
    assert whole.choices[0].finish_reason == "length"
    usage = whole.usage
    assert_usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, 16)
    chunks = list(client.chat.completions.create(messages=MESSAGES, **SHORT, **WITH_USAGE))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, f"streamed {text!r}, whole {whole.choices[0].message.content!r}"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage == usage, (chunks[-1].usage, usage)


def completion_and_streamed_completion_with_usage() -> None:
    whole = client.completions.create(prompt=PROMPT, **SHORT)
    usage = whole.usage
    assert_usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, 16)
    chunks = list(client.completions.create(prompt=PROMPT, **SHORT, **WITH_USAGE))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text, f"streamed {text!r}, whole {whole.choices[0].text!r}"
    assert chunks[-1].usage == usage, (chunks[-1].usage, usage)


def stream_helper() -> None:
    with client.chat.completions.stream(messages=MESSAGES, **SHORT) as stream:
        kinds = {event.type for event in stream}
        # get_final_completion() takes an answer that reached max_tokens for an error.
        final = stream.current_completion_snapshot
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.choices[0].message.content


def request_id() -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **SHORT, extra_headers={"X-Request-Id": "mine-1"})
    assert answer._request_id == "mine-1", answer._request_id


def unknown_model_is_not_found() -> None:
    for stream in (False, True):
        ask = {**SHORT, "model": UNKNOWN, "messages": MESSAGES, "stream": stream}
        error = error_of(openai.NotFoundError, partial(client.chat.completions.create, **ask))
        assert_unknown(error)
        assert error.code == "model_not_found", error.code


def bad_parameter_is_a_bad_request() -> None:
    # More than max_tokens: the node's own words arrive.
    for stream in (False, True):
        ask = {**SHORT, "extra_body": {"min_tokens": 17}, "messages": MESSAGES, "stream": stream}
        error = error_of(openai.BadRequestError, partial(client.chat.completions.create, **ask))
        assert "min_tokens" in str(error), error


def stream_closed_early() -> None:
    before = cancelled()
    stream = client.chat.completions.create(messages=MESSAGES, **SHORT | {"max_tokens": LONG}, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    assert_cancelled(before)
    # The pool's next connection works.
    chat_and_streamed_chat_with_usage()


def wrong_api_key_is_refused() -> None:
    error = error_of(openai.AuthenticationError, client.with_options(api_key=WRONG_KEY).models.list)
    assert error.code == "invalid_api_key", error.code


run(
    "openai",
    [
        models,
        chat_and_streamed_chat_with_usage,
        completion_and_streamed_completion_with_usage,
        stream_helper,
        request_id,
        unknown_model_is_not_found,
        bad_parameter_is_a_bad_request,
        stream_closed_early,
        wrong_api_key_is_refused,
    ],
)
