import { ask, complaint } from "./api";
import { Lines } from "./lines";

export type LogState = "connecting" | "live" | "lost" | "none";

interface Reader {
  clear: () => void;
  lines: (some: string[]) => void;
  state: (now: LogState, problem: string) => void;
}

const LINES = 300;
const WAIT = 2_000;

const rest = (stop: AbortSignal) =>
  new Promise<void>((done) => {
    const finish = () => {
      clearTimeout(timer);
      stop.removeEventListener("abort", finish);
      done();
    };
    const timer = setTimeout(finish, WAIT);
    stop.addEventListener("abort", finish);
  });

/** Reads the log of a node, or of all with "", until it is told to stop. */
export async function followLog(node: string, stop: AbortSignal, reader: Reader): Promise<void> {
  const path = `logs${node === "" ? "" : `/${encodeURIComponent(node)}`}?lines=${LINES}&follow=true`;
  reader.clear();
  reader.state("connecting", "");
  while (!stop.aborted) {
    try {
      const response = await ask(path, { signal: stop });
      if (stop.aborted) return;
      if (!response.ok || !response.body) {
        const problem = await complaint(response);
        if (!stop.aborted) reader.state("none", problem);
        // The log of a node may come to be later, or not at all.
        if (response.status === 401) return;
      } else {
        // It begins with the last lines again, so that those of before would be there twice.
        reader.clear();
        reader.state("live", "");
        const bytes = response.body.getReader();
        const lines = new Lines();
        for (;;) {
          const { done, value } = await bytes.read();
          if (done || stop.aborted) break;
          reader.lines(lines.feed(value));
        }
        if (!stop.aborted) reader.state("lost", "");
      }
    } catch {
      if (stop.aborted) return;
      reader.state("lost", "");
    }
    await rest(stop);
  }
}
