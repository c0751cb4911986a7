import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { keyIn, refused, use } from "../key";

export function KeyPage() {
  const wrong = useSignal(false);
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => {
    document.title = "pegaflow: key needed";
    field.current?.focus();
  }, []);

  const open = (event: SubmitEvent) => {
    event.preventDefault();
    const found = keyIn(field.current?.value ?? "");
    wrong.value = found === null;
    if (found) use(found);
    else field.current?.focus();
  };

  return (
    <main class="keypage">
      <img src="icon.svg" alt="" width="40" height="40" />
      <h1>This dashboard needs its key</h1>
      {refused.value && (
        <p class="wrong" role="alert">
          The key was refused. A key holds for as long as its pegaflow runs.
        </p>
      )}
      <p>On the machine where pegaflow runs, run</p>
      <pre>pegaflow dashboard</pre>
      <p>and open the address that it prints. Or paste that address, or the key alone, here:</p>
      <form onSubmit={open}>
        <label for="key">Key or address</label>
        <div class="line">
          <input id="key" ref={field} type="text" autocomplete="off" spellcheck={false} aria-describedby="wrong" aria-invalid={wrong.value} />
          <button class="main" type="submit">Open</button>
        </div>
        <p id="wrong" class="wrong" role="alert">
          {wrong.value ? "There is no key in that." : ""}
        </p>
      </form>
    </main>
  );
}
