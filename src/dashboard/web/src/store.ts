import { batch, signal } from "@preact/signals";
import type { Begin, Happening, Request, Status, Step, Tick } from "./types";

export const TICKS = 600;
export const REQUESTS = 200;
export const HAPPENINGS = 200;

/** A request with a number of its own: ids may be the clients' and need not differ. */
export type Row = Request & { number: number };
export type Event = Happening & { number: number };

export const status = signal<Status | null>(null);
export const ticks = signal<Tick[]>([]);
export const requests = signal<Row[]>([]);
export const happenings = signal<Event[]>([]);

export type Link = "connecting" | "live" | "lost";
export const link = signal<Link>("connecting");
/** When something was last heard, by this machine's clock. */
export const heard = signal(Date.now());
/** Set when pegaflow said that it stops, until it is back. */
export const ended = signal(false);
/** A second hand, for what is shown relative to now. */
export const second = signal(Date.now());

let numbers = 0;
const numbered = <T extends object>(item: T): T & { number: number } => ({ ...item, number: ++numbers });

function joined<T>(old: T[], more: T[], most: number): T[] {
  return more.length === 0 ? old : old.concat(more).slice(-most);
}

export function begin(state: Begin): void {
  batch(() => {
    status.value = state.status;
    ticks.value = state.ticks.slice(-TICKS);
    requests.value = state.requests.slice(-REQUESTS).map(numbered);
    happenings.value = state.happenings.slice(-HAPPENINGS).map(numbered);
    ended.value = false;
    link.value = "live";
  });
}

export function step(next: Step): void {
  batch(() => {
    status.value = next.status;
    ticks.value = joined(ticks.value, [next.tick], TICKS);
    requests.value = joined(requests.value, next.requests.map(numbered), REQUESTS);
    happenings.value = joined(happenings.value, next.happenings.map(numbered), HAPPENINGS);
  });
}

export function forget(): void {
  batch(() => {
    status.value = null;
    ticks.value = [];
    requests.value = [];
    happenings.value = [];
    ended.value = false;
    link.value = "connecting";
  });
}
