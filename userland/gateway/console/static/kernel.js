// The gateway's API: calls and streams with the key of this tab, and the live state of the machine.

import { ask, byId } from "./dom.js";

const KEY = "llmasos-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function call(method, path, body, options = {}) {
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), ...options });
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    const problem = new Refused(answer.status, said.error?.message ?? `${answer.status} ${answer.statusText}`);
    if (answer.status !== 401) throw problem;
    if (sessionStorage.getItem(KEY) === key) await askKey(key ? problem.message : "");
  }
}

let asking;
function askKey(problem) {
  byId("key-problem").textContent = problem;
  byId("key-button").hidden = false;
  return (asking ??= typedKey().finally(() => (asking = undefined)));
}

async function typedKey() {
  for (let key = ""; !key; ) {
    await ask(byId("key")); // again and again: there is nothing to see without one
    key = byId("key-text").value.trim();
    byId("key-text").value = "";
    if (key) sessionStorage.setItem(KEY, key);
  }
}

export function changeKey() {
  sessionStorage.removeItem(KEY);
  location.reload();
}

// The events of a stream, parsed. EventSource could not send the key. Raises Refused for an event that tells of
// an error.
export async function* events(method, path, body, signal) {
  const answer = await call(method, path, body, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
        const event = JSON.parse(part.slice(6));
        if (event.error) throw new Refused(0, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Without prototypes: a name like __proto__ is a key like any other.
function merged(target, patch) {
  if (patch === null || typeof patch !== "object" || Array.isArray(patch)) return patch;
  const made = target !== null && typeof target === "object" ? target : Object.create(null);
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete made[key];
    else made[key] = merged(made[key], value);
  }
  return made;
}

// Calls `show(state)` each time the machine's state has come, and `link(problem)` when the connection is there ("")
// or gone. Never ends.
export async function watch(show, link) {
  for (let patience = 500; ; patience = Math.min(2 * patience, 10000)) {
    let state;
    let problem = "the connection has ended";
    try {
      for await (const patch of events("GET", "v1/console/events")) {
        if (!state) link("");
        state = merged(state, patch);
        patience = 500;
        show(state);
      }
    } catch (error) {
      problem = error.message;
    }
    link(problem);
    await new Promise((resolve) => setTimeout(resolve, patience));
  }
}
