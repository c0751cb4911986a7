import { signal, useSignal, useSignalEffect } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { followLog, type LogState } from "../follow";
import { plural } from "../format";
import { level } from "../lines";
import { link, status } from "../store";
import { Pick, Search, Toggle } from "./controls";

const MOST = 2_000;
const ALL = "";

const node = signal(ALL);
const text = signal("");
const least = signal("");
const wrap = signal(false);
const follow = signal(true);

/** Whether the page was out of sight for long: a browser opens few connections to a host, and other windows need some. */
const unseen = signal(false);
const UNSEEN = 60_000;

function watchSight(): () => void {
  let timer = 0;
  const changed = () => {
    clearTimeout(timer);
    if (document.visibilityState === "visible") unseen.value = false;
    // Who scrolled up is reading, and is to find the same lines again.
    else timer = window.setTimeout(() => (unseen.value = follow.peek()), UNSEEN);
  };
  document.addEventListener("visibilitychange", changed);
  return () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", changed);
  };
}

/** Shows lines without a component each: thousands may come in a second. */
class Screen {
  #lines: string[] = [];
  #waiting: string[] = [];
  #box: HTMLElement;
  #timer = 0;
  shown = 0;

  constructor(box: HTMLElement, readonly changed: (kept: number, shown: number) => void) {
    this.#box = box;
  }

  clear(): void {
    this.#lines = [];
    this.#waiting = [];
    this.draw();
  }

  add(lines: string[]): void {
    this.#waiting = this.#waiting.concat(lines).slice(-MOST);
    this.#timer ||= window.setTimeout(() => this.#flush(), 150);
  }

  stop(): void {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#waiting = [];
  }

  /** All of it anew, as the filters say. */
  draw(): void {
    this.#box.replaceChildren(...this.#lines.filter(fits).map(element));
    this.#after();
  }

  #flush(): void {
    this.#timer = 0;
    const fresh = this.#waiting;
    this.#waiting = [];
    const gone = this.#lines.concat(fresh).length - MOST;
    const dropped = gone > 0 ? this.#lines.slice(0, gone) : [];
    this.#lines = this.#lines.concat(fresh).slice(-MOST);
    for (let left = dropped.filter(fits).length; left > 0; left -= 1) this.#box.firstChild?.remove();
    this.#box.append(...fresh.filter(fits).map(element));
    this.#after();
  }

  #after(): void {
    this.changed(this.#lines.length, this.#box.childElementCount);
    if (follow.peek()) this.#box.scrollTop = this.#box.scrollHeight;
  }
}

function fits(line: string): boolean {
  const wanted = text.peek().toLowerCase();
  if (wanted !== "" && !line.toLowerCase().includes(wanted)) return false;
  if (least.peek() === "") return true;
  const is = level(line);
  return is === "error" || (is === "warning" && least.peek() === "warnings");
}

function element(line: string): HTMLElement {
  const made = document.createElement("div");
  made.className = level(line);
  made.textContent = line === "" ? " " : line;
  return made;
}

const STATES: Record<LogState, string> = { connecting: "connecting …", live: "", lost: "the log broke off; trying again", none: "" };

export function Logs() {
  const box = useRef<HTMLDivElement>(null);
  const screen = useRef<Screen | null>(null);
  const counts = useSignal({ kept: 0, shown: 0 });
  const state = useSignal<LogState>("connecting");
  const problem = useSignal("");

  useEffect(() => {
    const made = new Screen(box.current!, (kept, shown) => (counts.value = { kept, shown }));
    screen.current = made;
    return () => made.stop();
  }, []);

  useEffect(watchSight, []);

  useSignalEffect(() => {
    const name = node.value;
    const lines = screen.current;
    if (!lines) return;
    // Without a connection there is nothing to read; what was read stays.
    if (link.value !== "live" || unseen.value) return;
    const stop = new AbortController();
    lines.stop();
    void followLog(name, stop.signal, {
      clear: () => lines.clear(),
      lines: (some) => lines.add(some),
      state: (now, why) => {
        state.value = now;
        problem.value = why;
      },
    });
    return () => stop.abort();
  });

  useSignalEffect(() => {
    text.value;
    least.value;
    screen.current?.draw();
  });

  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current!;
    const atEnd = scrollHeight - scrollTop - clientHeight < 8;
    if (!atEnd && follow.value && scrollTop < lastTop.current) follow.value = false;
    lastTop.current = scrollTop;
  };
  const lastTop = useRef(0);

  const toggleFollow = () => {
    follow.value = !follow.value;
    if (follow.value) box.current!.scrollTop = box.current!.scrollHeight;
  };

  const names = ["pegaflow", ...(status.value?.nodes ?? []).map(({ name }) => name)];
  const { kept, shown } = counts.value;
  return (
    <section id="logs" aria-labelledby="logs-title">
      <h2 id="logs-title">Logs</h2>
      <div class="controls">
        <Pick label="Log" value={node} options={names} none="all nodes" />
        <Search label="Contains" value={text} />
        <Pick label="Level" value={least} options={["warnings", "errors"]} />
        <Toggle label="Follow" on={follow.value} press={toggleFollow} />
        <Toggle label="Wrap" on={wrap.value} press={() => (wrap.value = !wrap.value)} />
        <span class="dim">
          {shown === kept ? plural(kept, "line") : `${shown} of ${plural(kept, "line")}`}
          {STATES[state.value] && `; ${STATES[state.value]}`}
        </span>
      </div>
      {problem.value && <p class="wrong">{problem.value}</p>}
      <div ref={box} class={wrap.value ? "log wrap" : "log"} role="region" aria-label="Log lines" tabIndex={0} onScroll={scrolled} />
    </section>
  );
}
