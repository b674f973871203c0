// A line chart in SVG: a path a series, a scale, and the values under the pointer.

import { keyed, node, setAttribute, setClass, setText } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [600, 100];
const MOST_NAMED = 3;

function shape(tag, attributes, parent) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

// The least of 1, 2, 5 × 10^n that is not below x.
function ceiling(x) {
  const ten = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= x * 0.999999);
}

export class Chart {
  // `format(y)` and `formatX(x)` are for people. With `fromZero` the scale begins there.
  constructor(parent, title, { format = String, formatX = String, fromZero = true } = {}) {
    Object.assign(this, { format, formatX, fromZero, series: [] });
    const figure = node("figure", "chart");
    const caption = node("figcaption");
    this.now = node("b");
    caption.append(node("span", "", title), this.now);
    const box = node("div", "plot");
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, box);
    this.svg.setAttribute("aria-label", title);
    for (const y of [0, HEIGHT / 2, HEIGHT]) shape("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }, this.svg);
    this.cursor = shape("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" }, this.svg);
    this.top = node("span", "top");
    this.bottom = node("span", "bottom");
    box.append(this.top, this.bottom);
    this.feet = node("div", "feet");
    this.left = node("span");
    this.right = node("span");
    this.feet.append(this.left, this.right);
    figure.append(caption, box, this.feet);
    parent.append(figure);
    this.paths = new Map();
    box.addEventListener("pointermove", (event) => this.#point((event.clientX - box.getBoundingClientRect().left) / box.clientWidth));
    box.addEventListener("pointerleave", () => this.#point(null));
  }

  // `series`: [{ name, label?, className, points: [[x, y], …], marks? }], x rising. `range`: of x, else what the points have.
  show(series, { range } = {}) {
    this.series = series.filter((one) => one.points.length);
    const all = this.series.flatMap((one) => one.points);
    const xs = range ?? [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
    const ys = all.map((p) => p[1]);
    let [low, high] = all.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
    if (this.fromZero) [low, high] = [0, high > 0 ? ceiling(high) : 1];
    else if (low === high) [low, high] = [low - 0.5, high + 0.5];
    this.scale = { x0: xs[0], x: WIDTH / (xs[1] - xs[0] || 1), y0: low, y: HEIGHT / (high - low) };
    const names = new Set(this.series.map((one) => one.name));
    for (const [name, path] of this.paths) {
      if (!names.has(name)) {
        path.remove();
        this.paths.delete(name);
      }
    }
    for (const one of this.series) {
      let path = this.paths.get(one.name);
      if (!path) this.paths.set(one.name, (path = shape("path", {}, this.svg)));
      setAttribute(path, "class", `line ${one.className}${one.marks ? " marks" : ""}`);
      setAttribute(path, "d", this.#path(one));
    }
    setText(this.top, all.length ? this.format(high) : "");
    setText(this.bottom, all.length ? this.format(low) : "");
    setText(this.left, all.length ? this.formatX(xs[0]) : "");
    setText(this.right, all.length ? this.formatX(xs[1]) : "");
    this.#point(this.pointer ?? null);
  }

  #path(one) {
    const { x0, x, y0, y } = this.scale;
    const at = ([px, py]) => `${((px - x0) * x).toFixed(1)} ${(HEIGHT - (py - y0) * y).toFixed(1)}`;
    if (one.marks) return one.points.map((p) => `M${at(p)}h.01`).join("");
    return `M${one.points.map(at).join("L")}`;
  }

  #point(share) {
    this.pointer = share;
    setAttribute(this.cursor, "visibility", share === null ? "hidden" : "visible");
    if (!this.series.length) return keyed(this.now, []);
    const x = this.scale.x0 + ((share ?? 1) * WIDTH) / this.scale.x;
    const near = (points) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
    const found = this.series.slice(0, MOST_NAMED).map((one) => [one, near(one.points)]);
    const at = found[0][1][0];
    for (const side of ["x1", "x2"]) setAttribute(this.cursor, side, ((at - this.scale.x0) * this.scale.x).toFixed(1));
    const told = found.map(([{ name, label = name }, [, y]]) => [name, `${label} ${this.format(y)}`]);
    if (share !== null) told.push(["", `at ${this.formatX(at)}`]);
    const texts = new Map(told);
    const classes = new Map(found.map(([one]) => [one.name, `key ${one.className}`]));
    keyed(this.now, [...texts.keys()], () => node("span"), (span, name) => {
      setClass(span, classes.get(name) ?? "");
      setText(span, texts.get(name));
    });
  }
}
