import { drop, key } from "./key";

const BASE = "api/";

/** Asks the API with the key. A refusal of the key brings the key page. */
export async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  const mine = key.value ?? "";
  const response = await fetch(BASE + path, {
    ...options,
    headers: { Authorization: `Bearer ${mine}` },
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  if (response.status === 401) drop(mine);
  return response;
}

/** What the API says is wrong, as a sentence. */
export async function complaint(response: Response): Promise<string> {
  try {
    const body: unknown = await response.json();
    if (typeof body === "object" && body !== null && "error" in body && typeof body.error === "string") return body.error;
  } catch {
    // Not from the API itself; the status has to do.
  }
  return `pegaflow answered with status ${response.status}`;
}

export type Action = "drain" | "undrain" | "restart";
export interface Result {
  ok: boolean;
  status: number;
  text: string;
}

export async function act(action: Action, node: string, force: boolean): Promise<Result> {
  try {
    const response = await ask(`nodes/${encodeURIComponent(node)}/${action}${force ? "?force=true" : ""}`, { method: "POST" });
    if (!response.ok) return { ok: false, status: response.status, text: await complaint(response) };
    const body = (await response.json()) as { notes?: string[] };
    return { ok: true, status: response.status, text: (body.notes ?? []).join(" ") };
  } catch {
    return { ok: false, status: 0, text: "pegaflow could not be reached." };
  }
}
