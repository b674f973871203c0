// Devices with their KV memory by owner, tenants, models and pulls.

import { byId, bytes, colour, count, keyed, node, rate, setAttribute, setClass, setHidden, setText, short, toast } from "./dom.js";
import { events } from "./kernel.js";

function parts(...classes) {
  return (tag = "div") => {
    const made = node(tag);
    for (const name of classes) made.append(node(tag === "tr" ? "td" : "span", name));
    return made;
  };
}

// ── devices ──

export function showDevices(state) {
  const pools = Object.entries(state.pools);
  keyed(byId("devices"), Object.keys(state.devices), newDevice, (at, name) => {
    const device = state.devices[name];
    const [title, what, facts] = at.firstElementChild.children;
    setText(title, name);
    setText(what, device.state);
    setClass(what, `badge ${device.state}`);
    const step = device.step_ms ? `step ${device.step_ms.toFixed(1)} ms · ` : "";
    const memory = device.memory_total ? `${bytes(device.memory_free)} of ${bytes(device.memory_total)} free` : "";
    setText(facts, `${step}${memory}${device.restarts ? ` · restarted ${device.restarts}×` : ""}`);
    setAttribute(at, "title", device.description);
    const own = pools.filter(([, pool]) => pool.device === name).map(([key]) => key);
    keyed(at.lastElementChild, own, newPool, (row, key) => fillPool(row, state.pools[key]));
  });
}

function newDevice() {
  const made = node("div", "device");
  const head = parts("name", "badge", "quiet")();
  head.className = "line";
  made.append(head, node("div"));
  return made;
}

function newPool() {
  const made = node("div", "pool");
  const head = parts("model", "quiet")();
  head.className = "line";
  const bar = node("div", "bar");
  bar.setAttribute("role", "img");
  made.append(head, bar);
  return made;
}

function fillPool(at, pool) {
  const [head, bar] = at.children;
  setText(head.children[0], short(pool.model));
  const used = `${count(pool.used)} of ${count(pool.total)} blocks`;
  setText(head.children[1], `${pool.dtype} · ${used} · ${bytes(pool.used * pool.block_bytes)}`);
  setAttribute(at, "title", `${pool.engine} · weights ${bytes(pool.weights_bytes)} · KV in ${pool.kv_dtype}`);
  // Blocks that processes share count for each of them: their parts are scaled to what is in use.
  const held = Object.values(pool.owners).reduce((sum, n) => sum + n, 0);
  const scale = held > pool.used ? pool.used / held : 1;
  const shares = Object.entries(pool.owners).map(([owner, n]) => [owner, n * scale]);
  const rest = pool.used - held * scale;
  if (rest >= 1) shares.push(["", rest]);
  const named = new Map(shares);
  keyed(bar, [...named.keys()], (owner) => node("i", owner ? colour(owner) : "others"), (part, owner) => {
    const width = `${((100 * named.get(owner)) / Math.max(1, pool.total)).toFixed(2)}%`;
    if (part.style.width !== width) part.style.width = width;
    setAttribute(part, "title", `${owner || "others and cached prefixes"}: ${count(named.get(owner))} blocks`);
  });
  const words = shares.map(([owner, n]) => `${owner || "others and cached prefixes"} ${count(n)}`).join(", ");
  setAttribute(bar, "aria-label", `${used} in use${words ? `: ${words}` : ""}`);
}

// ── tenants ──

export function showTenants(state) {
  const tenants = new Map();
  const of = (owner) => {
    if (!tenants.has(owner)) tenants.set(owner, { processes: 0, blocks: 0, speed: 0 });
    return tenants.get(owner);
  };
  of(state.caller.tenant);
  for (const path of Object.keys(state.quotas)) of(path);
  for (const row of Object.values(state.processes)) {
    if (row.state === "zombie") continue;
    const tenant = of(row.owner);
    tenant.processes += 1;
    tenant.blocks += row.blocks;
    tenant.speed += row.trains ? 0 : row.tokens_per_s;
  }
  const fresh = parts("owner", "n", "n", "n", "n only-s", "n only-s");
  keyed(byId("tenants"), [...tenants.keys()].sort(), () => fresh("tr"), (tr, owner) => {
    const { processes, blocks, speed } = tenants.get(owner);
    const quota = state.quotas[owner];
    const left = [];
    if (quota?.tokens_in !== undefined) left.push(`${count(Math.max(0, quota.tokens_in))} in`);
    if (quota?.tokens_out !== undefined) left.push(`${count(Math.max(0, quota.tokens_out))} out`);
    const cells = [owner, String(processes), count(blocks), rate(speed), String(quota?.limit?.weight ?? 1), left.join(", ") || "no limit"];
    cells.forEach((text, index) => setText(tr.children[index], text));
    setClass(tr.firstElementChild, `owner ${colour(owner)}`);
  });
}

// ── models ──

export function showModels(state) {
  const where = new Map();
  for (const pool of Object.values(state.pools)) {
    where.set(short(pool.model), [...(where.get(short(pool.model)) ?? []), pool.device]);
  }
  const fresh = parts("model", "n", "n", "");
  keyed(byId("models"), Object.keys(state.models).sort(), () => fresh("tr"), (tr, name) => {
    const model = state.models[name];
    const on = (where.get(name) ?? []).join(", ") || "–";
    const cells = [name, bytes(model.size), model.context_length ? count(model.context_length) : "–", on];
    cells.forEach((text, index) => setText(tr.children[index], text));
  });
  setHidden(byId("pull"), !state.caller.rights.includes("models"));
}

export function listenForPulls() {
  byId("pull").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = byId("pull-name").value.trim();
    if (!name) return;
    byId("pull-name").value = "";
    pull(name);
  });
}

async function pull(name) {
  const at = node("div", "pulling");
  const head = node("div", "line");
  const text = node("span", "", name);
  const stop = node("button", "", "Stop");
  stop.type = "button";
  const leaving = new AbortController();
  stop.addEventListener("click", () => leaving.abort());
  head.append(text, stop);
  const bar = node("progress");
  bar.setAttribute("aria-label", `Pulling ${name}`);
  at.append(head, bar);
  byId("pulls").append(at);
  try {
    for await (const step of events("POST", "v1/models/pull", { model: name }, leaving.signal)) {
      if (step.phase === "done") break;
      const size = step.total ? ` · ${bytes(step.done)} of ${bytes(step.total)}` : "";
      setText(text, `${name} · ${step.phase} ${step.file}${size}`);
      if (step.total) [bar.max, bar.value] = [step.total, step.done];
      else bar.removeAttribute("value");
    }
    toast(`${name} is here.`);
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message);
  }
  at.remove();
}
