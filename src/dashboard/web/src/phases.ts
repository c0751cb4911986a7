import type { Phase, Status } from "./types";

/** How something stands; each has a shape and a colour of its own. */
export type Tone = "good" | "busy" | "warn" | "bad" | "idle";

const TONES: Record<Phase, Tone> = {
  pending: "idle",
  starting: "busy",
  warming_up: "busy",
  verifying: "busy",
  ready: "good",
  unreachable: "bad",
  down: "bad",
  draining: "warn",
  backoff: "warn",
  crash_loop: "bad",
  failed: "bad",
  stopping: "idle",
  stopped: "idle",
};

const STATES: Record<Status["state"], Tone> = { starting: "busy", ready: "good", degraded: "warn", down: "bad", stopping: "idle" };

export const phaseTone = (phase: string): Tone => TONES[phase as Phase] ?? "idle";
export const stateTone = (state: string): Tone => STATES[state as Status["state"]] ?? "idle";

export const DEATHS: ReadonlySet<string> = new Set(["backoff", "crash_loop", "failed", "unreachable", "down"]);
