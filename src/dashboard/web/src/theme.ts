import { effect, signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";
export const THEMES: readonly Theme[] = ["system", "light", "dark"];
const PLACE = "pegaflow-theme";

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const systemIsDark = signal(darkSystem.matches);
export const theme = signal<Theme>(stored());
/** Counts the changes of colours, for what is drawn on a canvas. */
export const colours = signal(0);

function stored(): Theme {
  try {
    const value = localStorage.getItem(PLACE);
    return THEMES.find((one) => one === value) ?? "system";
  } catch {
    return "system";
  }
}

export function choose(value: Theme): void {
  theme.value = value;
  try {
    localStorage.setItem(PLACE, value);
  } catch {
    // It then holds until the page is closed.
  }
}

const known = new Map<string, string>();

/** A colour of the style sheet, for a canvas. */
export function colour(name: string): string {
  let value = known.get(name);
  if (value === undefined) {
    value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    known.set(name, value);
  }
  return value;
}

export function applyTheme(): void {
  darkSystem.addEventListener("change", (event) => (systemIsDark.value = event.matches));
  effect(() => {
    const dark = theme.value === "dark" || (theme.value === "system" && systemIsDark.value);
    document.documentElement.dataset["theme"] = dark ? "dark" : "light";
    known.clear();
    colours.value = colours.peek() + 1;
  });
}
