// The table of processes, the selected one, and what is done to it.

import { age, ask, byId, colour, count, keyed, node, plural, rate, setAttribute, setClass, setHidden, setText, short, toast } from "./dom.js";
import { call } from "./kernel.js";

const waiting = (p) => (p.waiting_for ? `${p.state}: ${p.waiting_for}` : p.state);
const progress = (p) => (p.trains ? `${p.computed}/${p.context}` : count(p.context));

// title, the cell's text, what it is sorted by, whether it is a number, from which width on it is shown
const COLUMNS = [
  ["PID", (p) => String(p.pid), (p) => p.pid, true, ""],
  ["Owner", (p) => p.owner, (p) => p.owner, false, "s"],
  ["Name", (p) => p.name || "–", (p) => p.name, false, "m"],
  ["Model", (p) => short(p.model), (p) => p.model, false, ""],
  ["Class", (p) => p.sched_class, (p) => ["realtime", "interactive", "batch", "idle"].indexOf(p.sched_class), false, "m"],
  ["Nice", (p) => String(p.nice), (p) => p.nice, true, "m"],
  ["State", waiting, waiting, false, ""],
  ["Context", progress, (p) => -p.context, true, "s"],
  ["Blocks", (p) => (p.blocks ? count(p.blocks) : "–"), (p) => -p.blocks, true, "m"],
  ["Tok/s", (p) => rate(p.tokens_per_s), (p) => -p.tokens_per_s, true, ""],
  ["Queue", (p) => (p.queue_place ? String(p.queue_place) : "–"), (p) => p.queue_place || Infinity, true, "s"],
  ["Age", (p, now) => age(now - p.born), (p) => p.born, true, "m"],
];

export class Processes {
  #rows = [];
  #selected = 0;
  #order = 0;
  #down = false;
  #now = 0;

  constructor() {
    this.tools = Object.fromEntries(
      [...document.querySelectorAll("#processes [data-act]")].map((button) => [button.dataset.act, button]),
    );
    for (const [act, button] of Object.entries(this.tools)) button.addEventListener("click", () => this.act(act));
    COLUMNS.forEach(([title, , , number, width], index) => {
      const head = node("th", `${number ? "n" : ""} ${width && `only-${width}`}`.trim());
      head.scope = "col";
      const button = node("button", "", title);
      button.type = "button";
      button.addEventListener("click", () => this.#sort(index));
      head.append(button);
      byId("columns").append(head);
    });
    byId("rows").addEventListener("click", (event) => this.#select(Number(event.target.closest("tr")?.dataset.pid)));
    this.#sort(0);
  }

  get current() {
    return this.#rows.find((row) => row.pid === this.#selected) ?? this.#rows[0];
  }

  show(rows, now, more) {
    this.#now = now;
    this.#rows = rows;
    setHidden(byId("no-rows"), rows.length > 0);
    setHidden(byId("more"), !more);
    this.#draw();
  }

  step(by) {
    const place = this.#rows.indexOf(this.current) + by;
    const row = this.#rows[Math.min(Math.max(place, 0), this.#rows.length - 1)];
    if (!row) return;
    this.#select(row.pid);
    byId("rows").known.get(row.pid).scrollIntoView({ block: "nearest" });
  }

  async act(what) {
    const process = this.current;
    if (!process) return toast("No process is selected.");
    this.#select(process.pid);
    const path = `v1/processes/${process.pid}`;
    const { nice } = process;
    try {
      if (what === "kill") {
        if (process.state === "zombie" || (await this.#sure(process))) await call("DELETE", path);
      } else if (what === "stop") {
        const signal = process.state === "stopped" ? "CONT" : "STOP";
        await call("POST", `${path}/signal`, { signal });
      } else {
        // At once, so that the next press counts on from it.
        process.nice = Math.min(Math.max(nice + (what === "nicer" ? 1 : -1), -20), 19);
        this.#draw();
        await call("PATCH", path, { nice: process.nice });
      }
    } catch (error) {
      process.nice = nice;
      toast(error.message);
    }
    this.#draw();
  }

  #sure(process) {
    byId("confirm-text").textContent = `Kill process ${process.pid}, ${short(process.model)} of ${process.owner}?`;
    return ask(byId("confirm"));
  }

  #select(pid) {
    if (!pid) return;
    this.#selected = pid;
    this.#draw();
  }

  #sort(index) {
    this.#down = index === this.#order ? !this.#down : false;
    if (!byId("rows").known) this.#down = false; // the first time
    this.#order = index;
    [...byId("columns").children].forEach((head, at) => {
      setAttribute(head, "aria-sort", at !== index ? "none" : this.#down ? "descending" : "ascending");
    });
    this.#draw();
  }

  #draw() {
    const by = COLUMNS[this.#order][2];
    const sign = this.#down ? -1 : 1;
    this.#rows.sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      return x < y ? -sign : x > y ? sign : a.pid - b.pid;
    });
    const current = this.current;
    const known = new Map(this.#rows.map((row) => [row.pid, row]));
    keyed(byId("rows"), [...known.keys()], newRow, (tr, pid) => this.#fill(tr, known.get(pid), pid === current?.pid));
    for (const button of Object.values(this.tools)) button.disabled = !current;
    setText(this.tools.stop, current?.state === "stopped" ? "Go on" : "Stop");
  }

  #fill(tr, row, selected) {
    setClass(tr, `${row.state}${selected ? " selected" : ""}`);
    setAttribute(tr, "aria-current", String(selected));
    COLUMNS.forEach(([, text], index) => setText(tr.children[index], text(row, this.#now)));
    setClass(tr.children[1], `owner ${colour(row.owner)} only-s`);
  }
}

function newRow(pid) {
  const tr = node("tr");
  tr.dataset.pid = pid;
  for (const [, , , number, width] of COLUMNS) {
    tr.append(node("td", `${number ? "n" : ""} ${width && `only-${width}`}`.trim()));
  }
  return tr;
}

export function summary(rows) {
  const running = rows.filter((p) => p.state === "running").length;
  const queued = rows.filter((p) => p.queue_place).length;
  const speed = rows.reduce((sum, p) => sum + (p.trains ? 0 : p.tokens_per_s), 0);
  return `${plural(rows.length, "process", "processes")}, ${running} running, ${queued} queued · ${speed.toFixed(1)} tokens/s`;
}
