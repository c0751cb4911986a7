import { clock, count, millis, words } from "../format";
import type { Row } from "../store";
import { PART_NAMES, segments } from "../waterfall";

export function Details({ row }: { row: Row }) {
  const marks: [string, number | null][] = [
    ["Admitted", row.admitted],
    ["Body read", row.body_read],
    ["Sent to prefill", row.prefill_sent],
    ["Prefill settled", row.settled],
    ["Sent for the answer", row.answer_sent],
    ["First piece", row.first_piece],
    ["End", row.end],
  ];
  const facts: [string, string][] = [
    ["Id", row.id],
    ["Began", clock(row.at, true)],
    ["Endpoint", row.endpoint],
    ["Way", row.reason ? `${row.way}: ${row.reason}` : row.way],
    ["Prefill node", row.prefill ?? "none"],
    ["Answering node", row.answer ?? "none"],
    ["Outcome", words(row.outcome)],
    ["Status", row.status === null ? "none sent" : String(row.status)],
    ["Retries", count(row.retries)],
    ["Tokens", count(row.tokens)],
  ];
  return (
    <div class="marks">
      <dl>
        {facts.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      <dl>
        {marks.map(([name, at]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{at === null ? "not reached" : `after ${millis(at)}`}</dd>
          </div>
        ))}
      </dl>
      <dl>
        {segments(row).map(({ part, from, to }) => (
          <div key={`${part} ${from}`}>
            <dt>
              <span class={`dot ${part}`} aria-hidden="true" /> {PART_NAMES[part]}
            </dt>
            <dd>{millis(to - from)}</dd>
          </div>
        ))}
      </dl>
    </div>
  );
}
