// What needs no browser.
import { test } from "node:test";
import assert from "node:assert/strict";
import { build } from "esbuild";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));

async function load(name) {
  const { outputFiles } = await build({ absWorkingDir: join(here, ".."), entryPoints: [`src/${name}.ts`], bundle: true, format: "esm", write: false, logLevel: "error" });
  return import(`data:text/javascript;base64,${Buffer.from(outputFiles[0].contents).toString("base64")}`);
}

const { Events } = await load("sse");
const { Lines, plain, level, LONGEST_LINE } = await load("lines");
const format = await load("format");
const { segments, stripes } = await load("waterfall");
const series = await load("series");
const { keyIn } = await load("key");

const STREAM = ': hello\r\n\r\nevent: begin\r\ndata: {"name":"größe 模型 🦙"}\r\n\r\nevent:tick\ndata: 1\ndata:  2\nid: 7\n\n:\n\ndata: bare\r\revent: nothing\n\ndata: \u2028kept\n\n';
const EVENTS = [
  { name: "begin", data: '{"name":"größe 模型 🦙"}' },
  { name: "tick", data: "1\n 2" },
  { name: "message", data: "bare" },
  { name: "message", data: "\u2028kept" },
];

test("events come out alike, wherever the stream is split", () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (let first = 0; first <= bytes.length; first += 1) {
    for (const second of [first, first + 1, first + 2, first + 7]) {
      const events = new Events();
      const found = [bytes.slice(0, first), bytes.slice(first, second), bytes.slice(second)].flatMap((part) => events.feed(part));
      assert.deepEqual(found, EVENTS, `split at ${first} and ${second}`);
    }
  }
  const events = new Events();
  assert.deepEqual([...bytes].flatMap((byte) => events.feed(Uint8Array.of(byte))), EVENTS);
});

test("an event that breaks off is not given out", () => {
  const events = new Events();
  assert.deepEqual(events.feed(new TextEncoder().encode("data: half")), []);
  assert.deepEqual(events.feed(new TextEncoder().encode("\n")), []);
  assert.deepEqual(events.feed(new TextEncoder().encode("\n")), [{ name: "message", data: "half" }]);
});

test("lines of logs are split anywhere, without codes, and cut when long", () => {
  const bytes = new TextEncoder().encode("\u001b[31mERROR\u001b[0m größe\r\n\u001b]0;title\u0007two\n\nlast");
  for (let place = 0; place <= bytes.length; place += 1) {
    const lines = new Lines();
    assert.deepEqual([...lines.feed(bytes.slice(0, place)), ...lines.feed(bytes.slice(place))], ["ERROR größe", "two", ""]);
  }
  const lines = new Lines();
  for (let part = 0; part < 100; part += 1) assert.deepEqual(lines.feed(new Uint8Array(1000).fill(120)), []);
  const [line] = lines.feed(new TextEncoder().encode("\n"));
  assert.equal(line, `${"x".repeat(LONGEST_LINE)} … (${100_000 - LONGEST_LINE} more characters)`);
  assert.equal(plain("a\u001b[1;38;5;200mb\u001b[Kc\td"), "abc\td");
  assert.deepEqual(["x ERROR y", "CRITICAL", "Traceback (most recent", "a WARNING", "WARN", "info"].map(level), ["error", "error", "error", "warning", "warning", "other"]);
});

