// The server's API: requests with the key, server-sent events, and errors of one line.

const KEY = "dsv2.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask(refused)` asks the user for a key and returns it, or null; `refused`: there was one, and it is wrong. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function newKey(refused) {
  asking ??= askForKey(refused).finally(() => (asking = null));
  const key = await asking;
  if (key !== null) sessionStorage.setItem(KEY, key);
  return key;
}

/** A response with status 2xx; asks for the key if the server wants one and `quiet` is not set. */
async function request(path, { quiet = false, headers = {}, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const authorization = key === null ? {} : { Authorization: `Bearer ${key}` };
    let response;
    try {
      response = await fetch(path, { cache: "no-store", headers: { ...headers, ...authorization }, ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.", { code: "unreachable" });
    }
    if (response.ok) return response;
    if (response.status === 401 && !quiet) {
      if (key !== sessionStorage.getItem(KEY) || (await newKey(key !== null)) !== null) continue;
    }
    throw await errorOf(response);
  }
}

async function errorOf(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // Not JSON: the status has to do.
  }
  const wait = response.headers.get("Retry-After");
  const message = oneLine(told?.message ?? `The server answered ${response.status}.`);
  const hint = wait && response.status === 429 ? ` Try again in ${wait} s.` : "";
  return new ApiError(message + hint, { status: response.status, code: told?.code ?? null });
}

function brokenOff(error = null) {
  if (error?.name === "AbortError") throw error;
  throw new ApiError("The connection broke off before the answer ended.", { code: "interrupted" });
}

function oneLine(text) {
  const line = String(text).replace(/\s+/g, " ").trim();
  return line.length > 300 ? `${line.slice(0, 299)}…` : line;
}

/** `GET /dsv2/status`. */
export async function status({ quiet = false, signal } = {}) {
  return (await request("/dsv2/status", { quiet, signal })).json();
}

/** The `data` of each server-sent event of a stream of bytes. */
export async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(brokenOff);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A \r at the end may be the first half of \r\n.
      const whole = done || !rest.endsWith("\r") ? rest : rest.slice(0, -1);
      const lines = whole.split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(whole.length);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/**
 * `POST /v1/chat/completions`, streamed: yields {id}, {text}, {finish} and {usage} as they come.
 *
 * Aborting `signal` closes the request, which ends the work on the server.
 */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  let named = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(oneLine(event.error.message), { code: event.error.code });
    if (!named && event.id) yield { id: event.id };
    named = true;
    const choice = event.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
    if (event.usage) yield { usage: event.usage };
  }
  if (!finished) brokenOff();
}
