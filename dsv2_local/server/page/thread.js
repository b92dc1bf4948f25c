// The messages of the conversation that is shown.

import { isRunning } from "./answering.js";
import { branches, path } from "./conversation.js";
import { announce, copyButton, count, element, iconButton, rate } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NEAR = 48; // pixels from the end at which new text keeps the end in view

/**
 * Shows one conversation at a time.
 *
 * `act` has what the buttons do: edit(message, text), again(answer), choose(message), newChat(). `context()` is the
 * number of tokens that a conversation may have, or null.
 */
export class Thread {
  constructor(list, scroller, toEnd, act, context) {
    Object.assign(this, { list, scroller, toEnd, act, context });
    this.conversation = null;
    this.views = new Map(); // by the id of the message
    this.follows = true;
    this.waiting = new Set(); // answers to show at the next frame
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    toEnd.addEventListener("click", () => this.end(true));
    new ResizeObserver(() => this.#keepEnd()).observe(list);
  }

  /** Show a conversation, or what has changed in it. */
  show(conversation) {
    if (conversation !== this.conversation) {
      this.views.clear();
      this.list.replaceChildren();
      this.conversation = conversation;
      this.follows = true;
    }
    const shown = path(conversation);
    const wanted = new Set(shown.map((message) => message.id));
    for (const [id, view] of this.views) {
      if (wanted.has(id)) continue;
      view.item.remove();
      this.views.delete(id);
    }
    shown.forEach((message, at) => {
      const view = this.views.get(message.id) ?? this.#newView(message);
      const there = this.list.children[at];
      if (there !== view.item) this.list.insertBefore(view.item, there ?? null); // what stays in place keeps the focus
      view.update();
    });
    this.#keepEnd();
  }

  /** Show what is new of an answer, at the next frame. */
  changed(answer) {
    if (!this.waiting.size) requestAnimationFrame(() => this.#refresh());
    this.waiting.add(answer.id);
  }

  /** Say how far the server has read the prompt of an answer: {phase, prompt_tokens, prefilled_tokens}. */
  reading(answer, progress) {
    this.views.get(answer.id)?.reading?.(progress);
  }

  /** Give the focus to the buttons that choose among versions, to this one if it can be used. */
  focusVersions(message, label) {
    const buttons = [...this.views.get(message.id).item.querySelectorAll(".branches button:enabled")];
    (buttons.find((button) => button.getAttribute("aria-label") === label) ?? buttons[0])?.focus();
  }

  /** Scroll to the newest message. */
  end(smoothly = false) {
    this.follows = true;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smoothly && !calm ? "smooth" : "instant" });
  }

  #newView(message) {
    const view = new (message.role === "user" ? QuestionView : AnswerView)(this, message);
    this.views.set(message.id, view);
    return view;
  }

  #refresh() {
    for (const id of this.waiting) this.views.get(id)?.update();
    this.waiting.clear();
    this.#keepEnd();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR;
    this.toEnd.hidden = this.follows;
  }

  #keepEnd() {
    if (this.follows) this.end();
    this.#scrolled();
  }
}

/** What is common to both kinds of messages: which branch is shown. */
class View {
  constructor(thread, message, speaker) {
    this.thread = thread;
    this.message = message;
    this.foot = element("div", { class: "foot" });
    this.item = element("li", { class: message.role }, element("h2", { class: "hidden" }, speaker));
  }

  /** ‹ 2/3 ›, if there are several branches. */
  branchButtons() {
    const all = branches(this.thread.conversation, this.message);
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const to = (number, name, label) => {
      const show = () => {
        this.thread.act.choose(all[number]);
        this.thread.focusVersions(all[number], label);
      };
      return iconButton(name, label, show, { disabled: !all[number] });
    };
    return [
      element(
        "span",
        { class: "branches", role: "group", "aria-label": `Version ${at + 1} of ${all.length}` },
        to(at - 1, "left", "Version before"),
        element("span", {}, `${at + 1}/${all.length}`),
        to(at + 1, "right", "Version after"),
      ),
    ];
  }
}

class QuestionView extends View {
  constructor(thread, message) {
    super(thread, message, "You");
    this.bubble = element("div", { class: "bubble" }, message.content);
    this.item.append(this.bubble, this.foot);
  }

  update() {
    const versions = branches(this.thread.conversation, this.message).length;
    if (this.editor || versions === this.shown) return;
    this.shown = versions;
    this.foot.replaceChildren(
      ...this.branchButtons(),
      iconButton("edit", "Edit and ask again", () => this.edit()),
      copyButton("Copy message", () => this.message.content),
    );
  }

