import { millis, percent, short } from "../format";
import { column, failures, hitRate, loadedRate, mean, occupancy, outcomes, parts, requestRate, rolling, savedRate, spread, tokenRate, withGaps } from "../series";
import { status, ticks } from "../store";
import type { Tick } from "../types";
import { Chart, type ChartOf, type Figures, type Line } from "./chart";

const megabytes = (value: number | null | undefined) => `${short(value)} MB`;
const LONG = [7, 4];
const DOTS = [2, 3];

const times = (id: string, title: string, about: string, ranks: ("p50" | "p90" | "p99")[]): ChartOf => {
  const looks = { p50: { colour: "--c1" }, p90: { colour: "--c2", dash: LONG }, p99: { colour: "--c3", dash: DOTS } };
  return { id, title, about, lines: ranks.map((rank): Line => ({ name: rank, text: millis, ...looks[rank] })) };
};

const TTFT = times("ttft", "Time to first token", "over 10 s", ["p50", "p90", "p99"]);
const ITL = times("itl", "Inter-token latency", "over 10 s", ["p50", "p99"]);
const TPOT = times("tpot", "Time per output token", "over 10 s", ["p50", "p99"]);
const RATE: ChartOf = {
  id: "rate",
  title: "Throughput",
  about: "a second, mean of 5 s",
  lines: [
    { name: "requests", colour: "--c1", text: short },
    { name: "tokens (right)", colour: "--c2", dash: LONG, right: true, text: short },
  ],
};
const LOAD: ChartOf = {
  id: "load",
  title: "Requests here",
  lines: [
    { name: "in flight", colour: "--c1", text: short },
    { name: "queued", colour: "--c3", dash: DOTS, text: short },
  ],
};
const PARTS: ChartOf = {
  id: "parts",
  title: "Time to first token, by part",
  about: "mean of 5 s",
  bars: true,
  lines: [
    { name: "queue", colour: "--queue", text: millis },
    { name: "prefill", colour: "--prefill", text: millis },
    { name: "dispatch", colour: "--dispatch", text: millis },
    { name: "decode", colour: "--decode", text: millis },
  ],
};
const FAILED: ChartOf = {
  id: "failed",
  title: "Not answered",
  about: "in a minute",
  lines: [
    { name: "failed", colour: "--c1", text: short },
    { name: "refused", colour: "--c2", dash: LONG, text: short },
    { name: "client errors", colour: "--c3", dash: DOTS, text: short },
  ],
};
const STORE: ChartOf = {
  id: "store",
  title: "KV store",
  about: "hit rate over 10 s",
  full: 1,
  lines: [
    { name: "in use", colour: "--c1", text: percent },
    { name: "hit rate", colour: "--c2", dash: LONG, text: percent },
  ],
};
const MOVED: ChartOf = {
  id: "moved",
  title: "KV moved",
  about: "a second",
  lines: [
    { name: "saved", colour: "--c1", text: megabytes },
    { name: "loaded", colour: "--c2", dash: LONG, text: megabytes },
  ],
};

function figures(all: Tick[]): Map<ChartOf, Figures> {
  const { at, rows } = withGaps(all);
  const of = (...each: ((tick: Tick) => number | null)[]): Figures => ({ at, columns: each.map((one) => column(rows, one)) });
  return new Map([
    [TTFT, of(spread("ttft", "p50"), spread("ttft", "p90"), spread("ttft", "p99"))],
    [ITL, of(spread("itl", "p50"), spread("itl", "p99"))],
    [TPOT, of(spread("tpot", "p50"), spread("tpot", "p99"))],
    [RATE, { at, columns: [requestRate, tokenRate].map((one) => rolling(rows, 5, mean(one))) }],
    [LOAD, of((tick) => tick.in_flight, (tick) => tick.queued)],
    [FAILED, { at, columns: [failures, outcomes("refused"), outcomes("client_error")].map((one) => rolling(rows, 60, one)) }],
    [PARTS, parts(all, 5)],
    [STORE, { at, columns: [column(rows, (tick) => occupancy(tick.engine)), rolling(rows, 10, hitRate)] }],
    [MOVED, of(savedRate, loadedRate)],
  ]);
}

/** Charts that can never show anything on this fleet are left out. */
function wanted(all: Tick[]): ChartOf[] {
  const split = status.value?.nodes.some((node) => node.role !== "unified") || all.some((tick) => tick.parts);
  const store = split || all.some((tick) => tick.engine);
  return [TTFT, ITL, TPOT, RATE, LOAD, FAILED, ...(split ? [PARTS] : []), ...(store ? [STORE, MOVED] : [])];
}

export function Charts() {
  const all = ticks.value;
  const data = figures(all);
  return (
    <section id="charts" aria-labelledby="charts-title">
      <h2 id="charts-title">Last 10 minutes</h2>
      {all.length === 0 ? (
        <p class="dim">No figures yet.</p>
      ) : (
        <div class="charts">
          {wanted(all).map((chart) => (
            <Chart key={chart.id} chart={chart} figures={data.get(chart)!} />
          ))}
        </div>
      )}
    </section>
  );
}
