// Fleets that never were, with figures that look like those of real ones. The same seed gives the same figures.

const GIB = 2 ** 30;

export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function node(name, role, more = {}) {
  return {
    name,
    role,
    phase: "ready",
    kv: role === "unified" ? "none" : "proven",
    since: "2026-01-01T10:00:00Z",
    seconds_in_phase: 3725,
    restarts: 0,
    incarnation: 1,
    pid: 4200,
    address: "127.0.0.1:8100",
    pool: null,
    gpus: [],
    cpus: [],
    in_flight: 0,
    reason: null,
    external: false,
    not_known_yet: { ignored: true },
    ...more,
  };
}

function gpu(index, next) {
  return {
    index,
    uuid: `GPU-00000000-0000-0000-0000-00000000000${index % 10}`,
    name: "NVIDIA H100 80GB HBM3",
    answers: true,
    memory_used: (58 + 14 * next()) * GIB,
    memory_total: 80 * GIB,
    utilization_percent: Math.round(35 + 60 * next()),
    temperature_celsius: 61,
    ecc_uncorrected: 0,
    xids: 0,
    last_xid: null,
  };
}

const REASON =
  "exited with status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.44 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.02 GiB is free.";

function happenings(now, steps) {
  return steps.map(([ago, name, from, to, restarts = 0, reason = null]) => ({
    at: now - ago * 1000,
    node: name,
    from,
    to,
    incarnation: restarts + 1,
    restarts,
    reason,
  }));
}

const up = (ago, name) => [
  [ago, name, "pending", "starting"],
  [ago - 40, name, "starting", "warming_up"],
  [ago - 55, name, "warming_up", "verifying"],
  [ago - 58, name, "verifying", "ready"],
];

/** What each scenario is of: nodes, GPUs, history, and how much load there is. */
export function scenario(name, now, next) {
  const base = { state: "ready", nodes: [], gpus: [], happenings: [], load: 0, engine: false };
  const gpus = (count) => Array.from({ length: count }, (_, index) => gpu(index, next));
  switch (name) {
    case "none":
      return { ...base, state: "starting" };
    case "one":
      return {
        ...base,
        nodes: [node("vllm", "unified", { cpus: [0, 1, 2, 3, 8, 9, 10, 11] })],
        happenings: happenings(now, up(3790, "vllm")),
        load: 2,
      };
    case "pair":
      return {
        ...base,
        nodes: [node("prefill-0", "prefill", { gpus: [0] }), node("decode-0", "decode", { gpus: [1], restarts: 1, incarnation: 2 })],
        gpus: gpus(2),
        happenings: happenings(now, [
          ...up(3790, "prefill-0"),
          ...up(3788, "decode-0"),
          [1900, "decode-0", "ready", "down", 0, "killed by signal 9"],
          [1899, "decode-0", "down", "backoff", 1, "killed by signal 9"],
          ...up(1890, "decode-0"),
        ]),
        load: 6,
        engine: true,
      };
    case "sixteen": {
      const of = (role, from) => Array.from({ length: 8 }, (_, index) => node(`${role}-${index}`, role, { gpus: [from + index] }));
      const nodes = [...of("prefill", 0), ...of("decode", 8)];
      Object.assign(nodes[3], { phase: "warming_up", seconds_in_phase: 14, reason: null });
      Object.assign(nodes[12], { phase: "draining", seconds_in_phase: 6 });
      Object.assign(nodes[15], { external: true, restarts: 0, gpus: [15] });
      return { ...base, nodes, gpus: gpus(16), happenings: happenings(now, nodes.flatMap((one) => up(3790, one.name))), load: 48, engine: true };
    }
    case "crashing":
      return {
        ...base,
        state: "degraded",
        nodes: [
          node("prefill-0", "prefill", { gpus: [0] }),
          node("decode-0", "decode", { gpus: [1], phase: "crash_loop", kv: "unproven", seconds_in_phase: 42, restarts: 5, incarnation: 6, pid: null, reason: REASON }),
          node("spare", "unified", { gpus: [2] }),
        ],
        gpus: gpus(3).map((one) => (one.index === 1 ? { ...one, memory_used: 1.1 * GIB, utilization_percent: 0, last_xid: 31, xids: 1 } : one)),
        happenings: happenings(now, [
          ...up(900, "prefill-0"),
          ...up(900, "spare"),
          ...up(895, "decode-0"),
          ...[1, 2, 3, 4, 5].flatMap((time) => [
            [700 - time * 100, "decode-0", time === 1 ? "ready" : "starting", "down", time - 1, REASON],
            [699 - time * 100, "decode-0", "down", time === 5 ? "crash_loop" : "backoff", time, REASON],
            ...(time === 5 ? [] : [[690 - time * 100, "decode-0", "backoff", "starting", time]]),
          ]),
        ]),
        load: 3,
        engine: true,
      };
    case "preparing":
      return {
        ...base,
        state: "starting",
        nodes: [
          node("prefill-0", "prefill", { phase: "warming_up", kv: "unproven", seconds_in_phase: 9, gpus: [0] }),
          node("decode-0", "decode", { phase: "starting", kv: "unproven", seconds_in_phase: 31, gpus: [1] }),
        ],
        gpus: gpus(2).map((one) => ({ ...one, answers: one.index === 0, memory_used: null, utilization_percent: null })),
      };
    default:
      throw new Error(`there is no scenario ${name}`);
  }
}

