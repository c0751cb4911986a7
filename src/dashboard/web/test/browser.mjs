import { chromium } from "playwright-core";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { Scripted } from "./scripted.mjs";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"];

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: FLAGS });

/** A page on a back-end, with everything that went wrong in it. */
export async function open(browser, name, { width = 1280, height = 900, scheme = "light", hash = null, clock = false, reduced = "no-preference", ...more } = {}) {
  const server = typeof name === "string" ? await new Scripted(name, more).listen() : name;
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme, reducedMotion: reduced });
  const page = await context.newPage();
  page.setDefaultTimeout(10_000);
  if (clock) await page.clock.install();
  const problems = [];
  const outside = [];
  page.on("console", (message) => {
    if (message.type() === "error" || message.type() === "warning") problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(server.url) && !request.url().startsWith("data:")) outside.push(request.url());
  });
  await page.addInitScript(() => {
    globalThis.violations = [];
    addEventListener("securitypolicyviolation", (event) => globalThis.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
  });
  await page.goto(server.url + (hash ?? `#key=${server.key}`));
  const close = async () => {
    await context.close();
    await server.die().catch(() => {});
  };
  return { server, page, problems, outside, violations: () => page.evaluate(() => globalThis.violations), close };
}

const folder = process.env.SCREENSHOTS;

export async function picture(page, name) {
  if (!folder) return;
  mkdirSync(folder, { recursive: true });
  await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
}
