// Where the routed experts are and what happened to them, as heat maps by layer: resident, hit, fetched, on the CPU.

import { count, element, percent } from "./dom.js";

const ROWS = [
  ["resident", "resident"],
  ["hit", "hit"],
  ["fetched", "fetched"],
  ["cpu", "CPU"],
];
const WINDOW = 5; // answers of the server (seconds) over which uses are counted

export class ExpertView {
  constructor() {
    this.history = []; // of the counters by layer
    this.layers = [];
    this.shares = canvas("shares");
    this.map = canvas("map");
    this.summary = element("p", { class: "quiet" });
    this.last = element("span");
    this.under = element("p", { class: "quiet pointed", "aria-hidden": "true" });
    const legend = ROWS.map(([key, name]) => element("li", {}, element("i", { class: `swatch ${key}` }), element("span", {}, name)));
    this.table = element("details", {}, element("summary", {}, "As a table"));
    this.table.addEventListener("toggle", () => this.#showTable());
    this.root = element(
      "section",
      { class: "experts", hidden: true },
      element("h3", {}, "Routed experts by layer"),
      element(
        "div",
        { class: "heat" },
        element("ul", { class: "names", "aria-hidden": "true" }, ...legend),
        element("div", { class: "plot" }, this.shares, axis()),
      ),
      this.summary,
      element("h4", {}, "In GPU memory, by layer and expert"),
      element("div", { class: "heat" }, element("span", { class: "names ends", "aria-hidden": "true" }, element("span", {}, "expert 0"), this.last), element("div", { class: "plot" }, this.map)),
      this.under,
      this.table,
    );
    for (const plot of [this.shares, this.map]) {
      plot.addEventListener("pointermove", (event) => this.#point(event, plot));
      plot.addEventListener("pointerleave", () => (this.under.textContent = ""));
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(this.root);
  }

  /** Show `experts` of the status; null: none are off the GPU. */
  show(experts) {
    this.root.hidden = !experts?.layers?.length;
    if (this.root.hidden) return;
    const counters = new Map(experts.layers.map(({ layer, hits, fetched, cpu }) => [layer, { hits, fetched, cpu }]));
    this.history = [...this.history, counters].slice(-WINDOW - 1);
    const before = this.history[0];
    this.layers = experts.layers.map(({ layer, experts: all, resident, hits, fetched, cpu }) => {
      const then = before.get(layer) ?? { hits: 0, fetched: 0, cpu: 0 };
      const since = (now, past) => Math.max(0, this.history.length > 1 ? now - past : now);
      const used = { hit: since(hits, then.hits), fetched: since(fetched, then.fetched), cpu: since(cpu, then.cpu) };
      return { layer, all, resident, used, total: used.hit + used.fetched + used.cpu };
    });
    this.#draw();
    this.#summarise();
    this.#showTable();
  }

  /** How much of a row a layer has, 0 to 1. */
  #share(layer, key) {
    if (key === "resident") return layer.resident.length / Math.max(1, layer.all);
    return layer.used[key] / Math.max(1, layer.total);
  }

  #summarise() {
    const sum = (of) => this.layers.reduce((total, layer) => total + of(layer), 0);
    const total = sum((layer) => layer.total);
    const part = (key) => percent(sum((layer) => layer.used[key]) / Math.max(1, total));
    const resident = sum((layer) => layer.resident.length);
    const all = sum((layer) => layer.all);
    const uses = total ? `Hit ${part("hit")}, fetched ${part("fetched")}, CPU ${part("cpu")}` : "No expert was used";
    const text = `${uses} (last ${WINDOW} s)\n${count(resident)} of ${count(all)} resident`;
    this.summary.textContent = text;
    this.shares.setAttribute("aria-label", `Routed experts of ${this.layers.length} layers: ${text}`);
    this.map.setAttribute("aria-label", `${count(resident)} of ${count(all)} routed experts are in GPU memory`);
  }

  #draw() {
    if (this.root.hidden || !this.layers.length) return;
    const style = getComputedStyle(this.root);
    const colour = (key) => style.getPropertyValue(`--${key}`);
    const empty = style.getPropertyValue("--cell");
    const columns = this.layers.length;
    paint(this.shares, (draw, width, height) => {
      ROWS.forEach(([key], row) => {
        this.layers.forEach((layer, column) => {
          const cell = [...span(column, columns, width), ...span(row, ROWS.length, height)];
          fill(draw, cell, empty, 1);
          const share = this.#share(layer, key);
          if (share) fill(draw, cell, colour(key), 0.15 + 0.85 * share);
        });
      });
    });
    paint(this.map, (draw, width, height) => {
      this.layers.forEach((layer, column) => {
        const [x, w] = span(column, columns, width);
        fill(draw, [x, w, 0, height], empty, 1);
        for (const expert of layer.resident) {
          const from = Math.floor((expert * height) / layer.all);
          fill(draw, [x, w, from, Math.max(1, Math.floor(((expert + 1) * height) / layer.all) - from)], colour("resident"), 1);
        }
      });
    });
    const [first, last] = this.root.querySelectorAll(".axis span");
    first.textContent = `layer ${this.layers[0].layer}`;
    last.textContent = String(this.layers.at(-1).layer);
    this.last.textContent = String(this.layers[0].all - 1);
  }

  #point(event, plot) {
    const { left, width } = plot.getBoundingClientRect();
    const layer = this.layers[Math.floor(((event.clientX - left) / width) * this.layers.length)];
    if (!layer) return;
    const { hit, fetched, cpu } = layer.used;
    this.under.textContent = `layer ${layer.layer}: ${layer.resident.length} of ${layer.all} resident, ${count(hit)} hit, ${count(fetched)} fetched, ${count(cpu)} CPU`;
  }

  #showTable() {
    if (!this.table.open) return;
    const row = (tag, texts) => element("tr", {}, ...texts.map((text) => element(tag, {}, text)));
    const rows = this.layers.map(({ layer, resident, all, used: { hit, fetched, cpu } }) =>
      row("td", [layer, `${resident.length}/${all}`, hit, fetched, cpu].map(String)),
    );
    const table = element(
      "table",
      {},
      element("thead", {}, row("th", ["layer", "resident", "hit", "fetched", "CPU"])),
      element("tbody", {}, ...rows),
    );
    this.table.querySelector("table")?.remove();
    this.table.append(table);
  }
}

const canvas = (name) => element("canvas", { class: name, role: "img", "aria-label": "" });
const axis = () => element("div", { class: "axis", "aria-hidden": "true" }, element("span"), element("span"));

/** Where cell `at` of `cells` begins in so many pixels, and how many it has: [start, length], with a gap if there is room. */
function span(at, cells, pixels) {
  const from = Math.round((at * pixels) / cells);
  const to = Math.round(((at + 1) * pixels) / cells);
  const gap = pixels / cells >= 4 ? Math.max(1, Math.round(pixels / cells / 12)) : 0;
  return [from, Math.max(1, to - from - gap)];
}

function fill(draw, [x, width, y, height], colour, strength) {
  draw.globalAlpha = strength;
  draw.fillStyle = colour;
  draw.fillRect(x, y, width, height);
}

/** Draw a canvas anew in the pixels of the screen. */
function paint(target, work) {
  const { width, height } = target.getBoundingClientRect();
  const scale = devicePixelRatio || 1;
  target.width = Math.max(1, Math.round(width * scale));
  target.height = Math.max(1, Math.round(height * scale));
  work(target.getContext("2d"), target.width, target.height);
}
