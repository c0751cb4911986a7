import { bytes, millis, percent, short } from "../format";
import { failures, hitRate, mean, occupancy, outcomes, requestRate, sum, tokenRate } from "../series";
import { ticks } from "../store";

interface Tile {
  name: string;
  value: string;
  about: string;
  bad?: boolean;
}

function tiles(): Tile[] {
  const all = ticks.value;
  const last = all.at(-1);
  const minute = all.slice(-60);
  const failed = failures(minute);
  const refused = outcomes("refused")(minute);
  const engine = last?.engine ?? null;
  const lookups = sum(minute.map((tick) => (tick.engine?.hits ?? 0) + (tick.engine?.misses ?? 0)));
  return [
    { name: "Requests", value: short(mean(requestRate)(all.slice(-10))), about: "a second" },
    { name: "Tokens", value: short(mean(tokenRate)(all.slice(-10))), about: "a second" },
    { name: "In flight", value: short(last?.in_flight), about: "requests" },
    { name: "Queued", value: short(last?.queued), about: "requests", bad: (last?.queued ?? 0) > 0 },
    { name: "TTFT p50", value: millis(last?.ttft?.p50), about: `p99 ${millis(last?.ttft?.p99)}` },
    { name: "ITL p50", value: millis(last?.itl?.p50), about: `p99 ${millis(last?.itl?.p99)}` },
    {
      name: "Failures",
      value: short(failed),
      about: refused > 0 ? `in a minute; ${refused} refused` : "in the last minute",
      bad: failed > 0,
    },
    {
      name: "Store in use",
      value: percent(occupancy(engine)),
      about: engine ? `of ${bytes(engine.capacity_bytes)}` : "no figures",
    },
    {
      name: "Hit rate",
      value: percent(hitRate(minute)),
      about: engine ? (lookups > 0 ? "in the last minute" : "no look-ups") : "no figures",
    },
  ];
}

export function Tiles() {
  return (
    <section id="now" aria-labelledby="now-title">
      <h2 id="now-title">Now</h2>
      <dl class="tiles">
        {tiles().map(({ name, value, about, bad }) => (
          <div key={name} class={bad ? "tile attention" : "tile"}>
            <dt>{name}</dt>
            <dd>
              <strong>{value}</strong> <span class="dim">{about}</span>
            </dd>
          </div>
        ))}
      </dl>
    </section>
  );
}
