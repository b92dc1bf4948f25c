// The live view of the machine: asks `/dsv2/status` once a second while it is visible.

import { status } from "./api.js";
import { count, drawing, element, find, percent, rate, size } from "./dom.js";
import { ExpertView } from "./experts.js";

const SECOND = 1000;
const SAMPLES = 60; // of the sparklines, one a second

export class Machine {
  /** `told(status)` is called with every answer. */
  constructor(told) {
    this.told = told;
    this.panel = find("machine");
    this.timer = null;
    this.decode = new Rate("Decode", "decode");
    this.prefill = new Rate("Prefill", "prefill");
    this.answers = element("ul", { class: "answers" });
    this.blocks = new Bar("Blocks of the KV cache", [
      ["held", "held by answers"],
      ["cached", "prefix cache"],
      ["free", "free"],
    ]);
    this.memory = element("div", { class: "memory" });
    this.experts = new ExpertView();
    this.facts = element("dl", { class: "facts" });
    this.trouble = element("p", { class: "problem", hidden: true });
    this.content = element(
      "div",
      { class: "content" },
      element("section", { class: "rates", "aria-label": "Tokens per second" }, this.decode.root, this.prefill.root),
      section("Answers", this.answers),
      this.experts.root,
      section("KV cache", this.blocks.root),
      section("Memory", this.memory),
      section("Server", this.facts),
    );
    find("machine-body").append(this.trouble, this.content);
    document.addEventListener("visibilitychange", () => this.#schedule());
  }

  get visible() {
    return !this.panel.hidden;
  }

  set visible(shown) {
    this.panel.hidden = !shown;
    this.#schedule();
  }

  /** Ask at once and then every second, or stop asking. */
  #schedule() {
    clearTimeout(this.timer);
    this.timer = null;
    this.asked?.abort();
    if (this.visible && !document.hidden) this.#ask();
  }

  async #ask() {
    const asked = (this.asked = new AbortController());
    const began = performance.now();
    try {
      this.show(await status({ quiet: true, signal: asked.signal }));
    } catch (error) {
      if (asked.signal.aborted) return;
      this.trouble.textContent = error.message;
      this.trouble.hidden = false;
      this.content.classList.add("stale");
    }
    if (asked.signal.aborted) return;
    this.timer = setTimeout(() => this.#ask(), Math.max(0, SECOND - (performance.now() - began)));
  }

  show(found) {
    this.trouble.hidden = true;
    this.content.classList.remove("stale");
    this.told(found);
    this.decode.add(found.rates?.decode_tok_s ?? 0);
    this.prefill.add(found.rates?.prefill_tok_s ?? 0);
    this.#showAnswers(found);
    const { held = 0, cached = 0, free = 0, size: each = 64, total = 0 } = found.blocks ?? {};
    this.blocks.show({ held, cached, free }, `${count(held + cached)} of ${count(total)} blocks of ${each} tokens`);
    this.#showMemory(found.memory);
    this.experts.show(found.experts);
    this.#showFacts(found);
  }

