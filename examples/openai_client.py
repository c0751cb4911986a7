"""A streamed chat completion with OpenAI's own client: pip install openai, then run this file."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("BASE", "http://127.0.0.1:8000") + "/v1", api_key="none")
stream = client.chat.completions.create(
    model=os.environ.get("MODEL", "tiny"),
    messages=[{"role": "user", "content": "The quick brown fox"}],
    max_tokens=16,
    stream=True,
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
