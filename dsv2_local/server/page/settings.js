// What the user has set for answers: kept in this browser, sent with every request.

import { element, find } from "./dom.js";

const KEY = "dsv2.settings";
const MAIN = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, about: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, about: "likeliest tokens up to this sum" },
  { name: "max_tokens", label: "Longest answer", min: 1, max: 1000000, step: 1, about: "in tokens" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, about: "the same seed repeats an answer" },
];
const MORE = [
  { name: "top_k", label: "Top k", min: 1, max: 100000, step: 1, about: "so many of the likeliest tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, about: "tokens this likely, relative to the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, about: "above 1: repeats less" },
];

let settings = read();

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // Full or forbidden: they hold until the page is left.
  }
}

/** The system message, and what else a request has: {system, options}. */
export function parameters() {
  const options = {};
  for (const { name } of [...MAIN, ...MORE]) if (typeof settings[name] === "number") options[name] = settings[name];
  const stop = (settings.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) options.stop = stop;
  return { system: (settings.system ?? "").trim(), options };
}

/** Build the dialog; `changed` is called when a setting changes. */
export function prepareSettings(changed) {
  const dialog = find("settings");
  const inputs = new Map();

  const field = (name, label, about, input) => {
    input.id = `set-${name}`;
    const note = element("small", { id: `about-${name}`, class: "quiet" }, about);
    input.setAttribute("aria-describedby", note.id);
    inputs.set(name, input);
    return element("div", { class: "setting" }, element("label", { for: input.id }, label), input, note);
  };
  const area = (name, label, about, rows) =>
    field(name, label, about, element("textarea", { rows, oninput: ({ target }) => set(name, target.value) }));
  const number = ({ name, label, about, min, max, step }) => {
    const input = element("input", { type: "number", inputmode: "decimal", min, max, step: "any", placeholder: "model’s choice" });
    input.addEventListener("input", () => {
      const value = input.value === "" ? null : Number(input.value);
      const wrong = input.validity.badInput || (value !== null && (value < min || value > max || (step === 1 && value % 1)));
      input.setCustomValidity(wrong ? `${label}: ${min} to ${max}` : "");
      input.setAttribute("aria-invalid", String(Boolean(wrong)));
      find(`about-${name}`).textContent = wrong ? `from ${min} to ${max}${step === 1 ? ", whole" : ""}` : about;
      if (!wrong) set(name, value);
    });
    return field(name, label, about, input);
  };
  const set = (name, value) => {
    settings[name] = value;
    keep();
    changed();
  };
  const show = () => {
    for (const [name, input] of inputs) {
      input.value = settings[name] ?? "";
      input.dispatchEvent(new Event("input"));
    }
  };

  find("fields").append(
    area("system", "System message", "what the model should keep to", "3"),
    element("div", { class: "numbers" }, ...MAIN.map(number)),
    element(
      "details",
      {},
      element("summary", {}, "More"),
      element("div", { class: "numbers" }, ...MORE.map(number)),
      area("stop", "Stop strings", "one a line; an answer ends before the first that appears", "2"),
    ),
  );
  find("settings-open").addEventListener("click", () => {
    show();
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  find("settings-reset").addEventListener("click", () => {
    settings = {};
    keep();
    show();
    changed();
  });
}

/** Whether any setting is not the model's choice. */
export const isChanged = () => Boolean(parameters().system || Object.keys(parameters().options).length);
