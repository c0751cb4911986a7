"""litellm, through its providers for OpenAI-compatible servers and for vLLM."""

import os
from functools import partial

# Else it fetches a list of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

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

litellm.suppress_debug_info = True
ACCESS = {"api_base": f"{BASE}/v1", "api_key": KEY, "num_retries": 0, "max_retries": 0, "timeout": 120}
SHORT = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def chat(provider: str) -> None:
    ask = {"model": f"{provider}/{MODEL}", "messages": MESSAGES, **SHORT, **ACCESS}
    whole = litellm.completion(**ask)
    assert whole.choices[0].finish_reason == "length", whole
    usage = whole.usage
    assert_usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, 16)
    chunks = list(litellm.completion(**ask, **WITH_USAGE))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, f"streamed {text!r}, whole {whole.choices[0].message.content!r}"
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert [usage.completion_tokens for usage in usages] == [16], usages


def chat_and_streamed_chat_as_openai() -> None:
    chat("openai")


def chat_and_streamed_chat_as_hosted_vllm() -> None:
    chat("hosted_vllm")


def completion_and_streamed_completion() -> None:
    ask = {"model": f"text-completion-openai/{MODEL}", "prompt": PROMPT, **SHORT, **ACCESS}
    whole = litellm.text_completion(**ask)
    usage = whole.usage
    assert_usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, 16)
    chunks = list(litellm.text_completion(**ask, stream=True))
    text = "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text, f"streamed {text!r}, whole {whole.choices[0].text!r}"


def unknown_model_is_not_found() -> None:
    for stream in (False, True):
        ask = {"model": f"openai/{UNKNOWN}", "messages": MESSAGES, **SHORT, **ACCESS, "stream": stream}
        assert_unknown(error_of(litellm.NotFoundError, partial(litellm.completion, **ask)))


def stream_closed_early() -> None:
    before = cancelled()
    ask = {"model": f"openai/{MODEL}", "messages": MESSAGES, **SHORT, **ACCESS, "max_tokens": LONG}
    stream = litellm.completion(**ask, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    assert_cancelled(before)
    chat("openai")


def wrong_api_key_is_refused() -> None:
    ask = {"model": f"openai/{MODEL}", "messages": MESSAGES, **ACCESS, "api_key": WRONG_KEY}
    error_of(litellm.AuthenticationError, lambda: litellm.completion(**ask))


run(
    "litellm",
    [
        chat_and_streamed_chat_as_openai,
        chat_and_streamed_chat_as_hosted_vllm,
        completion_and_streamed_completion,
        unknown_model_is_not_found,
        stream_closed_early,
        wrong_api_key_is_refused,
    ],
)
