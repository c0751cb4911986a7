// What the back-end sends. Fields that are not named here are ignored.

export type Role = "prefill" | "decode" | "unified";
export type Phase =
  | "pending"
  | "starting"
  | "warming_up"
  | "verifying"
  | "ready"
  | "unreachable"
  | "down"
  | "draining"
  | "backoff"
  | "crash_loop"
  | "failed"
  | "stopping"
  | "stopped";

export interface Node {
  name: string;
  role: Role;
  phase: Phase;
  kv: "none" | "unproven" | "proven" | "assumed" | "refused";
  since: string;
  seconds_in_phase: number;
  restarts: number;
  incarnation: number;
  pid: number | null;
  address: string;
  pool: string | null;
  gpus: number[];
  cpus: number[];
  in_flight: number;
  reason: string | null;
  external: boolean;
}

export interface Gpu {
  index: number;
  uuid: string;
  name: string;
  answers: boolean;
  memory_used: number | null;
  memory_total: number | null;
  utilization_percent: number | null;
  temperature_celsius: number | null;
  ecc_uncorrected: number | null;
  xids: number | null;
  last_xid: number | null;
}

export interface Status {
  name: string;
  version: string;
  pid: number;
  state: "starting" | "ready" | "degraded" | "down" | "stopping";
  url: string;
  model: string;
  topology: string;
  logs: string;
  started: string;
  uptime_seconds: number;
  nodes: Node[];
  gpus: Gpu[];
}

export const OUTCOMES = ["ok", "client_error", "refused", "failed", "broken_off", "cancelled"] as const;
export type Outcome = (typeof OUTCOMES)[number];

export interface Spread {
  count: number;
  p50: number;
  p90: number;
  p99: number;
  max: number;
}

export interface Parts {
  queue: number;
  prefill: number;
  dispatch: number;
  decode: number;
}

export interface Engine {
  capacity_bytes: number;
  arena_bytes: number;
  slots: number;
  used: number;
  ready: number;
  pending: number;
  leased: number;
  handoffs_open: number;
  hits: number;
  misses: number;
  saved_bytes: number;
  loaded_bytes: number;
  handoffs_fired: number;
  handoffs_failed: number;
  evictions: number;
}

export interface NodeTick {
  sent: number;
  in_flight: number;
  tokens: number;
}

export interface Tick {
  at: number;
  seconds: number;
  outcomes: Partial<Record<Outcome, number>>;
  tokens: number;
  in_flight: number;
  queued: number;
  ttft: Spread | null;
  itl: Spread | null;
  tpot: Spread | null;
  parts: Parts | null;
  nodes: Record<string, NodeTick>;
  engine: Engine | null;
}

export interface Request {
  id: string;
  at: number;
  endpoint: string;
  way: "split" | "whole" | "none";
  reason: string;
  outcome: Outcome;
  status: number | null;
  prefill: string | null;
  answer: string | null;
  retries: number;
  tokens: number | null;
  admitted: number | null;
  body_read: number | null;
  prefill_sent: number | null;
  settled: number | null;
  answer_sent: number | null;
  first_piece: number | null;
  end: number;
}

export interface Happening {
  at: number;
  node: string;
  from: Phase;
  to: Phase;
  incarnation: number;
  restarts: number;
  reason: string | null;
}

export interface Begin {
  now: number;
  status: Status;
  ticks: Tick[];
  requests: Request[];
  happenings: Happening[];
}

export interface Step {
  tick: Tick;
  status: Status;
  requests: Request[];
  happenings: Happening[];
}