test("figures are written as people read them", () => {
  const { short, count, millis, duration, bytes, percent, ranges, clock, when, words, plural } = format;
  assert.deepEqual([0, 3, 0.123, 4.56, 45.67, 456.7, 4422, 12_345, 1_234_567, 2e9].map(short), ["0", "3", "0.12", "4.56", "45.7", "457", "4422", "12.3k", "1.23M", "2G"]);
  assert.deepEqual([null, undefined, NaN, Infinity].map(short), ["–", "–", "–", "–"]);
  assert.deepEqual([0, 999, 1000, 1234567].map(count), ["0", "999", "1\u202f000", "1\u202f234\u202f567"]);
  assert.deepEqual([0, 0.26, 9.94, 9.96, 999, 1000, 9_990, 12_340, 61_000, null].map(millis), ["0 ms", "0.3 ms", "9.9 ms", "10 ms", "999 ms", "1.00 s", "9.99 s", "12.3 s", "1 min 1 s", "–"]);
  assert.deepEqual([0, 59.9, 60, 3_599, 3_600, 90_061, -4].map(duration), ["0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "1 d 1 h", "0 s"]);
  assert.deepEqual([0, 1023, 1024, 1.5 * 2 ** 30, 80 * 2 ** 30, 100 * 2 ** 20, null].map(bytes), ["0 B", "1023 B", "1.0 KiB", "1.5 GiB", "80.0 GiB", "100 MiB", "–"]);
  assert.deepEqual([0, 0.005, 0.5, 0.999, 1, null].map(percent), ["0 %", "0.5 %", "50 %", "100 %", "100 %", "–"]);
  assert.equal(ranges([3, 1, 2, 8, 10, 11, 2]), "1–3, 8, 10–11");
  assert.equal(ranges([]), "");
  const at = new Date(2026, 0, 2, 3, 4, 5, 67).getTime();
  assert.equal(clock(at), "03:04:05");
  assert.equal(clock(at, true), "03:04:05.067");
  assert.equal(when(at, at + 1000), "03:04:05");
  assert.equal(when(at, at + 86_400_000), "2026-01-02 03:04:05");
  assert.equal(words("warming_up"), "warming up");
  assert.deepEqual([plural(1, "node"), plural(2, "node"), plural(2, "retry", "retries")], ["1 node", "2 nodes", "2 retries"]);
});

test("a request's bar has the parts that it reached, without gaps", () => {
  const split = { admitted: 1, body_read: 2, prefill_sent: 3, settled: 100, answer_sent: 101, first_piece: 130, end: 500 };
  assert.deepEqual(segments(split).map(({ part, from, to }) => [part, from, to]), [
    ["queue", 0, 1], ["body", 1, 2], ["dispatch", 2, 3], ["prefill", 3, 100], ["dispatch", 100, 101], ["decode", 101, 130], ["stream", 130, 500],
  ]);
  const waiting = { admitted: null, body_read: null, prefill_sent: null, settled: null, answer_sent: null, first_piece: null, end: 40 };
  assert.deepEqual(segments(waiting), [{ part: "queue", from: 0, to: 40 }]);
  assert.deepEqual(segments({ ...waiting, admitted: 30, body_read: 5 }).map(({ part }) => part), ["body", "queue", "dispatch"]);
  assert.deepEqual(segments({ ...split, settled: null, answer_sent: null, first_piece: null, end: 90 }).at(-1), { part: "prefill", from: 3, to: 90 });
  assert.equal(stripes({ ...waiting, end: 0 }, "linear"), "none");
  assert.match(stripes(split, "log"), /^linear-gradient\(90deg, var\(--queue\) 0\.00% .*100\.00%\)$/);
});

test("charts break where seconds are missing, and stack what is shown", () => {
  const ticks = [1000, 2000, 9000].map((at) => ({ at, seconds: 1, outcomes: { ok: 2, failed: 1 }, parts: { queue: 1, prefill: 2, dispatch: 3, decode: 4 }, engine: null }));
  assert.deepEqual(series.withGaps(ticks).at, [1, 2, 3, 9]);
  assert.equal(series.withGaps(ticks).rows[2], null);
  assert.equal(series.requestRate({ ...ticks[0], seconds: 2 }), 1.5);
  assert.equal(series.failures(ticks), 3);
  assert.equal(series.hitRate(ticks), null);
  assert.deepEqual(series.parts(ticks, 5), { at: [2.5, 7.5], columns: [[1, 1], [2, 2], [3, 3], [4, 4]] });
  assert.deepEqual(series.stacked([[1, 1], [2, null], [3, 3]], [true, true, true]), [[1, 1], [3, null], [6, 4]]);
  assert.deepEqual(series.stacked([[1], [2], [3]], [true, false, true]), [[1], [null], [4]]);
});

test("the key is found in what is pasted", () => {
  assert.equal(keyIn(" abc_DEF-1 "), "abc_DEF-1");
  assert.equal(keyIn("http://host:8000/dashboard/#key=abc%2Bd"), "abc+d");
  assert.equal(keyIn("#key=abc"), "abc");
  for (const wrong of ["", "  ", "two words", "schlüssel", "http://host/dashboard/", "#key=%zz"]) assert.equal(keyIn(wrong), null, wrong);
});
