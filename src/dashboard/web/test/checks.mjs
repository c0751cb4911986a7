// The page as built, in a real browser, against a back-end that follows a script.
import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { launch, open, picture } from "./browser.mjs";

const DEADLINE = { timeout: 60_000 };
let browser;
before(async () => (browser = await launch()), { timeout: 60_000 });
after(async () => browser?.close());

/** A check with a page that must end without an error, a breach of the policy or a request to elsewhere. */
function check(title, name, options, body) {
  test(title, DEADLINE, async () => {
    const opened = await open(browser, name, options);
    const allowed = [];
    try {
      await body({ ...opened, allow: (pattern) => allowed.push(pattern) });
      // What the browser itself writes about refused or broken requests is no error of the page.
      assert.deepEqual(opened.problems.filter((text) => !allowed.some((pattern) => pattern.test(text))), []);
      assert.deepEqual(opened.outside, []);
      assert.deepEqual(await opened.violations(), []);
    } finally {
      await opened.close();
    }
  });
}

const ready = (page) => page.locator("#topology").waitFor();
const settled = (page) => page.waitForTimeout(1500);
const rows = (page, table) => page.locator(`table.${table} tbody tr`);
const button = (page, name) => page.getByRole("button", { name, exact: true });

async function until(what, condition, limit = 15_000) {
  const end = Date.now() + limit;
  while (!(await condition())) {
    assert.ok(Date.now() < end, `${what}: not within ${limit} ms`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** All that are left after a filter are as they must be, and some are. */
const only = (what, texts, fits) =>
  until(`only ${what}`, async () => {
    const found = await texts();
    return found.length > 0 && found.every(fits);
  });

const noSideScroll = async (page) => {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(content <= window, `the page is ${content} wide in a window of ${window}`);
};

/** The controls that have no name for those who cannot see them. */
const unnamed = (page) =>
  page.evaluate(() =>
    [...document.querySelectorAll("button, input, select, textarea, a, [role=region], dialog[open]")]
      .filter((one) => {
        const by = (one.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("");
        const text = one.matches("button, a") ? one.textContent : [...(one.labels ?? [])].map((label) => label.textContent).join("");
        return (one.getAttribute("aria-label") ?? (by || text)).trim() === "";
      })
      .map((one) => one.outerHTML.slice(0, 120)),
  );

for (const [name, cards, charts] of [["none", 0, 0], ["one", 1, 6], ["pair", 2, 9], ["sixteen", 16, 9], ["crashing", 3, 9], ["preparing", 2, 0]]) {
  check(`${name}: ${cards} nodes, each control named`, name, {}, async ({ page }) => {
    await ready(page);
    await settled(page);
    assert.equal(await page.locator(".node").count(), cards);
    if (charts > 0) assert.equal(await page.locator("figure.chart").count(), charts);
    assert.equal(await page.locator(".store").count(), name === "one" || name === "none" ? 0 : 1);
    if (name === "none") assert.match(await page.locator(".map").innerText(), /no nodes yet/);
    if (name === "crashing") assert.match(await page.locator("[data-node=decode-0]").innerText(), /crash loop[^]*OutOfMemory/);
    assert.deepEqual(await unnamed(page), []);
    await noSideScroll(page);
    if (name !== "preparing") await picture(page, name);
  });
}

check("an external node has no buttons, one that drains can be undrained", "sixteen", {}, async ({ page }) => {
  await ready(page);
  assert.equal(await page.locator("[data-node=decode-7] button").count(), 0);
  assert.equal(await button(page, "Undrain decode-4").count(), 1);
  assert.equal(await button(page, "Drain decode-4").count(), 0);
});

check("the key goes from the address to the session", "pair", {}, async ({ page, server }) => {
  await ready(page);
  assert.equal(page.url(), server.url);
  await page.reload();
  await ready(page);
});

check("without a key the page says how to come by one", "pair", { hash: "" }, async ({ page, server }) => {
  await page.getByText("pegaflow dashboard", { exact: true }).waitFor();
  assert.deepEqual(await unnamed(page), []);
  await picture(page, "key");
  await page.getByLabel("Key or address").fill("not a key");
  await button(page, "Open").click();
  await page.getByText("There is no key in that.").waitFor();
  await page.getByLabel("Key or address").fill(`${server.url}#key=${server.key}`);
  await page.keyboard.press("Enter");
  await ready(page);
});

check("a key that is refused brings the key page", "pair", { hash: "#key=wrong" }, async ({ page, server, allow }) => {
  allow(/401/);
  await page.getByText("The key was refused").waitFor();
  assert.equal(page.url(), server.url);
  // The address that is printed, opened in the same window, changes only what is after the #.
  await page.evaluate((hash) => (location.hash = hash), `#key=${server.key}`);
  await ready(page);
  assert.equal(page.url(), server.url);
  server.key = "another";
  await server.die();
  await server.listen();
  allow(/ERR_/);
  await page.getByText("The key was refused").waitFor();
});

check("a drain is asked about and sent once", "sixteen", {}, async ({ page, server }) => {
  await ready(page);
  await button(page, "Drain prefill-0").click();
  const dialog = page.getByRole("dialog");
  assert.match(await dialog.innerText(), /Drain prefill-0\?[^]*in flight/);
  await page.keyboard.press("Escape");
  await dialog.waitFor({ state: "hidden" });
  assert.deepEqual(server.posts, []);
  await button(page, "Drain prefill-0").click();
  await dialog.getByRole("button", { name: "Cancel" }).click();
  assert.deepEqual(server.posts, []);
  await button(page, "Drain prefill-0").click();
  await dialog.getByRole("button", { name: "Drain" }).dblclick();
  await page.getByText("Draining prefill-0.").waitFor();
  assert.deepEqual(server.posts, [{ path: "/dashboard/api/nodes/prefill-0/drain", key: server.key }]);
  await button(page, "Undrain prefill-0").click();
  await dialog.getByRole("button", { name: "Undrain" }).click();
  await button(page, "Drain prefill-0").waitFor();
  assert.equal(server.posts[1].path, "/dashboard/api/nodes/prefill-0/undrain");
});

check("a refused drain can be forced", "pair", {}, async ({ page, server, allow }) => {
  allow(/409/);
  await ready(page);
  const dialog = page.getByRole("dialog");
  await button(page, "Drain decode-0").click();
  // The second click must not be taken for a yes to what came only after the first.
  await dialog.getByRole("button", { name: "Drain" }).dblclick();
  await dialog.getByText("the last ready decode node").waitFor();
  await page.waitForTimeout(800);
  assert.equal(server.posts.length, 1);
  await dialog.getByRole("button", { name: "Drain all the same" }).click();
  await page.getByText("Draining decode-0.").waitFor();
  assert.deepEqual(server.posts.map(({ path }) => path), ["/dashboard/api/nodes/decode-0/drain", "/dashboard/api/nodes/decode-0/drain?force=true"]);
});

check("a restart, by keyboard alone, and the focus comes back", "pair", {}, async ({ page, server }) => {
  await ready(page);
  const focused = () => page.evaluate(() => document.activeElement?.getAttribute("aria-label") ?? document.activeElement?.textContent);
  const tabTo = async (name) => {
    for (let presses = 0; presses < 40; presses += 1) {
      await page.keyboard.press("Tab");
      if ((await focused()) === name) return;
    }
    assert.fail(`Tab does not lead to ${name}`);
  };
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "Skip to the content");
  await page.keyboard.press("Enter");
  await tabTo("Restart prefill-0");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").waitFor();
  assert.equal(await focused(), "Cancel");
  assert.deepEqual(await unnamed(page), []);
  await page.keyboard.press("Escape");
  await until("the focus is back", async () => (await focused()) === "Restart prefill-0");
  await settled(page);
  assert.equal(await focused(), "Restart prefill-0");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").waitFor();
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "Restart");
  await page.keyboard.press("Enter");
  await page.getByText("Restarting prefill-0.").waitFor();
  assert.deepEqual(server.posts, [{ path: "/dashboard/api/nodes/prefill-0/restart", key: server.key }]);
  await until("the focus is back", async () => (await focused()) === "Restart prefill-0");
  await page.locator("[data-node=prefill-0]").getByText("starting").waitFor();
});

check("an action that fails says why", "pair", {}, async ({ page, server, allow }) => {
  allow(/404/);
  await ready(page);
  await button(page, "Restart decode-0").click();
  server.node = () => undefined;
  await page.getByRole("dialog").getByRole("button", { name: "Restart" }).click();
  await page.getByText("Restart decode-0: there is no node decode-0").waitFor();
});

check("requests are filtered, opened and held", "pair", {}, async ({ page, server }) => {
  await ready(page);
  await button(page, "Pause").click();
  await settled(page);
  assert.equal(await rows(page, "requests").count(), 100);
  const texts = (column) => page.locator(`table.requests tbody tr > td:nth-child(${column})`).allInnerTexts();
  await page.locator("#requests").getByLabel("Outcome").selectOption("client_error");
  await only("client errors", () => texts(5), (text) => text.includes("client error"));
  await page.locator("#requests").getByLabel("Outcome").selectOption("");
  await page.getByLabel("Way").selectOption("whole");
  await only("whole ones", () => texts(3), (text) => text === "whole");
  await page.getByLabel("Way").selectOption("");
  await page.locator("#requests").getByLabel("Node").selectOption("decode-0");
  await only("those of decode-0", () => texts(4), (text) => text.includes("decode-0"));
  await page.locator("#requests").getByLabel("Node").selectOption("");
  await until("all rows", async () => (await rows(page, "requests").count()) === 100);
  const id = (await texts(2))[7];
  await page.getByLabel("Id contains").fill(id.toUpperCase());
  await until("one row", async () => (await rows(page, "requests").count()) === 1);
  await page.getByRole("button", { name: id }).press("Enter");
  await page.locator("tr.details").waitFor();
  assert.match(await page.locator("tr.details").innerText(), /Admitted[^]*First piece[^]*End/);
  await page.getByRole("button", { name: id }).press("Enter");
  await page.locator("tr.details").waitFor({ state: "detached" });
  await page.getByLabel("Id contains").fill("");
  await button(page, "Log scale").click();
  await until("all rows", async () => (await rows(page, "requests").count()) === 100);
  const held = await texts(2);
  await settled(page);
  assert.deepEqual(await texts(2), held);
  await button(page, "Pause").click();
  await until("new rows", async () => (await texts(2))[0] !== held[0]);
  assert.equal(server.posts.length, 0);
});

check("fifty requests a second are no burden", "sixteen", { every: 250 }, async ({ page, server }) => {
  server.requestsPerTick = 13;
  await ready(page);
  const longest = await page.evaluate(
    () =>
      new Promise((done) => {
        let most = 0;
        new PerformanceObserver((list) => list.getEntries().forEach((entry) => (most = Math.max(most, entry.duration)))).observe({ entryTypes: ["longtask"] });
        setTimeout(() => done(most), 4000);
      }),
  );
  assert.equal(await rows(page, "requests").count(), 100);
  assert.ok(longest < 500, `the page was busy for ${longest} ms at a stretch`);
});

check("the history is filtered", "crashing", {}, async ({ page }) => {
  await ready(page);
  const history = page.locator("#history");
  const all = await rows(page, "history").count();
  await history.getByLabel("Node").selectOption("decode-0");
  const texts = (column) => page.locator(`table.history tbody tr > td:nth-child(${column})`).allInnerTexts();
  await only("those of decode-0", () => texts(2), (text) => text === "decode-0");
  assert.ok((await rows(page, "history").count()) < all);
  await button(page, "Only deaths and restarts").click();
  const deaths = ["down", "backoff", "crash loop", "failed", "unreachable"];
  await only("deaths", () => texts(4), (phase) => deaths.includes(phase.trim()));
  assert.equal((await texts(4))[0].trim(), "crash loop");
});

check("logs are filtered, followed and changed", "pair", {}, async ({ page, server, allow }) => {
  allow(/404/);
  await ready(page);
  const lines = page.locator(".log > div");
  const logs = page.locator("#logs");
  await until("lines", async () => (await lines.count()) >= 60);
  assert.ok(!(await lines.first().innerText()).includes("\u001b"));
  await logs.getByLabel("Contains").fill("SHARD 1");
  const shown = () => lines.allInnerTexts();
  await only("shard 1", shown, (line) => line.toLowerCase().includes("shard 1"));
  await logs.getByLabel("Contains").fill("");
  await logs.getByLabel("Level").selectOption("errors");
  await only("errors", shown, (line) => line.includes("ERROR"));
  await logs.getByLabel("Level").selectOption("");
  await logs.getByLabel("Log", { exact: true }).selectOption("decode-0");
  await only("its lines", shown, (line) => line.includes("[decode-0]"));
  await until("one reader", () => server.readers.size === 1 && [...server.readers][0].node === "decode-0");
  await until("more lines", async () => (await lines.count()) > 61);
  const box = page.locator(".log");
  assert.equal(await button(page, "Follow").getAttribute("aria-pressed"), "true");
  await box.evaluate((one) => (one.scrollTop = 0));
  await until("it stops following", async () => (await button(page, "Follow").getAttribute("aria-pressed")) === "false");
  await settled(page);
  assert.equal(await box.evaluate((one) => one.scrollTop), 0);
  await button(page, "Follow").click();
  await until("the end", () => box.evaluate((one) => one.scrollHeight - one.scrollTop - one.clientHeight < 8));
  await logs.getByLabel("Log", { exact: true }).selectOption("pegaflow");
  await page.getByText("there is no log of pegaflow").waitFor();
  await until("no lines", async () => (await lines.count()) === 0);
  await noSideScroll(page);
});

check("at most 2,000 lines of a log are kept", "one", {}, async ({ page, server }) => {
  await ready(page);
  await until("a reader", () => server.readers.size === 1);
  for (let part = 0; part < 50; part += 1) for (const { answer } of server.readers) answer.write("INFO again\n".repeat(100));
  const lines = page.locator(".log > div");
  await until("lines", async () => (await lines.count()) === 2000);
  await settled(page);
  assert.equal(await lines.count(), 2000);
});

check("pegaflow goes and comes back", "pair", {}, async ({ page, server, allow }) => {
  allow(/ERR_/);
  await ready(page);
  await page.getByLabel("Level").selectOption("errors");
  server.send("end", {});
  await page.getByText("pegaflow is stopping.").waitFor();
  await server.die();
  await page.getByText(/Connection lost, \d+ s ago; trying again/).waitFor();
  await page.waitForTimeout(2200);
  assert.equal(await page.locator(".node").count(), 2);
  assert.ok(await page.locator("main.stale").count());
  await picture(page, "gone");
  server.fleet.nodes[1].name = "decode-new";
  await server.listen();
  await page.locator("[data-node=decode-new]").waitFor();
  await until("the banner is gone", async () => (await page.locator(".banner").innerText()) === "");
  await until("all fresh", async () => (await page.locator("main.stale").count()) === 0);
  // What was chosen holds.
  assert.equal(await page.getByLabel("Level").inputValue(), "errors");
  await until("the log is read again", () => server.readers.size === 1);
});

check("silence is taken for a loss", "pair", { clock: true, every: 3_600_000 }, async ({ page, server }) => {
  await ready(page);
  const banner = page.locator(".banner");
  await page.clock.runFor(24_000);
  assert.equal(await banner.innerText(), "");
  assert.equal(server.connections, 1);
  server.silent = true;
  await page.clock.runFor(2_500);
  await banner.getByText(/Connection lost, \d+ s ago/).waitFor();
  await until("a new connection", () => server.connections === 2);
  server.silent = false;
  await page.clock.runFor(40_000);
  await until("the banner is gone", async () => (await banner.innerText()) === "");
});

check("a phone needs no scrolling to the side", "pair", { width: 360, height: 780 }, async ({ page }) => {
  await ready(page);
  await settled(page);
  await noSideScroll(page);
  const [router, prefill, decode] = await Promise.all([".router", ".pool.prefill", ".pool.decode"].map((one) => page.locator(one).boundingBox()));
  assert.ok(router.y + router.height <= prefill.y && prefill.y + prefill.height <= decode.y);
  await picture(page, "pair-phone");
});

for (const name of ["none", "one", "sixteen", "crashing"])
  check(`${name} fits a phone`, name, { width: 360, height: 780 }, async ({ page }) => {
    await ready(page);
    await noSideScroll(page);
  });

const back = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);

check("dark as the system is, and light when chosen", "pair", { scheme: "dark" }, async ({ page }) => {
  await ready(page);
  const dark = await back(page);
  await settled(page);
  await picture(page, "pair-dark");
  await button(page, "light").click();
  await until("light", async () => (await back(page)) !== dark);
  await page.reload();
  await ready(page);
  assert.notEqual(await back(page), dark);
  await button(page, "system").click();
  await until("dark", async () => (await back(page)) === dark);
  await page.emulateMedia({ colorScheme: "light" });
  await until("the system's colours", async () => (await back(page)) !== dark);
});

check("nothing moves for those who do not want it", "pair", { reduced: "reduce" }, async ({ page }) => {
  await ready(page);
  assert.ok((await page.locator(".edges .moving").count()) > 0);
  assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
});
