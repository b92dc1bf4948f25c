// The list of conversations: open, rename, export, delete.

import { asJson, asMarkdown, fileName } from "./conversation.js";
import { element, find, iconButton } from "./dom.js";

const DAY = 24 * 3600 * 1000;

/** `act` has open(id), rename(id, title), remove(id) and whole(id), which returns the conversation. */
export class Sidebar {
  constructor(act) {
    this.act = act;
    this.list = find("conversations");
    this.menu = find("menu");
    this.menu.addEventListener("keydown", (event) => this.#menuKey(event));
    this.menu.addEventListener("toggle", ({ newState }) => {
      this.opener?.setAttribute("aria-expanded", String(newState === "open"));
      if (newState === "closed" && this.menu.contains(document.activeElement)) this.opener?.focus();
    });
  }

  /** Show {id, title, updated}, the newest first; `current` is open, and those in `answering` are being answered. */
  show(titles, current, answering) {
    if (this.list.querySelector("input")) return; // a title is being changed
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    let group = null;
    this.list.replaceChildren();
    for (const title of titles) {
      const name = groupOf(title.updated);
      if (name !== group) this.list.append(element("li", { class: "group", role: "presentation" }, name));
      group = name;
      this.list.append(this.#item(title, title.id === current, answering.has(title.id)));
    }
    if (focused) this.list.querySelector(`[data-id="${focused}"] button`)?.focus();
  }

  #item({ id, title }, isCurrent, isAnswering) {
    const open = element(
      "button",
      { type: "button", class: "open", "aria-current": isCurrent ? "page" : null, onclick: () => this.act.open(id) },
      element("span", {}, title || "New chat"),
    );
    if (isAnswering) open.append(element("i", { class: "pulse", role: "img", "aria-label": "Answering" }));
    const more = iconButton("more", `More for ${title || "New chat"}`, () => this.#openMenu(id, title, more), {
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    return element("li", { "data-id": id }, open, more);
  }

  #openMenu(id, title, opener) {
    this.opener = opener;
    const entry = (label, run, more = {}) =>
      element(
        "button",
        { type: "button", role: "menuitem", onclick: () => (this.menu.hidePopover(), run()), ...more },
        label,
      );
    this.menu.replaceChildren(
      entry("Rename", () => this.#rename(id, title)),
      entry("Export as Markdown", () => this.#export(id, "md")),
      entry("Export as JSON", () => this.#export(id, "json")),
      entry("Delete", () => this.act.remove(id), { class: "danger" }),
    );
    this.menu.showPopover();
    const place = opener.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.menu;
    this.menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
    this.menu.style.top = `${place.bottom + height + 8 < innerHeight ? place.bottom + 4 : Math.max(8, place.top - height - 4)}px`;
    this.menu.firstElementChild.focus();
  }

  #menuKey(event) {
    const entries = [...this.menu.children];
    const at = entries.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1 + entries.length, Home: 0, End: entries.length - 1 }[event.key];
    if (to !== undefined) event.preventDefault(), entries[to % entries.length].focus();
    if (event.key === "Tab") this.menu.hidePopover();
  }

  #rename(id, title) {
    const item = this.list.querySelector(`[data-id="${id}"]`);
    const input = element("input", { type: "text", "aria-label": "Title", maxlength: "120" });
    input.value = title;
    let open = true;
    const close = (keep) => {
      if (!open) return;
      open = false;
      const wanted = input.value.trim();
      input.remove();
      this.act.rename(id, keep && wanted ? wanted : title);
      this.list.querySelector(`[data-id="${id}"] button`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) event.preventDefault(), close(true);
      if (event.key === "Escape") event.stopPropagation(), close(false);
    });
    input.addEventListener("blur", () => close(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  async #export(id, ending) {
    const conversation = await this.act.whole(id);
    if (!conversation) return;
    const [text, type] = ending === "json" ? [asJson(conversation), "application/json"] : [asMarkdown(conversation), "text/markdown"];
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = element("a", { href: url, download: fileName(conversation, ending) });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }
}

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "Last seven days" : "Older";
}
