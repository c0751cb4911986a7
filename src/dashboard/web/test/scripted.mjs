// A back-end that follows a script: it serves ../dist as pegaflow does, and an API with made-up figures.
// By hand: node test/scripted.mjs pair 8099
import { createServer } from "node:http";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { random, request, scenario, tick } from "./scenarios.mjs";

const DIST = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "dist");
const TYPES = { "index.html": "text/html; charset=utf-8", "app.js": "text/javascript; charset=utf-8", "app.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml" };
export const CSP =
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

export class Scripted {
  key = "secret-Key_0123456789";
  /** The actions that were asked for, each with its method, path and key. */
  posts = [];
  /** The logs that are being read now. */
  readers = new Set();
  requestsPerTick = null;
  /** How often the events were asked for. */
  connections = 0;
  /** Whether it takes such questions and says nothing. */
  silent = false;
  #streams = new Set();
  #server = null;
  #number = 0;
  #place = 600;
  #port = 0;

  constructor(name, { now = Date.now(), seed = 7, every = 1000 } = {}) {
    this.next = random(seed);
    this.fleet = scenario(name, now, this.next);
    this.every = every;
    const quiet = this.fleet.load === 0;
    this.ticks = quiet ? [] : Array.from({ length: 600 }, (_, place) => tick(now - (600 - place) * 1000, this.fleet, this.next, place));
    // A stretch in which nothing was measured.
    for (const one of this.ticks.slice(200, 225)) Object.assign(one, { ttft: null, itl: null, tpot: null, parts: null });
    this.requests = quiet ? [] : Array.from({ length: 120 }, (_, place) => request(this.#number++, now - (120 - place) * 400, this.fleet, this.next));
    this.started = now - 3_790_000;
  }

  status() {
    return {
      name: "pegaflow-test",
      version: "0.9.0",
      pid: 4100,
      state: this.fleet.state,
      url: "http://127.0.0.1:8000",
      model: "Qwen/Qwen3-32B",
      topology: "topology.toml",
      logs: "/var/log/pegaflow",
      started: new Date(this.started).toISOString(),
      uptime_seconds: (Date.now() - this.started) / 1000,
      nodes: this.fleet.nodes,
      gpus: this.fleet.gpus,
    };
  }

  node(name) {
    return this.fleet.nodes.find((one) => one.name === name);
  }

  async listen(port = this.#port) {
    this.#server = createServer((asked, answer) => this.#serve(asked, answer));
    await new Promise((done) => this.#server.listen(port, "127.0.0.1", done));
    this.#port = this.#server.address().port;
    this.timer = setInterval(() => this.step(), this.every);
    return this;
  }

  get url() {
    return `http://127.0.0.1:${this.#port}/dashboard/`;
  }

  /** Gone at once, as when it is killed. `listen` brings it back at the same port. */
  async die() {
    clearInterval(this.timer);
    const closed = new Promise((done) => this.#server.close(done));
    this.#server.closeAllConnections();
    this.#streams.clear();
    await closed;
  }

  send(name, data) {
    const text = Buffer.from(`event: ${name}\ndata: ${JSON.stringify(data)}\n\n`);
    for (const stream of this.#streams) stream.write(text);
  }

  step() {
    const at = Date.now();
    const next = tick(at, this.fleet, this.next, this.#place++);
    const finished = this.fleet.load === 0 ? 0 : (this.requestsPerTick ?? Math.min(50, Math.round(this.fleet.load)));
    const requests = Array.from({ length: finished }, () => request(this.#number++, at, this.fleet, this.next));
    this.ticks = [...this.ticks, next].slice(-600);
    this.requests = [...this.requests, ...requests].slice(-200);
    for (const one of this.fleet.nodes) one.seconds_in_phase += 1;
    this.send("tick", { tick: next, status: this.status(), requests, happenings: [] });
    for (const reader of this.readers) reader.answer.write(this.line(reader.node, "INFO", "Avg prompt throughput: 812.4 tokens/s, running: 3 reqs"));
  }

  move(node, phase, reason = null) {
    const happening = { at: Date.now(), node: node.name, from: node.phase, to: phase, incarnation: node.incarnation, restarts: node.restarts, reason };
    Object.assign(node, { phase, seconds_in_phase: 0, reason });
    this.fleet.happenings.push(happening);
    this.send("status", this.status());
  }

  line(node, level, text) {
    const name = node || (this.fleet.nodes[0]?.name ?? "pegaflow");
    return `${node ? "" : `[${name}] `}\u001b[32m${level}\u001b[0m 01-01 10:00:00 [${name}] ${text}\n`;
  }

  #serve(asked, answer) {
    const { pathname, searchParams } = new URL(asked.url, "http://here");
    const headers = { "content-security-policy": CSP, "cache-control": "no-store", "x-content-type-options": "nosniff" };
    const say = (status, body) => answer.writeHead(status, { ...headers, "content-type": "application/json" }).end(JSON.stringify(body));
    const file = pathname === "/dashboard/" ? "index.html" : pathname.replace("/dashboard/", "");
    if (TYPES[file]) return answer.writeHead(200, { ...headers, "content-type": TYPES[file] }).end(readFileSync(join(DIST, file)));
    if (!pathname.startsWith("/dashboard/api/")) return say(404, { error: "no such page" });
    const given = (asked.headers.authorization ?? "").replace("Bearer ", "");
    if (asked.method === "POST") this.posts.push({ path: pathname + new URL(asked.url, "http://here").search, key: given });
    if (given !== this.key) return say(401, { error: "the key is wrong" });
    const path = pathname.slice("/dashboard/api/".length).split("/").map(decodeURIComponent);
    if (path[0] === "events") return this.#events(answer, headers);
    if (path[0] === "logs") return this.#logs(asked, answer, headers, path[1] ?? "", say);
    if (path[0] === "nodes" && asked.method === "POST") return this.#act(path[1], path[2], searchParams.get("force") === "true", say);
    return say(404, { error: "no such thing" });
  }

  #events(answer, headers) {
    this.connections += 1;
    if (this.silent) return;
    answer.writeHead(200, { ...headers, "content-type": "text/event-stream" });
    answer.write(": hello\n\n");
    const { ticks, requests } = this;
    const begin = { now: Date.now(), status: this.status(), ticks, requests, happenings: this.fleet.happenings };
    answer.write(`event: begin\ndata: ${JSON.stringify(begin)}\n\n`);
    this.#streams.add(answer);
    answer.on("close", () => this.#streams.delete(answer));
  }

  #logs(asked, answer, headers, node, say) {
    if (node !== "" && !this.node(node)) return say(404, { error: `there is no log of ${node}` });
    answer.writeHead(200, { ...headers, "content-type": "text/plain; charset=utf-8" });
    for (let place = 0; place < 60; place += 1) {
      const level = place % 20 === 7 ? "ERROR" : place % 10 === 3 ? "WARNING" : "INFO";
      const text = level === "ERROR" ? "request aborted: the peer closed the connection" : level === "WARNING" ? "cache nearly full" : `Loading weights, shard ${place} of 60`;
      answer.write(this.line(node, level, text));
    }
    if (node !== "") answer.write(this.line(node, "INFO", `a long line ${"x".repeat(20_000)}`));
    const reader = { node, answer };
    this.readers.add(reader);
    answer.on("close", () => this.readers.delete(reader));
  }

  #act(name, action, force, say) {
    const node = this.node(name);
    if (!node) return say(404, { error: `there is no node ${name}` });
    const left = this.fleet.nodes.filter((one) => one.role === node.role && one.phase === "ready" && one !== node);
    if (action === "drain" && left.length === 0 && !force)
      return say(409, { error: `${name} is the last ready ${node.role} node: without it, every prompt is computed on the other nodes. Force it to drain it all the same.` });
    const done = () => say(202, { nodes: [{ name, incarnation: node.incarnation }], notes: action === "restart" ? [`${name} restarts when its requests are done.`] : [] });
    if (action === "drain") this.move(node, "draining");
    else if (action === "undrain") this.move(node, "ready");
    else this.move(Object.assign(node, { incarnation: node.incarnation + 1 }), "starting");
    return done();
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const [name = "pair", port = "8099"] = process.argv.slice(2);
  const server = await new Scripted(name).listen(Number(port));
  console.log(`${server.url}#key=${server.key}`);
}
