import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { duration, words } from "../format";
import { stateTone } from "../phases";
import { link, status } from "../store";
import { choose, theme, THEMES } from "../theme";
import { State } from "./icons";

const SECTIONS = [
  ["topology", "Topology"],
  ["now", "Now"],
  ["charts", "Charts"],
  ["requests", "Requests"],
  ["history", "History"],
  ["logs", "Logs"],
] as const;

/** The clipboard needs a secure context, which plain HTTP to another machine is not. */
async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "hidden";
    document.body.append(field);
    const before = document.activeElement;
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (before instanceof HTMLElement) before.focus();
    return done;
  }
}

function Address({ url }: { url: string }) {
  const said = useSignal("");
  const press = async () => {
    said.value = (await copy(url)) ? "Copied" : "Copying is not allowed here";
    setTimeout(() => (said.value = ""), 2000);
  };
  return (
    <span class="address">
      <code>{url}</code>
      <button class="small" type="button" onClick={press} aria-label="Copy the address">
        Copy
      </button>
      <span class="dim" role="status">{said}</span>
    </span>
  );
}

function Themes() {
  return (
    <div class="choice" role="group" aria-label="Colours">
      {THEMES.map((one) => (
        <button key={one} type="button" aria-pressed={theme.value === one} onClick={() => choose(one)}>
          {one}
        </button>
      ))}
    </div>
  );
}

export function Header() {
  const now = status.value;
  const live = link.value === "live";
  const word = now === null ? "" : live ? words(now.state) : "no contact";
  useEffect(() => {
    document.title = now ? `${word}: ${now.name} – pegaflow` : "pegaflow";
  }, [word, now?.name]);
  return (
    <header class="top">
      <div class="bar">
        <h1>
          <img src="icon.svg" alt="" width="20" height="20" /> {now?.name ?? "pegaflow"}
        </h1>
        {now && <State tone={live ? stateTone(now.state) : "idle"} word={word} />}
        {now && (
          <dl class="facts">
            <div>
              <dt>Model</dt>
              <dd>{now.model}</dd>
            </div>
            <div>
              <dt>Address</dt>
              <dd><Address url={now.url} /></dd>
            </div>
            <div>
              <dt>Up</dt>
              <dd>{duration(now.uptime_seconds)}</dd>
            </div>
            <div>
              <dt>Version</dt>
              <dd>{now.version}</dd>
            </div>
          </dl>
        )}
        <Themes />
      </div>
      {now && (
        <nav aria-label="Sections">
          {SECTIONS.map(([id, name]) => (
            <a key={id} href={`#${id}`}>{name}</a>
          ))}
        </nav>
      )}
    </header>
  );
}
