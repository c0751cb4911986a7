"""Anthropic's Python client, at /v1/messages. Its key travels as `x-api-key`."""

from functools import partial

import anthropic

from checks import (
    BASE,
    KEY,
    LONG,
    MESSAGES,
    MODEL,
    UNKNOWN,
    WRONG_KEY,
    assert_cancelled,
    assert_unknown,
    cancelled,
    error_of,
    run,
)

client = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0, timeout=120)
# The client has no argument for the temperature.
GREEDY = {"temperature": 0}
SHORT = {"model": MODEL, "max_tokens": 16, "messages": MESSAGES, "extra_body": GREEDY}


def message_and_streamed_message_with_usage() -> None:
    whole = client.messages.create(**SHORT)
    assert (whole.type, whole.role) == ("message", "assistant"), whole
    assert whole.usage.input_tokens > 0, whole.usage
    assert 0 < whole.usage.output_tokens <= 16, whole.usage
    assert whole.stop_reason in ("max_tokens", "end_turn"), whole.stop_reason
    with client.messages.stream(**SHORT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    expected = "".join(block.text for block in whole.content)
    assert text == expected, f"streamed {text!r}, whole {expected!r}"
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens, (final.usage, whole.usage)


def raw_stream_events() -> None:
    kinds = [event.type for event in client.messages.create(**SHORT, stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop"), kinds
    assert {"content_block_delta", "message_delta"} <= set(kinds), kinds


def unknown_model_is_not_found() -> None:
    for stream in (False, True):
        ask = partial(client.messages.create, **SHORT | {"model": UNKNOWN}, stream=stream)
        error = error_of(anthropic.NotFoundError, ask)
        assert_unknown(error)
        assert error.type == "not_found_error", error.type


def stream_closed_early() -> None:
    before = cancelled()
    stream = client.messages.create(**SHORT | {"max_tokens": LONG}, stream=True)
    events = iter(stream)
    for _ in range(3):
        next(events)
    stream.close()
    assert_cancelled(before)
    message_and_streamed_message_with_usage()


def wrong_api_key_is_refused() -> None:
    stranger = client.with_options(api_key=WRONG_KEY)
    error = error_of(anthropic.AuthenticationError, lambda: stranger.messages.create(**SHORT))
    assert error.type == "authentication_error", error.type


run(
    "anthropic",
    [
        message_and_streamed_message_with_usage,
        raw_stream_events,
        unknown_model_is_not_found,
        stream_closed_early,
        wrong_api_key_is_refused,
    ],
)
