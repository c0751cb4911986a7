import type { Signal } from "@preact/signals";
import { useId } from "preact/hooks";

interface PickProps {
  label: string;
  value: Signal<string>;
  options: string[];
  /** What the first choice, for no choice, is called. */
  none?: string;
  show?: (option: string) => string;
}

export function Pick({ label, value, options, none = "all", show = String }: PickProps) {
  const id = useId();
  // What was chosen stays there, even when the fleet no longer has it.
  const all = value.value !== "" && !options.includes(value.value) ? [...options, value.value] : options;
  return (
    <div class="control">
      <label for={id}>{label}</label>
      <select id={id} value={value.value} onChange={(event) => (value.value = event.currentTarget.value)}>
        <option value="">{none}</option>
        {all.map((one) => (
          <option key={one} value={one}>{show(one)}</option>
        ))}
      </select>
    </div>
  );
}

export function Search({ label, value }: { label: string; value: Signal<string> }) {
  const id = useId();
  return (
    <div class="control">
      <label for={id}>{label}</label>
      <input id={id} type="search" value={value.value} spellcheck={false} autocomplete="off" onInput={(event) => (value.value = event.currentTarget.value)} />
    </div>
  );
}

export function Toggle({ label, on, press }: { label: string; on: boolean; press: () => void }) {
  return (
    <button class="toggle" type="button" aria-pressed={on} onClick={press}>
      {label}
    </button>
  );
}
