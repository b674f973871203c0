// The page: what has come goes to its parts, keys to what they mean.

import { byId, colour, setClass, setHidden, setText } from "./dom.js";
import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { changeKey, watch } from "./kernel.js";
import { listenForPulls, showDevices, showModels, showTenants } from "./machine.js";
import { Processes, summary } from "./processes.js";
import { Training } from "./training.js";

const WINDOW_S = 300;

const processes = new Processes();
const chat = new Chat();
const training = new Training();

const ago = { formatX: (x) => (Math.round(x) ? `${Math.round(-x)} s ago` : "now") };
const graphs = {
  speed: new Chart(byId("speed"), "Tokens/s", { ...ago, format: (y) => y.toFixed(y < 10 ? 1 : 0) }),
  latency: new Chart(byId("latency"), "Step, ms", { ...ago, format: (y) => y.toFixed(y < 10 ? 1 : 0) }),
  queue: new Chart(byId("queue"), "Running and queued", ago),
};
let begun = 0;
const history = { speed: new Map(), latency: new Map(), queue: new Map() };

function remember(state, rows) {
  begun ||= state.time;
  const add = (graph, name, y) => {
    if (!history[graph].has(name)) history[graph].set(name, []);
    history[graph].get(name).push([state.time, y]);
  };
  const speeds = new Map([...history.speed.keys()].map((owner) => [owner, 0]));
  for (const row of rows) if (!row.trains) speeds.set(row.owner, (speeds.get(row.owner) ?? 0) + row.tokens_per_s);
  for (const [owner, speed] of speeds) add("speed", owner, speed);
  for (const [name, device] of Object.entries(state.devices)) if (device.step_ms) add("latency", name, device.step_ms);
  add("queue", "running", rows.filter((row) => row.state === "running").length);
  add("queue", "queued", rows.filter((row) => row.queue_place).length);
  for (const [graph, series] of Object.entries(history)) {
    for (const [name, points] of series) {
      while (points.length && points[0][0] < state.time - WINDOW_S) points.shift();
      if (!points.length || (graph === "speed" && points.every((p) => !p[1]))) series.delete(name);
    }
    const names = [...series.keys()];
    const shown = names.map((name, index) => ({
      name,
      label: name.split("/").pop(),
      className: graph === "speed" ? colour(name) : `c${index % 4}`,
      points: series.get(name).map(([at, y]) => [at - state.time, y]),
    }));
    graphs[graph].show(shown, { range: [-Math.min(WINDOW_S, Math.max(30, state.time - begun)), 0] });
  }
}

function show(state) {
  const rows = Object.values(state.processes);
  remember(state, rows);
  training.show(rows);
  const shown = rows.filter((row) => row.state !== "zombie" || row.trains);
  setText(byId("summary"), summary(shown));
  processes.show(shown, state.time, state.more);
  showDevices(state);
  showTenants(state);
  showModels(state);
  chat.show(state);
  link("", state);
}

function link(problem, state) {
  const at = byId("link");
  setClass(at, `link ${problem ? "problem" : "there"}`);
  if (problem) setText(at, `not connected: ${problem}`);
  else if (state) setText(at, state.caller.tenant);
}

const KEYS = {
  j: () => processes.step(1),
  k: () => processes.step(-1),
  ArrowDown: () => processes.step(1),
  ArrowUp: () => processes.step(-1),
  x: () => processes.act("kill"),
  s: () => processes.act("stop"),
  "+": () => processes.act("nicer"),
  "-": () => processes.act("ruder"),
  "/": () => byId("question").focus(),
  n: () => (chat.clear(), byId("question").focus()),
  "?": () => byId("help").showModal(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const field = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape") {
    chat.stop();
    field?.blur();
  } else if (!field && KEYS[event.key] && !(event.key.startsWith("Arrow") && event.target.closest("#said"))) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

byId("help-button").addEventListener("click", KEYS["?"]);
byId("key-button").addEventListener("click", changeKey);
setHidden(byId("key-button"), !sessionStorage.getItem("llmasos-key"));
listenForPulls();
watch(show, link);
