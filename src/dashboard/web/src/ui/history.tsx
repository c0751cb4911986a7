import { computed, signal } from "@preact/signals";
import { plural, when, words } from "../format";
import { DEATHS, phaseTone } from "../phases";
import { happenings, status } from "../store";
import { Pick, Toggle } from "./controls";
import { State } from "./icons";

const node = signal("");
const deaths = signal(false);

const matching = computed(() =>
  happenings.value.filter((one) => (node.value === "" || one.node === node.value) && (!deaths.value || DEATHS.has(one.to))).reverse(),
);

export function History() {
  const found = matching.value;
  const names = new Set([...(status.value?.nodes ?? []), ...happenings.value.map((one) => ({ name: one.node }))].map(({ name }) => name));
  return (
    <section id="history" aria-labelledby="history-title">
      <h2 id="history-title">History</h2>
      <div class="controls">
        <Pick label="Node" value={node} options={[...names]} />
        <Toggle label="Only deaths and restarts" on={deaths.value} press={() => (deaths.value = !deaths.value)} />
        <span class="dim">{plural(found.length, "event")}</span>
      </div>
      {found.length === 0 ? (
        <p class="dim">{happenings.value.length === 0 ? "Nothing has happened yet." : "Nothing like that has happened."}</p>
      ) : (
        <div class="wide tall" role="region" aria-labelledby="history-title" tabIndex={0}>
          <table class="history">
            <thead>
              <tr>
                <th scope="col">Time</th>
                <th scope="col">Node</th>
                <th scope="col">From</th>
                <th scope="col">To</th>
                <th scope="col" class="number">Restarts</th>
                <th scope="col">Reason</th>
              </tr>
            </thead>
            <tbody>
              {found.map((one) => (
                <tr key={one.number}>
                  <td>{when(one.at)}</td>
                  <td>{one.node}</td>
                  <td class="dim">{words(one.from)}</td>
                  <td>
                    <State tone={phaseTone(one.to)} word={words(one.to)} />
                  </td>
                  <td class="number">{one.restarts}</td>
                  <td class="why">{one.reason}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}
