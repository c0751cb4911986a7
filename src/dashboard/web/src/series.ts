import type { Engine, Outcome, Spread, Tick } from "./types";

export type Column = (number | null)[];

/** The ticks with nothing where seconds are missing, so that no line is drawn across. */
export function withGaps(ticks: readonly Tick[]): { at: number[]; rows: (Tick | null)[] } {
  const at: number[] = [];
  const rows: (Tick | null)[] = [];
  for (const tick of ticks) {
    const before = at.at(-1);
    if (before !== undefined && tick.at / 1000 - before > 3) {
      at.push(before + 1);
      rows.push(null);
    }
    at.push(tick.at / 1000);
    rows.push(tick);
  }
  return { at, rows };
}

export const sum = (numbers: Iterable<number | undefined>): number => {
  let total = 0;
  for (const number of numbers) total += number ?? 0;
  return total;
};

export const finished = (tick: Tick): number => sum(Object.values(tick.outcomes));

const perSecond = (amount: number, tick: Tick): number => amount / (tick.seconds > 0 ? tick.seconds : 1);

export function column(rows: Some, figure: (tick: Tick) => number | null): Column {
  return rows.map((tick) => (tick ? figure(tick) : null));
}

export const spread = (which: "ttft" | "itl" | "tpot", rank: keyof Spread) => (tick: Tick) => tick[which]?.[rank] ?? null;
export const requestRate = (tick: Tick): number => perSecond(finished(tick), tick);
export const tokenRate = (tick: Tick): number => perSecond(tick.tokens, tick);
type Some = readonly (Tick | null)[];

export const outcomes = (which: Outcome) => (some: Some) => sum(some.map((tick) => tick?.outcomes[which]));
export const failures = (some: Some): number => outcomes("failed")(some) + outcomes("broken_off")(some);
export const savedRate = (tick: Tick): number | null => (tick.engine ? perSecond(tick.engine.saved_bytes, tick) / 1e6 : null);
export const loadedRate = (tick: Tick): number | null => (tick.engine ? perSecond(tick.engine.loaded_bytes, tick) / 1e6 : null);

export function occupancy(engine: Engine | null): number | null {
  return engine && engine.slots > 0 ? engine.used / engine.slots : null;
}

/** Hits per look-up over some ticks; null where nothing was looked up. */
export function hitRate(ticks: Some): number | null {
  const hits = sum(ticks.map((tick) => tick?.engine?.hits));
  const all = hits + sum(ticks.map((tick) => tick?.engine?.misses));
  return all > 0 ? hits / all : null;
}

export function rolling(rows: Some, length: number, figure: (some: Some) => number | null): Column {
  return rows.map((tick, place) => (tick ? figure(rows.slice(Math.max(0, place + 1 - length), place + 1)) : null));
}

const PARTS = ["queue", "prefill", "dispatch", "decode"] as const;

/** The mean parts of split requests in slots of some seconds: single seconds are too thin to see. */
export function parts(ticks: readonly Tick[], seconds: number): { at: number[]; columns: Column[] } {
  const slots = new Map<number, { count: number; sums: number[] }>();
  for (const tick of ticks) {
    const start = Math.floor(tick.at / 1000 / seconds) * seconds;
    const slot = slots.get(start) ?? { count: 0, sums: [0, 0, 0, 0] };
    slots.set(start, slot);
    if (!tick.parts) continue;
    slot.count += 1;
    for (const [place, part] of PARTS.entries()) slot.sums[place]! += tick.parts[part];
  }
  const columns = PARTS.map((_, place) => [...slots.values()].map(({ count, sums }) => (count > 0 ? sums[place]! / count : null)));
  return { at: [...slots.keys()].map((start) => start + seconds / 2), columns };
}

/** Each column on top of those before it; those that are not shown take no room. */
export function stacked(columns: readonly Column[], shown: readonly boolean[]): Column[] {
  const height: number[] = (columns[0] ?? []).map(() => 0);
  return columns.map((figures, place) =>
    figures.map((figure, row) => {
      if (!shown[place] || figure === null) return null;
      height[row]! += figure;
      return height[row]!;
    }),
  );
}

/** The mean of a figure over some ticks; null where none is known. */
export const mean = (figure: (tick: Tick) => number | null) => (some: Some) => {
  const known = some.map((tick) => tick && figure(tick)).filter((value) => value !== null);
  return known.length > 0 ? sum(known) / known.length : null;
};
