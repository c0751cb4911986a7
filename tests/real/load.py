"""Concurrent requests through OpenAI's own client, and how each of them ended."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai

TOO_LONG = 180


@dataclass
class Ending:
    """One request. `text` is what had arrived when it ended."""

    index: int
    streamed: bool
    text: str = ""
    tokens: int = 0
    error: str = ""
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return not self.error

    @property
    def lost(self) -> bool:
        """Failed although nothing had been sent to the client."""
        return bool(self.error) and not self.text


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=TOO_LONG)


def request(api: openai.OpenAI, model: str, index: int, max_tokens: int) -> Ending:
    """Chat or completion, streamed or not, by the index; never raises."""
    ending = Ending(index, streamed=index % 2 == 0)
    started = time.monotonic()
    words = " ".join(f"word{index}x{place}" for place in range(1 + index * 7 % 60))
    try:
        if index % 4 < 2:
            chat(api, model, words, max_tokens, ending)
        else:
            complete(api, model, words, max_tokens, ending)
    except Exception as error:
        ending.error = f"{type(error).__name__}: {error}"
    ending.seconds = time.monotonic() - started
    return ending


EXTRA = {"ignore_eos": True}


def chat(api: openai.OpenAI, model: str, words: str, max_tokens: int, ending: Ending) -> None:
    messages = [{"role": "user", "content": words}]
    common = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "extra_body": EXTRA}
    if not ending.streamed:
        reply = api.chat.completions.create(**common)
        ending.text, ending.tokens = reply.choices[0].message.content, reply.usage.completion_tokens
        return
    for chunk in api.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            ending.text += chunk.choices[0].delta.content or ""
        if chunk.usage:
            ending.tokens = chunk.usage.completion_tokens
    finished(ending)


def complete(api: openai.OpenAI, model: str, words: str, max_tokens: int, ending: Ending) -> None:
    common = {"model": model, "prompt": words, "max_tokens": max_tokens, "temperature": 0, "extra_body": EXTRA}
    if not ending.streamed:
        reply = api.completions.create(**common)
        ending.text, ending.tokens = reply.choices[0].text, reply.usage.completion_tokens
        return
    for chunk in api.completions.create(**common, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            ending.text += chunk.choices[0].text
        if chunk.usage:
            ending.tokens = chunk.usage.completion_tokens
    finished(ending)


def finished(ending: Ending) -> None:
    """The usage chunk is the last one: a stream without it was cut off without a word."""
    if not ending.tokens:
        ending.error = "the stream ended without an error and without its end"


def burst(url: str, model: str, count: int, max_tokens: int) -> list[Ending]:
    """All at once."""
    api = client(url)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: request(api, model, index, max_tokens), range(count)))


@dataclass
class Load:
    """A steady number of requests until `stop`, with `pause` seconds after each of a worker's requests."""

    url: str
    model: str
    workers: int
    max_tokens: int
    pause: float = 0.0
    endings: list[Ending] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(self.workers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> list[Ending]:
        self._stop.set()
        for thread in self._threads:
            thread.join(TOO_LONG + 10)
            assert not thread.is_alive(), "a request hangs"
        return self.endings

    def _work(self, number: int) -> None:
        api = client(self.url)
        index = number
        while not self._stop.is_set():
            self.endings.append(request(api, self.model, index, self.max_tokens))
            index += self.workers
            self._stop.wait(self.pause)
