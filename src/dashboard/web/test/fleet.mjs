// The page in a real browser against a real `pegaflow up`, whose nodes are the fake vLLM of the tests.
import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { launch, open, picture } from "./browser.mjs";

const root = resolve(dirname(fileURLToPath(import.meta.url)), "../../../..");
const PEGAFLOW = process.env.PEGAFLOW_BIN ?? join(root, "target/debug/pegaflow");
const VLLM = process.env.FAKE_VLLM ?? join(root, "target/debug/examples/fake-vllm");
const MODEL = { architectures: ["Qwen3ForCausalLM"], model_type: "qwen3", vocab_size: 2048, hidden_size: 256, intermediate_size: 512,
  num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 2, head_dim: 32, max_position_embeddings: 40960, torch_dtype: "bfloat16" };

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  return port;
}

/** A private world with one `pegaflow up` in it. */
class Fleet {
  async start(nodes, script = {}) {
    this.dir = mkdtempSync(join(tmpdir(), "pegaflow-page-"));
    this.port = await freePort();
    for (const name of ["bin", "run", "state", "cache", "home", "model"]) mkdirSync(join(this.dir, name), { mode: 0o700 });
    symlinkSync(VLLM, join(this.dir, "bin/vllm"));
    writeFileSync(join(this.dir, "model/config.json"), JSON.stringify(MODEL));
    writeFileSync(join(this.dir, "script.json"), JSON.stringify(script));
    writeFileSync(join(this.dir, "fleet.toml"), `
device = "cpu"
model = "./model"
served_model_name = "tiny"
[runtime]
kind = "path"
[kv]
capacity = "256MiB"
[router]
listen = "127.0.0.1:${this.port}"
drain_timeout = "2s"
[supervisor]
start_timeout = "60s"
health_interval = "200ms"
stop_grace = "2s"
backoff_first = "200ms"
backoff_max = "1s"
crash_limit = 3
${nodes.map((node) => `[[node]]\n${node}`).join("\n")}
`);
    return this.up();
  }

  async up() {
    const place = (name) => join(this.dir, name);
    this.env = { ...process.env, PATH: `${place("bin")}:${process.env.PATH}`, HOME: place("home"), XDG_RUNTIME_DIR: place("run"),
      XDG_STATE_HOME: place("state"), PEGAFLOW_CACHE_DIR: place("cache"), FAKE_VLLM_SCRIPT: place("script.json"), NO_COLOR: "1" };
    this.child = spawn(PEGAFLOW, ["up", "fleet.toml"], { cwd: this.dir, env: this.env, stdio: ["ignore", "pipe", "pipe"] });
    this.said = "";
    for (const output of [this.child.stdout, this.child.stderr]) output.on("data", (data) => (this.said += data));
    this.ended = once(this.child, "exit");
    for (const limit = Date.now() + 60_000; !this.said.includes("pegaflow is ready"); ) {
      assert.ok(this.child.exitCode === null && Date.now() < limit, this.said);
      await new Promise((done) => setTimeout(done, 50));
    }
    const address = execFileSync(PEGAFLOW, ["dashboard"], { env: this.env, encoding: "utf8" }).trim();
    [this.url, this.key] = address.split("#key=");
    return this;
  }

  async stop() {
    if (this.child.exitCode === null && this.child.signalCode === null) this.child.kill("SIGTERM");
    const late = setTimeout(() => this.child.kill("SIGKILL"), 20_000);
    await this.ended;
    clearTimeout(late);
  }

  async complete() {
    const body = JSON.stringify({ model: "tiny", prompt: "A prompt that is long enough for a block of its own. ".repeat(8), max_tokens: 12, stream: true });
    const answer = await fetch(`http://127.0.0.1:${this.port}/v1/completions`, { method: "POST", headers: { "content-type": "application/json" }, body });
    assert.equal(answer.status, 200);
    assert.match(await answer.text(), /\[DONE\]/);
  }

  async status() {
    return JSON.parse(execFileSync(PEGAFLOW, ["status", "--json"], { env: this.env, encoding: "utf8" }));
  }

  /** `open` closes it as it closes a scripted one. */
  async die() {
    await this.stop();
    rmSync(this.dir, { recursive: true, force: true });
  }
}

