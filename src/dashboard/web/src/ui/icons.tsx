import type { Tone } from "../phases";

const SHAPES: Record<Tone, string> = {
  good: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1Zm3.6 4.9-4.3 5a.9.9 0 0 1-1.3 0L4.3 9.2l1.3-1.2 1 1 3.7-4.3 1.3 1.2Z",
  busy: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1Zm0 1.8v5.2l3.7 3.7A5.2 5.2 0 1 1 8 2.800Z",
  warn: "M8 1.200 15.300 14.300H.7L8 1.200Zm-.9 4.800.2 4.300h1.400l.2-4.300H7.100Zm.9 5.100a.95.95 0 1 0 0 1.900.95.95 0 0 0 0-1.900Z",
  bad: "M5.100 1h5.800L15 5.100v5.800L10.900 15H5.100L1 10.900V5.100L5.100 1Zm.9 3.700L4.700 6l2 2-2 2L6 11.300l2-2 2 2 1.300-1.300-2-2 2-2L10 4.700l-2 2-2-2Z",
  idle: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1Zm0 1.700a5.300 5.300 0 1 1 0 10.600A5.300 5.300 0 0 1 8 2.700ZM5 7.100h6v1.800H5V7.100Z",
};

/** A state in shape, colour and word. */
export function State({ tone, word }: { tone: Tone; word: string }) {
  return (
    <span class={`state ${tone}`}>
      <svg viewBox="0 0 16 16" aria-hidden="true">
        <path fill-rule="evenodd" d={SHAPES[tone]} />
      </svg>
      {word}
    </span>
  );
}
