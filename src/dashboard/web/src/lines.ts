// Colour codes, other terminal sequences and stray control characters, which mean nothing here.
const CODES = /\u001b\[[0-?]*[ -/]*[@-~]|\u001b\][^\u0007\u001b]*(?:\u0007|\u001b\\)|\u001b[@-Z\\-_]|[\u0000-\u0008\u000b-\u001f\u007f]/g;

export const LONGEST_LINE = 8_192;

export function plain(line: string): string {
  return line.replace(CODES, "");
}

export type Level = "error" | "warning" | "other";

export function level(line: string): Level {
  if (/ERROR|CRITICAL|Traceback/.test(line)) return "error";
  return line.includes("WARN") ? "warning" : "other";
}

/** Splits the bytes of a log into lines; what is beyond `LONGEST_LINE` characters of a line is left out. */
export class Lines {
  #decoder = new TextDecoder();
  #rest = "";
  #left = 0;

  feed(chunk: Uint8Array): string[] {
    const pieces = this.#decoder.decode(chunk, { stream: true }).split("\n");
    const lines: string[] = [];
    pieces.forEach((piece, place) => {
      const room = LONGEST_LINE - this.#rest.length;
      this.#rest += piece.slice(0, room);
      this.#left += Math.max(0, piece.length - room);
      if (place === pieces.length - 1) return;
      const more = this.#left > 0 ? ` … (${this.#left} more characters)` : "";
      lines.push(plain(this.#rest) + more);
      this.#rest = "";
      this.#left = 0;
    });
    return lines;
  }
}