  edit() {
    const area = element("textarea", { "aria-label": "Edit message", rows: "1" });
    area.value = this.message.content;
    const close = () => {
      this.editor.remove();
      this.editor = null;
      this.bubble.hidden = this.foot.hidden = false;
      this.update();
    };
    const send = () => {
      const text = area.value.trim();
      if (!text) return;
      close();
      this.thread.act.edit(this.message, text);
    };
    const cancel = () => {
      close();
      this.foot.querySelector('[aria-label^="Edit"]').focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
      if (event.key === "Escape") event.stopPropagation(), cancel();
    });
    this.editor = element(
      "div",
      { class: "editor" },
      area,
      element(
        "div",
        { class: "actions" },
        element("button", { type: "button", onclick: cancel }, "Cancel"),
        element("button", { type: "button", class: "primary", onclick: send }, "Ask again"),
      ),
    );
    this.bubble.hidden = this.foot.hidden = true;
    this.item.append(this.editor);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

class AnswerView extends View {
  constructor(thread, message) {
    super(thread, message, "Answer");
    this.text = element("div", { class: "text" });
    this.note = element("div", { class: "note" });
    this.item.append(this.text, this.note, this.foot);
    const spoken = isRunning(message); // what was there before is not read out
    this.markdown = new MarkdownView(this.text, (text) => spoken && announce(text));
    this.shown = null;
  }

  update() {
    const { message } = this;
    const running = isRunning(message);
    this.markdown.update(message.content, !running);
    this.item.classList.toggle("running", running);
    this.item.setAttribute("aria-busy", String(running));
    const versions = branches(this.thread.conversation, message).length;
    const state = JSON.stringify([running, Boolean(message.content), message.state, versions, this.thread.context()]);
    if (state === this.shown) return; // buttons stay the same, and keep the focus
    this.shown = state;
    this.note.replaceChildren(...this.#note(running));
    this.foot.replaceChildren(...(running ? [] : this.#buttons()));
  }

  reading({ phase, prompt_tokens: all, prefilled_tokens: done }) {
    if (!this.progress?.isConnected) return;
    const [label, bar] = this.progress.children;
    label.textContent =
      phase === "waiting" ? "Waiting for other answers" : phase === "prefill" ? `Reading the prompt: ${count(done)} of ${count(all)} tokens` : "";
    bar.hidden = phase !== "prefill";
    bar.max = all;
    bar.value = done;
  }

  #note(running) {
    const { message } = this;
    if (running && !message.content) {
      this.progress = element(
        "div",
        { class: "reading" },
        element("span", {}),
        element("progress", { "aria-label": "Prompt read", hidden: true }),
      );
      return [element("span", { class: "pulse", role: "img", "aria-label": "Answering" }), this.progress];
    }
    if (running) return [];
    if (message.state === "failed") {
      const full = message.error?.code === "context_length_exceeded";
      return [this.#problem(message.error?.message ?? "The answer failed.", full)];
    }
    if (message.state === "running") return [this.#problem("The page was left before the answer ended.", false)];
    if (message.state === "stopped") return [element("p", { class: "quiet" }, "Stopped.")];
    if (message.finish === "length") {
      const context = this.thread.context();
      const full = context !== null && (message.usage?.total_tokens ?? 0) >= context;
      return full
        ? [this.#problem(`The context of ${count(context)} tokens is full. Edit an earlier message, or start a new chat.`, true)]
        : [element("p", { class: "quiet" }, "Ended at the longest answer that the settings allow.")];
    }
    if (!message.content) return [element("p", { class: "quiet" }, "The answer is empty.")];
    return [];
  }

  #problem(text, full) {
    const { again, newChat } = this.thread.act;
    const button = full
      ? element("button", { type: "button", onclick: () => newChat() }, "New chat")
      : element("button", { type: "button", onclick: () => again(this.message) }, "Retry");
    return element("p", { class: "problem", role: "alert" }, element("span", {}, text), button);
  }

  #buttons() {
    const { message } = this;
    const buttons = this.branchButtons();
    if (message.content) buttons.push(copyButton("Copy answer", () => message.content));
    // The note of a failed answer has a button for that.
    if (message.content || message.state === "done" || message.state === "stopped") {
      buttons.push(iconButton("again", "Regenerate", () => this.thread.act.again(message)));
    }
    const figures = statistics(message);
    return figures ? [...buttons, element("span", { class: "figures" }, figures)] : buttons;
  }
}

/** Tokens and speed of an answer, in one line. */
function statistics({ usage, rate: speed }) {
  if (!usage) return "";
  const reused = usage.prompt_tokens_details?.cached_tokens;
  const parts = [`prompt ${count(usage.prompt_tokens)}${reused ? `, reused ${count(reused)}` : ""}`];
  parts.push(`answer ${count(usage.completion_tokens)} ${usage.completion_tokens === 1 ? "token" : "tokens"}`);
  if (speed) parts.push(`${rate(speed)} tok/s`);
  return parts.join(" · ");
}