export function tick(at, fleet, next, place) {
  const wave = 1 + 0.35 * Math.sin(place / 37);
  const rate = fleet.load * wave;
  const ok = Math.round(rate + (next() - 0.5) * Math.sqrt(rate));
  const idle = fleet.load === 0;
  const spread = (middle) => {
    const p50 = middle * (0.9 + 0.2 * next()) * wave;
    return { count: ok * 10, p50, p90: p50 * 1.7, p99: p50 * (2.4 + next()), max: p50 * 4 };
  };
  const split = fleet.engine && !idle;
  const failed = fleet.state === "degraded" && next() < 0.08 ? 1 : 0;
  const serving = fleet.nodes.filter((one) => one.phase === "ready" || one.phase === "draining");
  const nodes = {};
  for (const one of serving) {
    const peers = serving.filter((other) => other.role === one.role).length;
    const share = Math.round((ok / peers) * (0.7 + 0.6 * next()));
    nodes[one.name] = { sent: share, in_flight: Math.round(share * 1.6), tokens: Math.round(share * 1.6) * 1900 };
  }
  return {
    at,
    seconds: 1,
    outcomes: { ok: Math.max(0, ok), client_error: next() < 0.05 && !idle ? 1 : 0, refused: 0, failed, broken_off: 0, cancelled: 0 },
    tokens: Math.max(0, ok) * 110,
    in_flight: Math.round(rate * 2.2),
    queued: Math.max(0, Math.round((wave - 1.15) * fleet.load)),
    ttft: idle ? null : spread(180),
    itl: idle ? null : spread(11),
    tpot: idle ? null : spread(12),
    parts: split && next() < 0.9 ? { queue: 4 + 60 * Math.max(0, wave - 1.1), prefill: 120 * wave, dispatch: 2, decode: 34 + 10 * next() } : null,
    nodes,
    engine: fleet.engine
      ? {
          capacity_bytes: 64 * GIB,
          arena_bytes: 64 * GIB,
          slots: 16384,
          used: Math.round(16384 * Math.min(0.96, 0.3 + place / 900)),
          ready: 9000,
          pending: 12,
          leased: 40,
          handoffs_open: Math.round(rate),
          hits: Math.round(rate * 6 * next()),
          misses: Math.round(rate * 3),
          saved_bytes: rate * 42e6 * (0.8 + 0.4 * next()),
          loaded_bytes: rate * 55e6 * (0.8 + 0.4 * next()),
          handoffs_fired: ok,
          handoffs_failed: 0,
          evictions: 0,
        }
      : null,
  };
}

export function request(number, at, fleet, next) {
  const serving = (role) => fleet.nodes.filter((one) => one.role === role && one.phase === "ready");
  const pick = (some) => some[Math.floor(next() * some.length)]?.name ?? null;
  const split = serving("prefill").length > 0 && serving("decode").length > 0 && next() < 0.85;
  const luck = next();
  const outcome = luck < 0.9 ? "ok" : luck < 0.94 ? "client_error" : luck < 0.96 ? "cancelled" : luck < 0.98 ? "failed" : "broken_off";
  const admitted = next() < 0.7 ? 0.3 : 80 * next();
  const body_read = admitted + 0.4 + next();
  const answer = split ? pick(serving("decode")) : (pick(serving("unified")) ?? pick(serving("prefill")));
  const base = { id: `cmpl-${(number * 2654435761 >>> 0).toString(16).padStart(8, "0")}-${number}`, at, endpoint: next() < 0.5 ? "chat" : "completions", outcome, retries: next() < 0.03 ? 1 : 0 };
  if (outcome === "client_error")
    return { ...base, way: "none", reason: "", status: 400, prefill: null, answer: null, tokens: null, admitted, body_read, prefill_sent: null, settled: null, answer_sent: null, first_piece: null, end: body_read + 0.3 };
  const prefill_sent = split ? body_read + 0.4 : null;
  const settled = split ? prefill_sent + 60 + 180 * next() : null;
  const answer_sent = (settled ?? body_read) + 0.8;
  const first_piece = outcome === "failed" ? null : answer_sent + (split ? 30 : 150) + 30 * next();
  const tokens = first_piece === null ? null : Math.round(20 + 200 * next());
  return {
    ...base,
    way: split ? "split" : "whole",
    reason: split ? "" : "the prompt is short",
    status: outcome === "failed" ? 502 : 200,
    prefill: split ? pick(serving("prefill")) : null,
    answer,
    tokens,
    admitted,
    body_read,
    prefill_sent,
    settled,
    answer_sent,
    first_piece,
    end: first_piece === null ? answer_sent + 20 : first_piece + tokens * 11,
  };
}
