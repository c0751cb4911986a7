import { effect, untracked } from "@preact/signals";
import { ask } from "./api";
import { key } from "./key";
import { Events } from "./sse";
import { begin, ended, forget, heard, link, status, step } from "./store";
import type { Begin, Status, Step } from "./types";

const SILENCE = 25_000;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 10_000;
// A connection that held so long was a good one: the next try may come soon.
const LASTING = 3_000;

let wake: (() => void) | null = null;

function pause(length: number, signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    const finish = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", finish);
      wake = null;
      done();
    };
    const timer = setTimeout(finish, length);
    wake = finish;
    signal.addEventListener("abort", finish, { once: true });
  });
}

function take(name: string, data: string): void {
  if (name === "begin") begin(JSON.parse(data) as Begin);
  else if (name === "tick") step(JSON.parse(data) as Step);
  else if (name === "status") status.value = JSON.parse(data) as Status;
  else if (name === "end") ended.value = true;
}

/** Follows the events of one connection until it ends. */
async function follow(stop: AbortSignal): Promise<void> {
  const connection = new AbortController();
  const abort = () => connection.abort();
  stop.addEventListener("abort", abort, { once: true });
  let watch = setTimeout(abort, SILENCE);
  try {
    const response = await ask("events", { signal: connection.signal });
    if (!response.ok || !response.body) {
      abort();
      return;
    }
    const reader = response.body.getReader();
    const events = new Events();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(watch);
      watch = setTimeout(abort, SILENCE);
      heard.value = Date.now();
      for (const event of events.feed(value)) take(event.name, event.data);
    }
  } catch {
    // Whatever went wrong, the answer is the same: connect again. The rest of a broken stream is of no use.
    abort();
  } finally {
    clearTimeout(watch);
    stop.removeEventListener("abort", abort);
  }
}

async function keepFollowing(stop: AbortSignal): Promise<void> {
  let wait = FIRST_WAIT;
  while (!stop.aborted) {
    const started = Date.now();
    await follow(stop);
    if (Date.now() - started > LASTING) wait = FIRST_WAIT;
    if (stop.aborted) return;
    link.value = "lost";
    await pause(wait * (0.75 + Math.random() / 2), stop);
    wait = Math.min(wait * 2, LONGEST_WAIT);
  }
}

/** Stays connected for as long as there is a key. */
export function connect(): void {
  const now = () => {
    if (document.visibilityState === "visible") wake?.();
  };
  addEventListener("online", now);
  document.addEventListener("visibilitychange", now);
  effect(() => {
    if (key.value === null) {
      untracked(forget);
      return;
    }
    const stop = new AbortController();
    void keepFollowing(stop.signal);
    return () => stop.abort();
  });
}
