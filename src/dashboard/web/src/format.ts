// Figures as people read them. Everything takes null for "not known" and answers with a dash.

export const NONE = "–";
type Figure = number | null | undefined;

const known = (value: Figure): value is number => typeof value === "number" && Number.isFinite(value);

/** At most three significant figures, without an exponent. */
export function short(value: Figure): string {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9)}G`;
  if (size >= 1e6) return `${trim(value / 1e6)}M`;
  if (size >= 1e4) return `${trim(value / 1e3)}k`;
  return trim(value);
}

function trim(value: number): string {
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return String(Number(value.toFixed(size >= 10 ? 1 : 2)));
}

export function count(value: Figure): string {
  return known(value) ? String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f") : NONE;
}

/** A length of time given in milliseconds. */
export function millis(value: Figure): string {
  if (!known(value)) return NONE;
  if (value === 0) return "0 ms";
  if (value < 9.95) return `${value.toFixed(1)} ms`;
  if (value < 999.5) return `${Math.round(value)} ms`;
  if (value < 59_950) return `${(value / 1000).toFixed(value < 9_995 ? 2 : 1)} s`;
  return duration(value / 1000);
}

/** A length of time given in seconds: its two largest units. */
export function duration(seconds: Figure): string {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  const days = Math.floor(whole / 86_400);
  const hours = Math.floor((whole % 86_400) / 3_600);
  const minutes = Math.floor((whole % 3_600) / 60);
  if (days > 0) return `${days} d ${hours} h`;
  if (hours > 0) return `${hours} h ${minutes} min`;
  if (minutes > 0) return `${minutes} min ${whole % 60} s`;
  return `${whole} s`;
}

export function bytes(value: Figure): string {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let left = Math.abs(value);
  while (left >= 1024 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  const text = unit === 0 || left >= 100 ? left.toFixed(0) : left.toFixed(1);
  return `${value < 0 ? "-" : ""}${text} ${units[unit]}`;
}

/** A share of one, as a percentage. */
export function percent(share: Figure): string {
  if (!known(share)) return NONE;
  const value = share * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

/** The time of day, by this browser's clock and zone. */
export function clock(at: Figure, fine = false): string {
  if (!known(at)) return NONE;
  const date = new Date(at);
  if (Number.isNaN(date.getTime())) return NONE;
  const two = (part: number) => String(part).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  return fine ? `${time}.${String(date.getMilliseconds()).padStart(3, "0")}` : time;
}

/** The time of day, with the date where that is not today's. */
export function when(at: Figure, now = Date.now()): string {
  if (!known(at)) return NONE;
  const date = new Date(at);
  if (Number.isNaN(date.getTime()) || date.toDateString() === new Date(now).toDateString()) return clock(at);
  const two = (part: number) => String(part).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${clock(at)}`;
}

/** Numbers as ranges: 0–3, 8. */
export function ranges(numbers: readonly number[]): string {
  const sorted = [...new Set(numbers)].sort((a, b) => a - b);
  const parts: string[] = [];
  for (let start = 0; start < sorted.length; ) {
    let end = start;
    while (end + 1 < sorted.length && sorted[end + 1] === sorted[end]! + 1) end += 1;
    parts.push(start === end ? `${sorted[start]}` : `${sorted[start]}–${sorted[end]}`);
    start = end + 1;
  }
  return parts.join(", ");
}

/** Names from the wire, as words. */
export function words(name: string): string {
  return name.replaceAll("_", " ");
}

export function plural(number: number, one: string, many = `${one}s`): string {
  return `${count(number)} ${number === 1 ? one : many}`;
}
