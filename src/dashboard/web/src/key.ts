import { signal } from "@preact/signals";

const PLACE = "pegaflow-key";

/** The key that opens the API, or null where the page has none that works. */
export const key = signal<string | null>(null);
/** Why the page asks for a key. */
export const refused = signal(false);

/** The key in a pasted key or address, or null where it cannot be one. */
export function keyIn(text: string): string | null {
  const found = /[#&?]key=([^&#\s]+)/.exec(text);
  let candidate = found ? found[1]! : text.trim();
  if (found) {
    try {
      candidate = decodeURIComponent(candidate);
    } catch {
      return null;
    }
  }
  // Only what may stand in a header.
  return /^[!-~]+$/.test(candidate) && !candidate.includes("/dashboard") ? candidate : null;
}

// Storage may be blocked; the page then works until it is reloaded.
function remember(value: string | null): void {
  try {
    if (value === null) sessionStorage.removeItem(PLACE);
    else sessionStorage.setItem(PLACE, value);
  } catch {
    return;
  }
}

export function use(value: string): void {
  refused.value = false;
  key.value = value;
  remember(value);
}

export function drop(which: string): void {
  if (key.value !== which) return;
  refused.value = true;
  key.value = null;
  remember(null);
}

function fromAddress(): boolean {
  if (!/^#(.*&)?key=/.test(location.hash)) return false;
  const found = keyIn(location.hash);
  history.replaceState(null, "", location.pathname + location.search);
  if (found) use(found);
  return found !== null;
}

export function findKey(): void {
  addEventListener("hashchange", fromAddress);
  if (fromAddress()) return;
  try {
    const stored = sessionStorage.getItem(PLACE);
    if (stored) key.value = stored;
  } catch {
    return;
  }
}
