import type { Request } from "./types";

export type Part = "queue" | "body" | "prefill" | "dispatch" | "decode" | "stream";
export const PART_NAMES: Record<Part, string> = {
  queue: "queue",
  body: "body",
  prefill: "prefill",
  dispatch: "dispatch",
  decode: "first token",
  stream: "stream",
};
export interface Segment {
  part: Part;
  from: number;
  to: number;
}

/** What a request spent its time on. Each mark begins the part that it is named with; marks that are missing were not reached. */
export function segments(request: Request): Segment[] {
  const { admitted, body_read } = request;
  const bodyFirst = admitted !== null && body_read !== null && body_read < admitted;
  const marks: [number | null, Part][] = bodyFirst
    ? [[0, "body"], [body_read, "queue"], [admitted, "dispatch"]]
    : [[0, "queue"], [admitted, "body"], [body_read, "dispatch"]];
  marks.push(
    [request.prefill_sent, "prefill"],
    [request.settled, "dispatch"],
    [request.answer_sent, "decode"],
    [request.first_piece, "stream"],
  );
  const reached = marks.filter((mark): mark is [number, Part] => mark[0] !== null);
  const found: Segment[] = [];
  let from = 0;
  reached.forEach(([, part], place) => {
    const to = Math.max(from, Math.min(reached[place + 1]?.[0] ?? request.end, request.end));
    if (to > from) found.push({ part, from, to });
    from = to;
  });
  return found;
}

export type Scale = "linear" | "log";

export function place(at: number, scale: Scale): number {
  return scale === "log" ? Math.log1p(at) : at;
}

/** A bar as hard-edged stripes: one element for each row, however many parts it has. */
export function stripes(request: Request, scale: Scale): string {
  const length = place(request.end, scale);
  if (!(length > 0)) return "none";
  const share = (at: number) => `${((100 * place(at, scale)) / length).toFixed(2)}%`;
  const stops = segments(request).map(({ part, from, to }) => `var(--${part}) ${share(from)} ${share(to)}`);
  return stops.length > 0 ? `linear-gradient(90deg, ${stops.join(", ")})` : "none";
}
