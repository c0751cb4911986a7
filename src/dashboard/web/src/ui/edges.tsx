import { useLayoutEffect, useRef, useState } from "preact/hooks";

/** From the best to the worst. */
const RESTS = ["quiet", "waiting", "broken"] as const;
type Rest = (typeof RESTS)[number];

export interface Link {
  from: string;
  to: string;
  /** The pool of the node at one of its ends, whose frame stands for its nodes where there is no room for each. */
  pool: string | null;
  flow: number;
  /** How it looks while nothing flows. */
  rest: Rest;
}

interface Path {
  key: string;
  d: string;
  /** The head of the arrow at its end. */
  head: string;
  width: number;
  look: "flow" | Rest;
}

interface Frame {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

const middle = (from: number, to: number) => (from + to) / 2;

type Line = Pick<Path, "d" | "head">;

const rightward = (x: number, y: number) => `M${x - 6} ${y - 4.5}L${x} ${y}L${x - 6} ${y + 4.5}Z`;
const downward = (x: number, y: number) => `M${x - 4.5} ${y - 6}L${x} ${y}L${x + 4.5} ${y - 6}Z`;

function path(from: Frame, to: Frame): Line {
  if (to.left >= from.right) {
    const [x1, y1, x2, y2] = [from.right, middle(from.top, from.bottom), to.left, middle(to.top, to.bottom)];
    const bend = (x2 - x1) / 2;
    return { d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2 - 4} ${y2}`, head: rightward(x2, y2) };
  }
  // One above the other: straight down the middle.
  const x = middle(Math.max(from.left, to.left), Math.min(from.right, to.right));
  return { d: `M${x} ${from.bottom}V${to.top - 4}`, head: downward(x, to.top) };
}

/** Around what lies between, along the left edge. */
function around(from: Frame, to: Frame): Line {
  const [y1, y2] = [middle(from.top, from.bottom), to.top + 18];
  return { d: `M${from.left} ${y1}H8Q3 ${y1} 3 ${y1 + 5}V${y2 - 5}Q3 ${y2} 8 ${y2}H${to.left - 4}`, head: rightward(to.left, y2) };
}

function paths(map: HTMLElement, links: Link[]): Path[] {
  const origin = map.getBoundingClientRect();
  const frames = new Map<string, Frame>();
  for (const element of map.querySelectorAll<HTMLElement>("[data-port]")) {
    const { left, right, top, bottom } = element.getBoundingClientRect();
    const round = (value: number) => Math.round(value * 2) / 2;
    frames.set(element.dataset["port"]!, {
      left: round(left - origin.left),
      right: round(right - origin.left),
      top: round(top - origin.top),
      bottom: round(bottom - origin.top),
    });
  }
  // A line ends at the frame of the pool, at the height of its node.
  for (const element of map.querySelectorAll<HTMLElement>("[data-port^='node:']")) {
    const pool = element.closest<HTMLElement>(".pool")?.dataset["port"];
    const [frame, around] = [frames.get(element.dataset["port"]!), frames.get(pool ?? "")];
    if (frame && around) Object.assign(frame, { left: around.left, right: around.right });
  }
  const [clients, router] = [frames.get("clients"), frames.get("router")];
  const vertical = clients !== undefined && router !== undefined && router.left < clients.right;
  const merged = new Map<string, Link>();
  for (const link of links) {
    const pool = link.pool === null ? null : map.querySelector(`[data-port="pool:${link.pool}"]`);
    const whole = pool !== null && (vertical || pool.classList.contains("many"));
    const end = (name: string) => (whole && name.startsWith("node:") ? `pool:${link.pool}` : name);
    const [from, to] = [end(link.from), end(link.to)];
    const old = merged.get(`${from} ${to}`);
    merged.set(`${from} ${to}`, { ...link, from, to, flow: link.flow + (old?.flow ?? 0), rest: RESTS.find((rest) => rest === link.rest || rest === old?.rest)! });
  }
  const drawn: Path[] = [];
  for (const [key, { from, to, flow, rest }] of merged) {
    const [start, end] = [frames.get(from), frames.get(to)];
    if (!start || !end) continue;
    const apart = vertical && [...frames].some(([name, frame]) => name.startsWith("pool:") && frame.top > start.bottom && frame.bottom < end.top);
    drawn.push({
      key,
      ...(apart ? around(start, end) : path(start, end)),
      width: flow > 0 ? Math.min(7, 2 + Math.log2(1 + flow) * 0.9) : 1.5,
      look: flow > 0 ? "flow" : rest,
    });
  }
  return drawn;
}

/** The lines between what is in the map, drawn where the layout put it. */
export function Edges({ links }: { links: Link[] }) {
  const svg = useRef<SVGSVGElement>(null);
  const [drawn, setDrawn] = useState<Path[]>([]);
  const current = useRef(links);
  current.current = links;

  const measure = () => {
    const map = svg.current?.parentElement;
    if (!map) return;
    const found = paths(map, current.current);
    setDrawn((old) => (JSON.stringify(old) === JSON.stringify(found) ? old : found));
  };
  useLayoutEffect(measure, [links]);
  useLayoutEffect(() => {
    const sizes = new ResizeObserver(measure);
    sizes.observe(svg.current!.parentElement!);
    return () => sizes.disconnect();
  }, []);

  return (
    <svg ref={svg} class="edges" aria-hidden="true">
      {drawn.map(({ key, d, head, width, look }) => (
        <g key={key} class={look}>
          <path class="base" d={d} stroke-width={width} />
          {look === "flow" && <path class="moving" d={d} stroke-width={Math.max(1.5, width - 1)} />}
          <path class="head" d={head} />
        </g>
      ))}
    </svg>
  );
}
