// OpenAI's client for Node. BASE_URL, MODEL and API_KEY come from run.sh.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const { BASE_URL, MODEL, API_KEY } = process.env;
const UNKNOWN = "no-such-model";
const NOTICE_LIMIT_MS = 20_000;
const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: API_KEY, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "The quick brown fox" }];
const prompt = "The quick brown fox";
const short = { model: MODEL, max_tokens: 16, temperature: 0, ignore_eos: true };
const withUsage = { stream: true, stream_options: { include_usage: true } };

async function collect(stream, textOf) {
  let text = "";
  let usage;
  for await (const chunk of stream) {
    if (chunk.choices.length > 0) text += textOf(chunk.choices[0]) ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

/** vLLM leaves fields that are null out of a stream, and only there. */
function assertSameUsage(streamed, whole) {
  for (const name of ["prompt_tokens", "completion_tokens", "total_tokens"]) {
    assert(whole[name] > 0, name);
    assert.equal(streamed[name], whole[name], name);
  }
}

/** Requests that the router counts as left by their clients. */
async function cancelled() {
  const text = await (await fetch(`${BASE_URL}/metrics`)).text();
  const samples = text.matchAll(/^pegaflow_router_requests_total\{[^}]*outcome="cancelled"[^}]*\} (\S+)/gm);
  return [...samples].reduce((sum, sample) => sum + Number(sample[1]), 0);
}

const checks = {
  async "models"() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.deepEqual(ids, [MODEL]);
  },

  async "chat and streamed chat with usage"() {
    const whole = await client.chat.completions.create({ ...short, messages });
    assert.equal(whole.choices[0].finish_reason, "length");
    assert.equal(whole.usage.completion_tokens, 16);
    assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + 16);
    const stream = await client.chat.completions.create({ ...short, ...withUsage, messages });
    const { text, usage } = await collect(stream, (choice) => choice.delta.content);
    assert.equal(text, whole.choices[0].message.content);
    assertSameUsage(usage, whole.usage);
  },

  async "completion and streamed completion with usage"() {
    const whole = await client.completions.create({ ...short, prompt });
    assert.equal(whole.usage.completion_tokens, 16);
    const stream = await client.completions.create({ ...short, ...withUsage, prompt });
    const { text, usage } = await collect(stream, (choice) => choice.text);
    assert.equal(text, whole.choices[0].text);
    assertSameUsage(usage, whole.usage);
  },

  async "unknown model is not found"() {
    for (const stream of [false, true]) {
      await assert.rejects(
        async () => await client.chat.completions.create({ ...short, messages, model: UNKNOWN, stream }),
        (error) => {
          assert(error instanceof OpenAI.NotFoundError, `${error}`);
          assert(error.message.includes(UNKNOWN) && error.message.includes(`\`${MODEL}\``), error.message);
          return true;
        },
      );
    }
  },

  async "stream closed early"() {
    const before = await cancelled();
    const stream = await client.chat.completions.create({ ...short, messages, max_tokens: 1500, stream: true });
    let seen = 0;
    for await (const _ of stream) if (++seen === 3) break;
    const end = Date.now() + NOTICE_LIMIT_MS;
    while ((await cancelled()) < before + 1) {
      assert(Date.now() < end, "no cancelled request counted after the stream was closed");
      await sleep(100);
    }
    await checks["chat and streamed chat with usage"]();
  },

  async "wrong api key is refused"() {
    const stranger = client.withOptions({ apiKey: "wrong-key-of-nobody" });
    await assert.rejects(async () => await stranger.models.list(), OpenAI.AuthenticationError);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  const label = `openai (Node) ${VERSION}  ${name}`;
  try {
    await check();
    console.log(`ok    ${label}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${label}: ${error}`);
    console.error(error);
  }
}
process.exitCode = failed > 0 ? 1 : 0;
