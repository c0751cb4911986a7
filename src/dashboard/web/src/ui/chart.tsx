import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { clock } from "../format";
import { stacked, type Column } from "../series";
import { colour, colours } from "../theme";

export interface Line {
  name: string;
  colour: string;
  /** Dashes tell lines apart where colours do not. */
  dash?: number[];
  /** The scale that it is drawn on: the left one, or a second one on the right. */
  right?: boolean;
  text: (value: number | null | undefined) => string;
}

export interface ChartOf {
  id: string;
  title: string;
  about?: string;
  lines: Line[];
  bars?: boolean;
  /** The most that the left scale can be, where it is fixed. */
  full?: number;
}

export interface Figures {
  at: number[];
  columns: Column[];
}

const SPAN = 600;
const HEIGHT = 168;
const SPOKEN_EVERY = 10_000;

const fmtTime = (_: uPlot, splits: number[]) => splits.map((at) => clock(at * 1000).slice(0, 5));

// A value between two gaps is no line; it gets a dot.
function alone(plot: uPlot, place: number): number[] | null {
  const figures = plot.data[place]!;
  const found: number[] = [];
  for (let row = 0; row < figures.length; row += 1)
    if (figures[row] != null && figures[row - 1] == null && figures[row + 1] == null) found.push(row);
  return found.length > 0 ? found : null;
}

/** The plot's own series of a line: bars are drawn from the tallest down, so that each stays visible. */
const seriesOf = (chart: ChartOf, place: number) => (chart.bars ? chart.lines.length - place : place + 1);

function options(chart: ChartOf, width: number, moved: (row: number | null) => void): uPlot.Options {
  const axis = (scale: string, line: Line, more: Partial<uPlot.Axis>): uPlot.Axis => ({
    scale,
    size: 56,
    font: "11px system-ui, sans-serif",
    stroke: () => colour("--dim"),
    grid: { stroke: () => colour("--grid"), width: 1 },
    ticks: { show: false },
    values: (_, splits) => splits.map((value) => line.text(value)),
    ...more,
  });
  const left = chart.lines.find((line) => !line.right)!;
  const right = chart.lines.find((line) => line.right);
  const top = (_: uPlot, __: number, most: number | null): [number, number] => [0, most !== null && most > 0 ? most * 1.08 : 1];
  const series: uPlot.Series[] = [{}];
  chart.lines.forEach((line, place) => {
    const stroke = () => colour(line.colour);
    series[seriesOf(chart, place)] = {
      label: line.name,
      scale: line.right ? "r" : "y",
      stroke,
      width: chart.bars ? 0 : 1.75,
      ...(line.dash && { dash: line.dash }),
      ...(chart.bars && { fill: stroke, paths: uPlot.paths.bars!({ size: [0.85, 12, 1], align: 0 }) }),
      points: chart.bars ? { show: false } : { show: false, filter: alone, size: 4, fill: stroke, width: 0 },
    };
  });
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, right ? 0 : 8, 0, 0],
    cursor: { sync: { key: "time" }, drag: { x: false, y: false }, y: false, points: { show: !chart.bars, size: 6 } },
    scales: {
      x: { time: true, range: (_, __, last) => [(last ?? Date.now() / 1000) - SPAN, last ?? Date.now() / 1000] },
      y: { range: chart.full === undefined ? top : [0, chart.full] },
      ...(right && { r: { range: top } }),
    },
    axes: [
      axis("x", left, { size: 24, values: fmtTime, incrs: [60, 120, 180, 300], space: 44, grid: { show: false } }),
      axis("y", left, { space: 30 }),
      ...(right ? [axis("r", right, { side: 1, space: 30, grid: { show: false } })] : []),
    ],
    series,
    hooks: { setCursor: [(plot) => moved(plot.cursor.idx ?? null)] },
  };
}

function drawn(chart: ChartOf, figures: Figures, shown: boolean[]): uPlot.AlignedData {
  const columns = chart.bars ? stacked(figures.columns, shown).reverse() : figures.columns;
  return [figures.at, ...columns] as uPlot.AlignedData;
}

function Swatch({ line, bars }: { line: Line; bars: boolean }) {
  const box = useRef<SVGSVGElement>(null);
  useEffect(() => box.current?.style.setProperty("color", `var(${line.colour})`), [line.colour]);
  return (
    <svg ref={box} class={bars ? "swatch full" : "swatch"} viewBox={bars ? "0 0 10 10" : "0 0 18 10"} aria-hidden="true">
      {bars ? <rect width="10" height="10" fill="currentColor" /> : <path d="M0 5H18" stroke="currentColor" stroke-width="3" stroke-dasharray={line.dash?.join(" ")} />}
    </svg>
  );
}

export function Chart({ chart, figures }: { chart: ChartOf; figures: Figures }) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const visible = useRef(true);
  const latest = useRef(figures);
  const row = useSignal<number | null>(null);
  const shown = useSignal(chart.lines.map(() => true));
  const spoken = useRef({ at: 0, text: "" });
  latest.current = figures;

  useEffect(() => {
    const parent = box.current!;
    const made = new uPlot(options(chart, Math.max(200, parent.clientWidth), (at) => (row.value = at)), drawn(chart, figures, shown.value), parent);
    plot.current = made;
    const sizes = new ResizeObserver(() => {
      const width = parent.clientWidth;
      if (width > 0 && width !== made.width) made.setSize({ width, height: HEIGHT });
    });
    sizes.observe(parent);
    // What nobody sees need not be drawn each second.
    const views = new IntersectionObserver((entries) => {
      visible.current = entries.at(-1)!.isIntersecting;
      if (visible.current) made.setData(drawn(chart, latest.current, shown.peek()));
    });
    views.observe(parent);
    return () => {
      sizes.disconnect();
      views.disconnect();
      made.destroy();
    };
  }, [chart]);

  useEffect(() => {
    if (visible.current) plot.current?.setData(drawn(chart, figures, shown.peek()));
  }, [figures]);

  const changes = colours.value;
  useEffect(() => plot.current?.redraw(), [changes]);

  const toggle = (place: number) => {
    shown.value = shown.value.map((is, other) => (other === place ? !is : is));
    plot.current?.setSeries(seriesOf(chart, place), { show: shown.value[place]! });
    plot.current?.setData(drawn(chart, latest.current, shown.value));
  };

  const last = figures.at.length - 1;
  const at = row.value === null ? last : Math.min(row.value, last);
  const text = (line: Line, place: number, which: number) => line.text(figures.columns[place]?.[which]);
  if (Date.now() - spoken.current.at >= SPOKEN_EVERY) {
    const values = chart.lines.map((line, place) => `${line.name} ${text(line, place, last)}`);
    spoken.current = { at: Date.now(), text: `${chart.title}, at ${clock((figures.at[last] ?? 0) * 1000)}: ${values.join(", ")}.` };
  }

  return (
    <figure class="chart">
      <figcaption>
        {chart.title}
        <span class="dim"> {row.value === null ? chart.about : `at ${clock((figures.at[at] ?? 0) * 1000)}`}</span>
      </figcaption>
      <div class="plot" ref={box} aria-hidden="true" />
      <div class="legend" role="group" aria-label={`Lines of ${chart.title}`}>
        {chart.lines.map((line, place) => (
          <button key={line.name} type="button" aria-pressed={shown.value[place]} onClick={() => toggle(place)}>
            <Swatch line={line} bars={chart.bars === true} />
            {line.name} <span class="figure">{text(line, place, at)}</span>
          </button>
        ))}
      </div>
      <p class="hidden">{spoken.current.text}</p>
    </figure>
  );
}
