// A conversation in a process of its own: what was said stays in its KV memory, and the table shows it.

import { byId, keyed, node, setAttribute, setText, toast } from "./dom.js";
import { call, events, Refused } from "./kernel.js";

const MODEL = "llmasos-model";

export class Chat {
  #messages = [];
  #pid = 0;
  #leaving = null; // while an answer comes
  #row = null;
  #result = "";

  constructor() {
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#leaving) this.stop();
      else this.#send();
    });
    byId("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#leaving) this.#send();
    });
    byId("chat-new").addEventListener("click", () => this.clear());
    byId("chat-model").addEventListener("change", () => {
      sessionStorage.setItem(MODEL, byId("chat-model").value);
      this.clear();
    });
    addEventListener("pagehide", () => this.#end({ keepalive: true }));
  }

  show(state) {
    const names = Object.keys(state.models).filter((name) => !state.models[name].encodes).sort();
    const select = byId("chat-model");
    keyed(select, names, (name) => new Option(name, name), () => {});
    if (this.models !== names.join()) {
      this.models = names.join();
      const wanted = select.value || sessionStorage.getItem(MODEL);
      if (names.includes(wanted)) select.value = wanted;
    }
    this.#row = this.#pid ? state.processes[this.#pid] : null;
    this.#status();
  }

  clear() {
    this.stop();
    this.#end();
    this.#messages = [];
    this.#result = "";
    byId("said").replaceChildren();
    this.#status();
  }

  stop() {
    this.#leaving?.abort();
  }

  #end(options) {
    if (this.#pid) call("DELETE", `v1/processes/${this.#pid}`, undefined, options).catch(() => {});
    this.#pid = 0;
    this.#row = null;
  }

  #status() {
    let text = this.#result;
    if (this.#leaving) {
      const row = this.#row;
      if (row?.state === "stopped") text = "stopped: s on its process lets it go on";
      else if (row?.queue_place) text = `waits in the queue, place ${row.queue_place}`;
      else if (row?.tokens_per_s) text = `${row.tokens_per_s.toFixed(1)} tokens/s`;
      else text = row?.waiting_for ? `waits for ${row.waiting_for}` : "…";
    }
    setText(byId("chat-status"), text);
    setText(byId("send"), this.#leaving ? "Stop" : "Send");
    setAttribute(byId("said"), "aria-busy", String(this.#leaving !== null)); // it is read out when it is whole
  }

  async #send() {
    const text = byId("question").value.trim();
    const model = byId("chat-model").value;
    if (!text) return;
    if (!model) return toast("There is no model yet: pull one.");
    byId("question").value = "";
    this.#messages.push({ role: "user", content: text });
    this.#add("user", text);
    const leaving = (this.#leaving = new AbortController());
    const answer = this.#add("assistant", "");
    this.#result = "";
    this.#status();
    try {
      await this.#answer(model, answer, leaving.signal);
    } catch (error) {
      if (leaving.signal.aborted) this.#result = "stopped";
      else {
        answer.classList.add("problem");
        answer.textContent ||= error.message;
        this.#result = error.message;
      }
    }
    if (this.#leaving === leaving) this.#leaving = null;
    if (answer.isConnected && answer.textContent && !answer.classList.contains("problem")) {
      this.#messages.push({ role: "assistant", content: answer.textContent });
    }
    this.#status();
  }

  async #answer(model, at, signal) {
    const begun = performance.now();
    let first = 0;
    let used;
    let finish = "";
    for (let tries = 2; tries; tries -= 1) {
      try {
        if (!this.#pid) {
          const made = await call("POST", "v1/processes", { model, label: "console" }, { signal });
          this.#pid = (await made.json()).pid;
        }
        const body = {
          model,
          messages: this.#messages,
          pid: this.#pid,
          temperature: Number(byId("temperature").value),
          stream: true,
          stream_options: { include_usage: true },
        };
        for await (const chunk of events("POST", "v1/chat/completions", body, signal)) {
          const choice = chunk.choices[0];
          used = chunk.usage ?? used;
          finish = choice?.finish_reason ?? finish;
          if (choice?.delta.content) {
            first ||= performance.now();
            this.#append(at, choice.delta.content);
          }
        }
        break;
      } catch (error) {
        // Somebody killed the conversation's process: another one takes all of it in again.
        if (!(error instanceof Refused) || error.status !== 404 || tries === 1) throw error;
        this.#pid = 0;
      }
    }
    if (!used) return;
    const seconds = (performance.now() - first) / 1000;
    const cached = used.prompt_tokens_details.cached_tokens;
    const speed = used.completion_tokens > 1 && seconds ? ((used.completion_tokens - 1) / seconds).toFixed(1) : "–";
    const wait = first ? ` · first after ${Math.round(first - begun)} ms` : "";
    const ended = finish && finish !== "stop" ? ` · ${finish}` : "";
    this.#result = `${used.completion_tokens} tokens · ${speed} tokens/s${wait} · ${cached} of ${used.prompt_tokens} known${ended}`;
  }

  #add(role, text) {
    const at = node("p", role, text);
    byId("said").append(at);
    byId("said").scrollTop = byId("said").scrollHeight;
    return at;
  }

  #append(at, text) {
    const said = byId("said");
    const follows = said.scrollTop + said.clientHeight > said.scrollHeight - 40;
    if (at.firstChild) at.firstChild.appendData(text);
    else at.append(text);
    if (follows) said.scrollTop = said.scrollHeight;
  }
}