let browser;
before(async () => (browser = await launch()), { timeout: 60_000 });
after(async () => browser?.close());

function check(title, nodes, script, body) {
  test(title, { timeout: 180_000 }, async () => {
    const fleet = await new Fleet().start(nodes, script);
    const opened = await open(browser, fleet);
    opened.page.setDefaultTimeout(30_000);
    try {
      const allowed = await body({ ...opened, fleet });
      assert.deepEqual(opened.problems.filter((text) => !allowed?.test(text)), []);
      assert.deepEqual(opened.outside, []);
      assert.deepEqual(await opened.violations(), []);
    } finally {
      await opened.close();
    }
  });
}

const node = (page, name) => page.locator(`[data-node=${name}]`);
const press = async (page, what, name) => {
  await page.getByRole("button", { name: `${what} ${name}`, exact: true }).click();
  await page.getByRole("dialog").getByRole("button", { name: what, exact: true }).click();
};

check("requests, a death, a drain, a restart and the end are seen", ['role = "prefill"', 'role = "decode"\ncount = 2'], { itl_ms: 5, prefill_ms: 20 }, async ({ page, fleet }) => {
  await node(page, "decode-1").getByText("ready", { exact: true }).waitFor();
  for (let count = 0; count < 5; count++) await fleet.complete();
  const rows = page.locator("table.requests tbody tr");
  await page.waitForFunction(() => document.querySelectorAll("table.requests tbody tr").length >= 5);
  assert.match(await rows.first().innerText(), /split[^]*prefill → decode-\d[^]*ok/);

  const before = (await fleet.status()).nodes.find((one) => one.name === "decode-0");
  process.kill(before.pid, "SIGKILL");
  await page.locator("table.history tbody tr", { hasText: "SIGKILL" }).first().waitFor();
  await node(page, "decode-0").getByText("1 restart", { exact: true }).waitFor();
  await node(page, "decode-0").getByText("ready", { exact: true }).waitFor();

  await press(page, "Drain", "decode-0");
  await node(page, "decode-0").getByText("draining").waitFor();
  // The last one that decodes: it is said what that means, and asked again.
  await press(page, "Drain", "decode-1");
  await page.getByText(/No other decode node is ready/).first().waitFor();
  await page.keyboard.press("Escape");
  await press(page, "Undrain", "decode-0");
  await node(page, "decode-0").getByText("ready", { exact: true }).waitFor();
  await press(page, "Restart", "decode-1");
  await page.locator("table.history tbody tr", { hasText: "decode-1" }).filter({ hasText: "restarted as asked" }).first().waitFor();
  await node(page, "decode-1").getByText("ready", { exact: true }).waitFor();
  await page.getByText(/\[decode-0\].*Application startup complete/).first().waitFor();
  await picture(page, "fleet");

  await fleet.stop();
  await page.getByText("pegaflow has stopped").waitFor();
  await fleet.up();
  await page.getByText("pegaflow has stopped").waitFor({ state: "hidden" });
  await node(page, "decode-1").getByText("ready", { exact: true }).waitFor();
  return /409|ERR_/;
});

check("sixteen nodes", ['role = "prefill"\ncount = 8', 'role = "decode"\ncount = 8'], {}, async ({ page, fleet }) => {
  await page.waitForFunction(() => document.querySelectorAll(".node").length === 16);
  await Promise.all(Array.from({ length: 32 }, () => fleet.complete()));
  await page.waitForFunction(() => document.querySelectorAll("table.requests tbody tr").length >= 32);
  await picture(page, "fleet-sixteen");
});

check("a node that dies again and again", ['role = "unified"\ncount = 2'], {}, async ({ page, fleet }) => {
  for (;;) {
    const { phase, pid } = (await fleet.status()).nodes.find((one) => one.name === "unified-0");
    if (phase === "crash_loop") break;
    if (pid) process.kill(pid, "SIGKILL");
    await new Promise((done) => setTimeout(done, 100));
  }
  await node(page, "unified-0").getByText("crash loop").waitFor();
  await node(page, "unified-0").getByText(/SIGKILL/).waitFor();
  await page.getByText("degraded").first().waitFor();
  await press(page, "Restart", "unified-0");
  await node(page, "unified-0").getByText("ready", { exact: true }).waitFor();
  await picture(page, "fleet-crashed");
});
