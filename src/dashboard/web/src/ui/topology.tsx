import { bytes, count, percent, plural, short } from "../format";
import { occupancy, requestRate } from "../series";
import { phaseTone } from "../phases";
import { status, ticks } from "../store";
import type { Engine, Node, Role } from "../types";
import { Edges, type Link } from "./edges";
import { NodeCard } from "./node";

const NAMES: Record<Role, string> = { prefill: "Prefill", decode: "Decode", unified: "Unified" };
/** More nodes than this in a pool stand side by side. */
const FEW = 4;

function Pool({ role, nodes }: { role: Role; nodes: Node[] }) {
  const last = ticks.value.at(-1);
  const style: Record<string, string> = { "--nodes": String(nodes.length) };
  return (
    <section style={style} class={`pool ${role} ${nodes.length > FEW ? "many" : "few"}`} data-port={`pool:${role}`} aria-labelledby={`pool-${role}`}>
      <h3 id={`pool-${role}`}>
        {NAMES[role]} <span class="dim">{plural(nodes.length, "node")}</span>
      </h3>
      <div class="cards">
        {nodes.map((node) => (
          <div key={node.name} data-port={`node:${node.name}`}>
            <NodeCard node={node} tick={last?.nodes[node.name]} gpus={status.value?.gpus ?? []} />
          </div>
        ))}
      </div>
    </section>
  );
}

function Store({ engine }: { engine: Engine | null }) {
  const used = occupancy(engine);
  return (
    <section class="place store" data-port="engine" aria-labelledby="store-title">
      <h3 id="store-title">KV store</h3>
      <p class="dim">Shared memory</p>
      {engine ? (
        <>
          <span class="meter" aria-hidden="true">
            <span style={{ width: `${Math.min(100, 100 * (used ?? 0))}%` }} />
          </span>
          <dl class="pairs">
            <dt>In use</dt>
            <dd>{percent(used)}</dd>
            <dt>Slots</dt>
            <dd>{count(engine.slots)}</dd>
            <dt>Size</dt>
            <dd>{bytes(engine.capacity_bytes)}</dd>
            <dt>Hand-offs</dt>
            <dd>{count(engine.handoffs_open)} open</dd>
            {engine.handoffs_failed > 0 && (
              <>
                <dt>Failed</dt>
                <dd class="wrong">{count(engine.handoffs_failed)}</dd>
              </>
            )}
          </dl>
        </>
      ) : (
        <p class="dim">No figures yet</p>
      )}
    </section>
  );
}

function links(nodes: Node[]): Link[] {
  const last = ticks.value.at(-1);
  const all: Link[] = [{ from: "clients", to: "router", pool: null, flow: last ? requestRate(last) : 0, rest: "quiet" }];
  for (const { name, role, phase } of nodes) {
    const flow = last?.nodes[name]?.sent ?? 0;
    const tone = phaseTone(phase);
    const rest = tone === "bad" || phase === "backoff" ? "broken" : tone === "good" || phase === "draining" ? "quiet" : "waiting";
    const ends: [string, string][] | undefined = {
      prefill: [["router", `node:${name}`], [`node:${name}`, "engine"]] as [string, string][],
      decode: [["engine", `node:${name}`]] as [string, string][],
      unified: [["router", `node:${name}`]] as [string, string][],
    }[role];
    for (const [from, to] of ends ?? []) all.push({ from, to, pool: role, flow, rest });
  }
  return all;
}

export function Topology() {
  const nodes = status.value?.nodes ?? [];
  const last = ticks.value.at(-1);
  const of = (role: Role) => nodes.filter((node) => node.role === role);
  const [prefill, decode, unified] = [of("prefill"), of("decode"), of("unified")];
  const split = prefill.length + decode.length > 0;
  const engine = last?.engine ?? null;
  return (
    <section id="topology" aria-labelledby="topology-title">
      <h2 id="topology-title">Topology</h2>
      <div class={`map ${split || engine ? "split" : "plain"}`}>
        <Edges links={links(nodes)} />
        <section class="place clients" data-port="clients" aria-labelledby="clients-title">
          <h3 id="clients-title">Clients</h3>
          <p>
            <b>{short(last ? requestRate(last) : null)}</b> req/s
          </p>
        </section>
        <section class="place router" data-port="router" aria-labelledby="router-title">
          <h3 id="router-title">Router</h3>
          <p>
            <b>{short(last?.in_flight)}</b> in flight
          </p>
          <p>
            <b>{short(last?.queued)}</b> queued
          </p>
        </section>
        {nodes.length === 0 && <p class="place empty">There are no nodes yet.</p>}
        {prefill.length > 0 && <Pool role="prefill" nodes={prefill} />}
        {(split || engine) && <Store engine={engine} />}
        {decode.length > 0 && <Pool role="decode" nodes={decode} />}
        {unified.length > 0 && <Pool role="unified" nodes={unified} />}
      </div>
    </section>
  );
}
