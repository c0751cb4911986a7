import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { act, type Action } from "../api";
import { plural } from "../format";
import { ticks } from "../store";
import type { Node } from "../types";

interface Question {
  action: Action;
  node: Node;
  /** Why the first try was refused: the next one is forced. */
  refusal: { text: string; at: number } | null;
  busy: boolean;
}

const SECOND_CLICK = 700;

const question = signal<Question | null>(null);
const result = signal<{ good: boolean; text: string } | null>(null);

export const VERBS: Record<Action, string> = { drain: "Drain", undrain: "Undrain", restart: "Restart" };
const DONE: Record<Action, string> = { drain: "Draining", undrain: "Taking requests again:", restart: "Restarting" };

export function propose(action: Action, node: Node): void {
  result.value = null;
  question.value = { action, node, refusal: null, busy: false };
}

function consequence({ action, node }: Question): string {
  const inside = ticks.value.at(-1)?.nodes[node.name]?.in_flight ?? node.in_flight;
  const now = inside === 0 ? "It has no request in flight" : `Its ${plural(inside, "request")} in flight ${inside === 1 ? "is" : "are"} finished first`;
  if (action === "drain") return `${node.name} gets no new requests until it is undrained. ${now}.`;
  if (action === "undrain") return `${node.name} gets requests again.`;
  return `${node.name} is stopped and started again, and gets no requests until it is ready. ${now}.`;
}

async function confirm(): Promise<void> {
  const asked = question.value;
  if (!asked || asked.busy) return;
  // The second half of a double click is no consent to what was only just said.
  if (asked.refusal && performance.now() - asked.refusal.at < SECOND_CLICK) return;
  const asking = { ...asked, busy: true };
  question.value = asking;
  const { action, node } = asked;
  const answer = await act(action, node.name, asked.refusal !== null);
  // It may have been closed in the meantime; what came of it is shown all the same.
  const open = question.value === asking;
  if (open && !answer.ok && answer.status === 409 && action === "drain" && asked.refusal === null) {
    question.value = { ...asked, refusal: { text: answer.text, at: performance.now() }, busy: false };
    return;
  }
  if (open) question.value = null;
  result.value = answer.ok
    ? { good: true, text: `${DONE[action]} ${node.name}. ${answer.text}`.trim() }
    : { good: false, text: `${VERBS[action]} ${node.name}: ${answer.text}` };
}

function Confirm() {
  const box = useRef<HTMLDialogElement>(null);
  const asked = question.value;
  const open = asked !== null;
  const refusal = asked?.refusal ?? null;
  const cancel = useRef<HTMLButtonElement>(null);
  useEffect(() => {
    const dialog = box.current!;
    // The browser puts the focus back on the button that opened it.
    if (open && !dialog.open) dialog.showModal();
    if (!open && dialog.open) dialog.close();
  }, [open]);
  useEffect(() => cancel.current?.focus(), [open, refusal]);
  return (
    <dialog ref={box} aria-labelledby="confirm-title" aria-describedby="confirm-text" onClose={() => (question.value = null)}>
      {asked && (
        <>
          <h2 id="confirm-title">
            {VERBS[asked.action]} {asked.node.name}?
          </h2>
          <p id="confirm-text">{asked.refusal?.text ?? consequence(asked)}</p>
          <div class="answers">
            <button ref={cancel} type="button" onClick={() => (question.value = null)}>
              Cancel
            </button>
            <button class="main" type="button" aria-disabled={asked.busy} onClick={confirm}>
              {asked.busy ? "Asking …" : asked.refusal !== null ? "Drain all the same" : VERBS[asked.action]}
            </button>
          </div>
        </>
      )}
    </dialog>
  );
}

export function Actions() {
  const said = result.value;
  return (
    <>
      <Confirm />
      <div class={said ? "toast" : "toast none"}>
        <p role="status" class={said && !said.good ? "wrong" : ""}>
          {said?.text}
        </p>
        {said && (
          <button class="small" type="button" aria-label="Close the message" onClick={() => (result.value = null)}>
            Close
          </button>
        )}
      </div>
    </>
  );
}
