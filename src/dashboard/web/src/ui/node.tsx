import { bytes, duration, percent, plural, ranges, short, words } from "../format";
import { phaseTone } from "../phases";
import type { Gpu, Node, NodeTick } from "../types";
import type { Action } from "../api";
import { propose, VERBS } from "./actions";
import { State } from "./icons";

function GpuRow({ index, gpu }: { index: number; gpu: Gpu | undefined }) {
  const used = gpu?.memory_used ?? null;
  const total = gpu?.memory_total ?? null;
  const share = used !== null && total ? used / total : null;
  const busy = gpu?.utilization_percent ?? null;
  const trouble = [
    gpu && !gpu.answers ? "does not answer" : "",
    gpu?.ecc_uncorrected ? plural(gpu.ecc_uncorrected, "memory error") : "",
    gpu?.last_xid != null ? `Xid ${gpu.last_xid}` : "",
  ].filter(Boolean);
  return (
    <div class="gpu">
      <span title={gpu?.name}>GPU {index}</span>
      <span class="meter" aria-hidden="true">
        <span style={{ width: `${Math.min(100, 100 * (share ?? 0))}%` }} />
      </span>
      <span title={used === null ? "" : `${bytes(used)} of ${bytes(total)}`}>
        {bytes(used)}
        {total !== null && <span class="total dim"> of {bytes(total)}</span>}
      </span>
      <span>{busy === null ? "–" : percent(busy / 100)}</span>
      {trouble.length > 0 && <span class="trouble">{trouble.join(", ")}</span>}
    </div>
  );
}

function Act({ action, node }: { action: Action; node: Node }) {
  return (
    <button class="small" type="button" aria-label={`${VERBS[action]} ${node.name}`} onClick={() => propose(action, node)}>
      {VERBS[action]}
    </button>
  );
}

export function NodeCard({ node, tick, gpus }: { node: Node; tick: NodeTick | undefined; gpus: Gpu[] }) {
  const tone = phaseTone(node.phase);
  return (
    <article class={`node ${tone}`} aria-label={`${node.name}, ${node.role}`} data-node={node.name}>
      <div class="title">
        <h4>{node.name}</h4>
        <span class="role">{node.external ? `${node.role}, external` : node.role}</span>
      </div>
      <div class="phase">
        <State tone={tone} word={words(node.phase)} />
        <span class="dim">{duration(node.seconds_in_phase)}</span>
      </div>
      <p class="counts">
        <span>
          <b>{short(tick?.in_flight ?? node.in_flight)}</b> in flight
        </span>
        <span>
          <b>{short(tick?.sent ?? 0)}</b> req/s
        </span>
        <span>
          <b>{short(tick?.tokens ?? 0)}</b> tokens here
        </span>
        <span class={node.restarts > 0 ? "restarted" : ""}>
          <b>{node.restarts}</b> {node.restarts === 1 ? "restart" : "restarts"}
        </span>
      </p>
      {node.gpus.map((index) => (
        <GpuRow key={index} index={index} gpu={gpus.find((gpu) => gpu.index === index)} />
      ))}
      {node.gpus.length === 0 && node.cpus.length > 0 && <p class="dim cpus">CPUs {ranges(node.cpus)}</p>}
      {node.kv === "refused" && <p class="reason">KV transfer refused</p>}
      {(node.kv === "unproven" || node.kv === "assumed") && <p class="dim cpus">KV transfer {node.kv}</p>}
      {node.phase !== "ready" && node.reason && <p class="reason">{node.reason}</p>}
      {!node.external && (
        <div class="acts">
          <Act key="drain" action={node.phase === "draining" ? "undrain" : "drain"} node={node} />
          <Act key="restart" action="restart" node={node} />
        </div>
      )}
    </article>
  );
}
