// Small tools for the page: nodes that are changed only where they differ, and words for quantities.
// Names come from anybody: they only ever become text.

export const byId = (id) => document.getElementById(id);

export function node(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function setText(at, text) {
  if (at.textContent !== text) at.textContent = text;
}

export function setClass(at, className) {
  if (at.className !== className) at.className = className;
}

export function setAttribute(at, name, value) {
  if (at.getAttribute(name) !== value) at.setAttribute(name, value);
}

export function setHidden(at, hidden) {
  if (at.hidden !== hidden) at.hidden = hidden;
}

// The children of `parent` become those of `keys`, in order. `make(key)` makes one that is missing, `fill(child,
// key)` brings it up to date; a child that stays where it is is not touched.
export function keyed(parent, keys, make, fill) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(keys);
  for (const [key, child] of known) {
    if (!wanted.has(key)) {
      child.remove();
      known.delete(key);
    }
  }
  let place = parent.firstElementChild;
  for (const key of keys) {
    let child = known.get(key);
    if (!child) known.set(key, (child = make(key)));
    fill(child, key);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
}

const UNITS = ["B", "KB", "MB", "GB", "TB"];

export function bytes(n) {
  let unit = 0;
  while (n >= 1000 && unit < UNITS.length - 1) [n, unit] = [n / 1000, unit + 1];
  return `${n < 10 && unit ? n.toFixed(1) : Math.round(n)} ${UNITS[unit]}`;
}

export function count(n) {
  return n < 1e4 ? String(Math.round(n)) : n < 1e6 ? `${+(n / 1e3).toFixed(1)}k` : `${+(n / 1e6).toFixed(1)}M`;
}

export function age(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m`;
  if (s < 86400) return `${Math.floor(s / 3600)}h ${Math.floor((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86400)}d`;
}

export const rate = (n) => (n ? n.toFixed(n < 100 ? 1 : 0) : "–");
export const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
export const short = (model) => model.replace(":latest", "");

// Owners' colours, in the order in which they were first seen.
const colours = new Map();
export function colour(owner) {
  if (!colours.has(owner)) colours.set(owner, `o${colours.size % 8}`);
  return colours.get(owner);
}

// Shows a dialog; what it was closed with, "" for Escape. A `close` event may come when it is open again.
export function ask(dialog) {
  if (!dialog.known) {
    dialog.known = true;
    dialog.addEventListener("close", () => dialog.open || dialog.settle(dialog.returnValue));
  }
  dialog.settle?.("");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => (dialog.settle = resolve));
}

let fading;
export function toast(text) {
  const at = byId("toast");
  at.textContent = text;
  at.hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => (at.hidden = true), 6000);
}
