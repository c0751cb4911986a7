import { batch, computed, signal } from "@preact/signals";
import { Component } from "preact";
import { clock, count, millis, NONE, plural, words } from "../format";
import { requests, status, type Row } from "../store";
import { OUTCOMES } from "../types";
import { PART_NAMES, place, stripes, type Part, type Scale } from "../waterfall";
import { Pick, Search, Toggle } from "./controls";
import { Details } from "./details";

const SHOWN = 100;

const outcome = signal("");
const way = signal("");
const node = signal("");
const text = signal("");
const scale = signal<Scale>("linear");
const frozen = signal<Row[] | null>(null);
const open = signal<number | null>(null);
/** Whether the list is held only for as long as a row is open, which would else be gone in a moment. */
const heldForRow = signal(false);

function toggleRow(number: number): void {
  batch(() => {
    if (open.value === number) {
      open.value = null;
      if (heldForRow.value) hold(false);
      return;
    }
    open.value = number;
    if (frozen.value === null) {
      hold(true);
      heldForRow.value = true;
    }
  });
}

function hold(held: boolean): void {
  frozen.value = held ? requests.value : null;
  heldForRow.value = false;
}

const OUTCOME_TONES: Record<string, string> = { ok: "good", failed: "bad", broken_off: "bad", refused: "warn", client_error: "warn" };
const OUTCOME_MARKS: Record<string, string> = { good: "✓", bad: "✕", warn: "!", idle: "–" };

const matching = computed(() => {
  const wanted = text.value.trim().toLowerCase();
  return (frozen.value ?? requests.value).filter(
    (row) =>
      (outcome.value === "" || row.outcome === outcome.value) &&
      (way.value === "" || row.way === way.value) &&
      (node.value === "" || row.prefill === node.value || row.answer === node.value) &&
      (wanted === "" || row.id.toLowerCase().includes(wanted)),
  );
});

function nodesOf({ prefill, answer }: Row): string {
  if (prefill && answer && prefill !== answer) return `${prefill} → ${answer}`;
  return answer ?? prefill ?? NONE;
}

interface LineProps {
  row: Row;
  scale: Scale;
  open: boolean;
}

/** Rows never change, so that a second with fifty new ones touches only those. */
class Line extends Component<LineProps> {
  override shouldComponentUpdate(next: LineProps): boolean {
    return next.row !== this.props.row || next.scale !== this.props.scale || next.open !== this.props.open;
  }

  override render({ row, scale: how, open: isOpen }: LineProps) {
    const tone = OUTCOME_TONES[row.outcome] ?? "idle";
    const toggle = () => toggleRow(row.number);
    return (
      <>
        <tr class={isOpen ? "line open" : "line"} onClick={toggle}>
          <td>{clock(row.at)}</td>
          <td class="id">
            <button
              type="button"
              class="bare"
              aria-expanded={isOpen}
              title={row.id}
              onClick={(event) => {
                event.stopPropagation();
                toggle();
              }}
            >
              {row.id}
            </button>
          </td>
          <td>{row.way}</td>
          <td>{nodesOf(row)}</td>
          <td class={`outcome ${tone}`}>
            <span aria-hidden="true">{OUTCOME_MARKS[tone]}</span> {words(row.outcome)}
            {row.retries > 0 && <span class="dim"> ({plural(row.retries, "retry", "retries")})</span>}
          </td>
          <td class="number">{millis(row.first_piece)}</td>
          <td class="number">{millis(row.end)}</td>
          <td class="number">{count(row.tokens)}</td>
          <td class="fall" aria-hidden="true">
            <div style={{ width: `calc(100% * ${place(row.end, how)} / var(--slowest))`, backgroundImage: stripes(row, how) }} />
          </td>
        </tr>
        {isOpen && (
          <tr class="details">
            <td colSpan={9}>
              <Details row={row} />
            </td>
          </tr>
        )}
      </>
    );
  }
}

function Table({ rows }: { rows: Row[] }) {
  const slowest = Math.max(1, ...rows.map((row) => row.end));
  const style: Record<string, string> = { "--slowest": String(place(slowest, scale.value)) };
  return (
    <div class="wide" role="region" aria-labelledby="requests-title" tabIndex={0}>
      <table class="requests" style={style}>
        <thead>
          <tr>
            <th scope="col">Time</th>
            <th scope="col">Request</th>
            <th scope="col">Way</th>
            <th scope="col">Nodes</th>
            <th scope="col">Outcome</th>
            <th scope="col" class="number">TTFT</th>
            <th scope="col" class="number">Total</th>
            <th scope="col" class="number">Tokens</th>
            <th scope="col" class="fall">
              0 <span class="end">{millis(slowest)}</span>
            </th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <Line key={row.number} row={row} scale={scale.value} open={open.value === row.number} />
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function Requests() {
  const all = frozen.value ?? requests.value;
  const found = matching.value;
  const rows = found.slice(-SHOWN).reverse();
  const names = new Set((status.value?.nodes ?? []).map(({ name }) => name));
  return (
    <section id="requests" aria-labelledby="requests-title">
      <h2 id="requests-title">Requests</h2>
      <div class="controls">
        <Pick label="Outcome" value={outcome} options={[...OUTCOMES]} show={words} />
        <Pick label="Way" value={way} options={["split", "whole", "none"]} />
        <Pick label="Node" value={node} options={[...names]} />
        <Search label="Id contains" value={text} />
        <Toggle label="Log scale" on={scale.value === "log"} press={() => (scale.value = scale.value === "log" ? "linear" : "log")} />
        <Toggle label="Pause" on={frozen.value !== null} press={() => hold(frozen.value === null)} />
        <span class="dim">
          {frozen.value && "Paused; "}
          {rows.length} of {plural(all.length, "last request")}
        </span>
      </div>
      <ul class="key" aria-hidden="true">
        {(Object.keys(PART_NAMES) as Part[]).map((part) => (
          <li key={part} class={part}>{PART_NAMES[part]}</li>
        ))}
      </ul>
      {rows.length > 0 ? <Table rows={rows} /> : <p class="dim">{all.length === 0 ? "No request has finished yet." : "No request is like that."}</p>}
    </section>
  );
}
