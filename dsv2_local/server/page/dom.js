// Making and finding elements. Text always becomes a text node: nothing here parses HTML.

export const find = (id) => document.getElementById(id);

/** An element with attributes (`class`, `aria-label`, …), listeners (`onclick`, …) and children (nodes, or text). */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes. */
export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** One of the symbols in index.html. */
export const icon = (name) => drawing("svg", { "aria-hidden": "true" }, drawing("use", { href: `#i-${name}` }));

/** A button with an icon, named for screen readers and as a tooltip. */
export const iconButton = (name, label, onclick, more = {}) =>
  element("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));

/** Have a screen reader say something, once. */
export function announce(text) {
  const announcer = find("announcer");
  while (announcer.childElementCount > 20) announcer.firstElementChild.remove();
  announcer.append(element("p", {}, text));
}

/** Show a short message, with an action if it has one: {label, run}. */
export function toast(text, action = null) {
  const shown = element("div", { class: "toast" }, element("span", {}, text));
  const close = () => shown.remove();
  if (action) {
    const run = () => (close(), action.run());
    shown.append(element("button", { type: "button", onclick: run }, action.label));
  }
  shown.append(iconButton("close", "Dismiss", close));
  const toasts = find("toasts");
  while (toasts.childElementCount > 2) toasts.firstElementChild.remove();
  toasts.append(shown);
  if (!action || action.brief) setTimeout(close, 8000);
}

/** Copy text; works without a secure context too, where there is no `navigator.clipboard`. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = element("textarea", { class: "hidden", readonly: true });
    area.value = text;
    (focused?.closest("dialog") ?? document.body).append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** A button that copies what `text()` returns, and says that it has. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    if (!(await copyText(text()))) return toast("The browser refused to copy");
    button.replaceChildren(icon("done"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

const numbers = new Intl.NumberFormat("en-US");
export const count = (value) => numbers.format(Math.round(value));
export const rate = (value) => (value >= 100 ? count(value) : value.toFixed(value >= 10 ? 1 : 2));
export const percent = (part) => `${Math.round(100 * part)} %`;

/** A size in bytes, in binary units. */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) (bytes /= 1024), unit++;
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

/** A random name, also where there is no `crypto.randomUUID` (pages over HTTP). */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
