"""langchain-openai: ChatOpenAI and OpenAI."""

from functools import partial

import openai
from langchain_openai import ChatOpenAI, OpenAI

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


def chat_model(**changes: object) -> ChatOpenAI:
    settings = {"model": MODEL, "max_tokens": 16, "api_key": KEY, **changes}
    return ChatOpenAI(
        base_url=f"{BASE}/v1",
        max_retries=0,
        timeout=120,
        temperature=0,
        stream_usage=True,
        extra_body={"ignore_eos": True},
        **settings,
    )


def chat_and_streamed_chat_with_usage() -> None:
    whole = chat_model().invoke(MESSAGES)
    assert whole.response_metadata["finish_reason"] == "length", whole
    usage = whole.usage_metadata
    assert_usage(usage["input_tokens"], usage["output_tokens"], usage["total_tokens"], 16)
    chunks = list(chat_model().stream(MESSAGES))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole.text, f"streamed {text!r}, whole {whole.text!r}"
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [16], usages


def completion_and_streamed_completion() -> None:
    model = OpenAI(
        model=MODEL,
        base_url=f"{BASE}/v1",
        api_key=KEY,
        max_retries=0,
        timeout=120,
        temperature=0,
        max_tokens=16,
        extra_body={"ignore_eos": True},
    )
    result = model.generate([PROMPT])
    usage = result.llm_output["token_usage"]
    assert_usage(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"], 16)
    text = "".join(model.stream(PROMPT))
    assert text == result.generations[0][0].text, (text, result)


def unknown_model_is_not_found() -> None:
    for ask in (lambda model: model.invoke(MESSAGES), lambda model: list(model.stream(MESSAGES))):
        assert_unknown(error_of(openai.NotFoundError, partial(ask, chat_model(model=UNKNOWN))))


def stream_closed_early() -> None:
    before = cancelled()
    stream = chat_model(max_tokens=LONG).stream(MESSAGES)
    for _ in range(3):
        next(stream)
    stream.close()
    assert_cancelled(before)
    chat_and_streamed_chat_with_usage()


def wrong_api_key_is_refused() -> None:
    stranger = chat_model(api_key=WRONG_KEY)
    error = error_of(openai.AuthenticationError, lambda: stranger.invoke(MESSAGES))
    assert error.code == "invalid_api_key", error.code


run(
    "langchain-openai",
    [
        chat_and_streamed_chat_with_usage,
        completion_and_streamed_completion,
        unknown_model_is_not_found,
        stream_closed_early,
        wrong_api_key_is_refused,
    ],
)