  #showAnswers({ answers = [], waiting = 0, parallel }) {
    const items = answers.slice(0, 16).map((answer) => {
      const { phase, prompt_tokens: prompt, prefilled_tokens: done, completion_tokens: written, seconds } = answer;
      const what = { waiting: "waits", prefill: "prefill", decode: "decode" }[phase] ?? phase;
      const figures =
        phase === "prefill" ? `${count(done)} / ${count(prompt)} tokens` : phase === "decode" ? `${count(written)} tokens` : `${count(prompt)} tokens`;
      const bar = element("progress", { "aria-label": "Prompt read", max: String(prompt || 1), value: String(done) });
      return element(
        "li",
        { class: phase },
        element("span", { class: "phase" }, what),
        element("span", { class: "amount" }, figures),
        element("span", { class: "time" }, `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`),
        phase === "prefill" ? bar : null,
      );
    });
    if (!items.length) items.push(element("li", { class: "none" }, "Nothing is being computed."));
    const more = waiting > 0 ? `${count(waiting)} waiting, ${parallel} at a time` : answers.length > 16 ? "and more" : "";
    if (more) items.push(element("li", { class: "none" }, more));
    this.answers.replaceChildren(...items);
  }

  #showMemory(memory) {
    const rows = [];
    if (memory?.rss_bytes) rows.push(["RAM", memory.rss_bytes, memory.ram_bytes]);
    for (const gpu of memory?.gpu ?? []) rows.push([gpu.name ?? "GPU", gpu.used_bytes, gpu.total_bytes]);
    this.memory.replaceChildren(
      ...rows.map(([name, used, total]) =>
        element(
          "div",
          { class: "row" },
          element("span", { class: "name" }, name),
          element("span", { class: "amount" }, total ? `${size(used)} of ${size(total)}` : size(used)),
          total ? element("meter", { "aria-label": `${name} used`, min: "0", max: String(total), value: String(used) }) : null,
        ),
      ),
    );
  }

  #showFacts({ model, version, device, context, parallel, uptime_s: uptime, totals }) {
    const facts = [
      ["Model", model],
      ["Device", device],
      ["Context", context && `${count(context)} tokens`],
      ["At a time", parallel && `${parallel} answers`],
      ["Running for", uptime !== undefined && duration(uptime)],
      ["Requests", totals && count(totals.requests)],
      ["Tokens read", totals && `${count(totals.prompt_tokens)}, reused ${count(totals.reused_tokens)}`],
      ["Tokens written", totals && count(totals.completion_tokens)],
      ["Version", version],
    ].filter(([, value]) => value);
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  }
}

const section = (title, ...content) => element("section", {}, element("h3", {}, title), ...content);

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

/** A figure in tokens per second, with its last minute as a line. */
class Rate {
  constructor(name, kind) {
    this.values = [];
    this.figure = element("strong", {}, "0");
    this.line = drawing("polyline", { class: "line" });
    this.area = drawing("polygon", { class: "area" });
    this.chart = drawing(
      "svg",
      { viewBox: `0 0 ${SAMPLES - 1} 20`, preserveAspectRatio: "none", role: "img" },
      this.area,
      this.line,
    );
    this.name = name;
    this.root = element(
      "div",
      { class: `rate ${kind}` },
      element("span", { class: "name" }, name),
      element("span", { class: "figure" }, this.figure, " tok/s"),
      this.chart,
    );
  }

  add(value) {
    this.values = [...this.values, value].slice(-SAMPLES);
    this.figure.textContent = value ? rate(value) : "0";
    const most = Math.max(1, ...this.values);
    const first = SAMPLES - this.values.length;
    const points = this.values.map((each, at) => `${first + at},${(19 - (18 * each) / most).toFixed(2)}`);
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", `${first},20 ${points.join(" ")} ${SAMPLES - 1},20`);
    this.chart.setAttribute("aria-label", `${this.name} over the last minute, at most ${rate(most)} tokens per second`);
  }
}

/** Parts of a whole, as one bar with a legend. */
class Bar {
  constructor(label, parts) {
    this.parts = parts.map(([key, name]) => ({ key, name, piece: element("i", { class: key }), amount: element("span", { class: "amount" }) }));
    this.track = element("div", { class: "track", role: "img" }, ...this.parts.map(({ piece }) => piece));
    this.label = label;
    this.caption = element("p", { class: "quiet" });
    const legend = this.parts.map(({ key, name, amount }) =>
      element("li", {}, element("i", { class: `swatch ${key}` }), element("span", {}, name), amount),
    );
    this.root = element("div", { class: "bar-of-parts" }, this.track, element("ul", { class: "legend" }, ...legend), this.caption);
  }

  show(values, caption) {
    const total = Object.values(values).reduce((sum, value) => sum + value, 0) || 1;
    const described = [];
    for (const { key, name, piece, amount } of this.parts) {
      piece.hidden = !values[key];
      piece.style.width = `${(100 * values[key]) / total}%`;
      amount.textContent = count(values[key]);
      described.push(`${name} ${percent(values[key] / total)}`);
    }
    this.track.setAttribute("aria-label", `${this.label}: ${described.join(", ")}`);
    this.caption.textContent = caption;
  }
}
