// The curve of a training run, as it tells it.

import { age, byId, count, keyed, node, setHidden, setText, short } from "./dom.js";
import { Chart } from "./chart.js";
import { events } from "./kernel.js";

const PATIENCE_MS = 2000;

export class Training {
  #chart = new Chart(byId("curve"), "Loss", { format: (y) => y.toFixed(3), formatX: (x) => `step ${Math.round(x)}`, fromZero: false });
  #followed = "";
  #names = new Map();

  constructor() {
    byId("run").addEventListener("change", () => this.#follow(byId("run").value));
  }

  show(rows) {
    for (const row of rows) if (row.trains) this.#names.set(String(row.pid), `${row.pid} · ${short(row.model)} of ${row.owner}`);
    setHidden(byId("training"), !this.#names.size);
    if (!this.#names.size) return;
    const pids = [...this.#names.keys()].sort((a, b) => b - a);
    keyed(byId("run"), pids, (pid) => Object.assign(node("option"), { value: pid }), (option, pid) => setText(option, this.#names.get(pid)));
    if (!this.#followed) this.#follow(pids[0]);
  }

  async #follow(pid) {
    this.#leaving?.abort();
    const leaving = (this.#leaving = new AbortController());
    this.#followed = byId("run").value = pid;
    const told = { losses: new Map(), evals: new Map(), last: undefined, over: "" };
    this.#chart.show([]);
    let drawing = false;
    const draw = () => {
      drawing = false;
      if (!leaving.signal.aborted) this.#draw(told);
    };
    for (;;) {
      try {
        for await (const event of events("GET", `v1/runs/${pid}/events`, undefined, leaving.signal)) {
          told.last = event;
          if (event.phase === "train" && event.loss != null) told.losses.set(event.step, event.loss);
          if (event.eval_loss != null) told.evals.set(event.step, event.eval_loss);
          if (!drawing) drawing = requestAnimationFrame(draw);
        }
        told.over = "done";
      } catch (error) {
        if (leaving.signal.aborted) return;
        told.over = error.message;
      }
      this.#draw(told);
      // Of a run that goes on, what it tells is told again from its beginning.
      if (told.over === "done" || told.last === undefined) return;
      await new Promise((resolve) => setTimeout(resolve, PATIENCE_MS));
      if (leaving.signal.aborted) return;
    }
  }

  #leaving;

  #draw({ losses, evals, last, over }) {
    const sorted = (map) => [...map].sort((a, b) => a[0] - b[0]);
    const points = sorted(losses);
    this.#chart.show(
      [
        { name: "loss", className: "c0", points },
        { name: "eval", className: "c1", points: sorted(evals), marks: true },
      ],
      { range: [0, Math.max(1, points.at(-1)?.[0] ?? 1)] },
    );
    setText(byId("run-facts"), last ? facts(last, over) : over || "waits for its turn");
  }
}

function facts(event, over) {
  if (event.phase === "prepare") return `prepares its data: ${Math.round((100 * event.step) / Math.max(1, event.steps))} %`;
  const found = [`${event.phase} · step ${event.step} of ${event.steps}`, `epoch ${event.epoch.toFixed(2)}`];
  if (event.learning_rate != null) found.push(`rate ${event.learning_rate.toExponential(1)}`);
  if (event.grad_norm != null) found.push(`gradient ${event.grad_norm.toPrecision(3)}`);
  if (event.tokens_per_s) found.push(`${count(event.tokens_per_s)} tokens/s`);
  found.push(over || (event.eta_s ? `${age(event.eta_s)} left` : ""));
  return found.filter(Boolean).join(" · ");
}
