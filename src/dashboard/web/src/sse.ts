/** One event of a stream of server-sent events. */
export interface Event {
  name: string;
  data: string;
}

const LONGEST = 64 * 1024 * 1024;

/** Takes the bytes of such a stream as they come, split anywhere. */
export class Events {
  #decoder = new TextDecoder();
  #line = "";
  #name = "";
  #data: string[] = [];
  #size = 0;
  #afterReturn = false;

  feed(chunk: Uint8Array): Event[] {
    const events: Event[] = [];
    let text = this.#decoder.decode(chunk, { stream: true });
    if (text === "") return events;
    // A line may end with CR LF, and the two may come in different chunks.
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    if (text !== "") this.#afterReturn = text.endsWith("\r");
    else this.#afterReturn = false;
    const lines = text.split(/\r\n|\r|\n/);
    lines.forEach((piece, place) => {
      this.#line += piece;
      if (place < lines.length - 1) {
        const event = this.#take(this.#line);
        this.#line = "";
        if (event) events.push(event);
      }
    });
    if (this.#line.length + this.#size > LONGEST) throw new Error("an event of the stream is too long");
    return events;
  }

  #take(line: string): Event | null {
    if (line === "") {
      const event = this.#data.length > 0 ? { name: this.#name || "message", data: this.#data.join("\n") } : null;
      this.#name = "";
      this.#data = [];
      this.#size = 0;
      return event;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.#name = value;
    else if (field === "data") {
      this.#data.push(value);
      this.#size += value.length;
    }
    return null;
  }
}
