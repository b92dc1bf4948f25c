// The page: joins conversations, answers, the thread, the sidebar, settings and the machine.

import { answerIn, answerNamed, isRunning, liveConversation, stop, write } from "./answering.js";
import { onKeyNeeded, status } from "./api.js";
import { add, choose, newConversation, path } from "./conversation.js";
import { announce, count, element, find, toast } from "./dom.js";
import { Machine } from "./machine.js";
import { isChanged, prepareSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";

const SAVED_EVERY = 2000; // milliseconds, while an answer is written
const LOADING = 2000; // milliseconds between two questions whether the model is loaded
const SUGGESTIONS = ["What is a violin?", "Explain what a harbour is.", "How do rivers and lakes differ?"];

const narrow = matchMedia("(max-width: 800px)");
const overlaid = matchMedia("(max-width: 1100px)"); // the machine lies over the conversation
const touch = matchMedia("(pointer: coarse)");

let server = null; // the latest status
let current = newConversation();
let titles = [];
let kept = true; // whether the browser keeps conversations
let savedAt = 0;

const thread = new Thread(
  find("thread"),
  find("scroller"),
  find("to-end"),
  {
    edit: (message, text) => ask(text, parentOf(message)),
    again: (answer) => answerTo(parentOf(answer)),
    choose: (message) => {
      choose(current, message);
      keep(current);
      refresh();
    },
    newChat: () => open(newConversation()),
  },
  () => server?.context ?? null,
);

const sidebar = new Sidebar({
  open: async (id) => {
    const conversation = await whole(id);
    if (conversation) open(conversation);
  },
  whole,
  rename: async (id, title) => {
    const conversation = await whole(id);
    if (!conversation) return;
    Object.assign(conversation, { title, named: true });
    await keep(conversation);
    refresh();
  },
  remove: async (id) => {
    const conversation = await whole(id);
    if (!conversation) return;
    const running = answerIn(conversation);
    if (running) stop(running);
    conversation.deleted = true;
    await store.remove(id).catch(() => {});
    if (id === current.id) open(newConversation());
    await showTitles();
    const undo = async () => {
      delete conversation.deleted;
      await keep(conversation);
      open(conversation);
    };
    toast(`“${conversation.title || "New chat"}” is deleted.`, { label: "Undo", run: undo, brief: true });
  },
});

const machine = new Machine((found) => {
  learn(found);
  for (const progress of found.answers ?? []) {
    const answer = answerNamed(progress.id);
    if (answer) thread.reading(answer, progress);
  }
});

const parentOf = (message) => current.messages.find(({ id }) => id === message.parent) ?? null;

/** The conversation of that name, whole. */
async function whole(id) {
  if (id === current.id) return current;
  return liveConversation(id) ?? (await store.load(id).catch(() => null));
}

// Asking and answering

function ask(text, parent) {
  if (answerIn(current)) return;
  const question = add(current, parent, "user", text);
  answerTo(question);
}

function answerTo(question) {
  if (!question || answerIn(current)) return;
  const conversation = current;
  const answer = add(conversation, question, "assistant", "");
  write(conversation, answer, { changed: answered, ended: hasEnded });
  announce("Answering");
  keep(conversation);
  refresh();
  thread.end();
  if (!touch.matches) prompt.focus(); // the button that asked may be gone
}

function answered(conversation, answer) {
  if (conversation === current) thread.changed(answer);
  if (Date.now() - savedAt > SAVED_EVERY) keep(conversation);
}

function hasEnded(conversation, answer) {
  conversation.updated = Date.now();
  keep(conversation);
  if (conversation === current) refresh();
  else showTitles();
  if (answer.state === "failed") announce(`The answer failed: ${answer.error.message}`);
  if (answer.state === "stopped") announce("Stopped");
}

// Conversations

async function keep(conversation) {
  if (conversation.deleted) return;
  savedAt = Date.now();
  try {
    await store.save(conversation);
    setKept(true);
  } catch (error) {
    setKept(false, error);
  }
  await showTitles();
}

function setKept(now, error = null) {
  if (!now && kept) {
    const why = store.isFull(error) ? "The browser’s storage is full" : "The browser does not keep conversations here";
    toast(`${why}: this one is lost when the page is left. Export it, or delete others.`, { label: "OK", run: () => {} });
  }
  kept = now;
  find("stored").textContent = now
    ? "Conversations are kept in this browser alone."
    : "Conversations are not kept: they are lost when the page is left.";
  find("stored").classList.toggle("warning", !now);
}

async function showTitles() {
  titles = await store.list().catch(() => titles);
  const answering = new Set(titles.filter(({ id }) => liveConversation(id)).map(({ id }) => id));
  sidebar.show(titles, current.id, answering);
}

function open(conversation) {
  current = conversation;
  history.replaceState(null, "", path(conversation).length ? `#${conversation.id}` : location.pathname);
  if (narrow.matches) showSidebar(false);
  refresh();
  thread.end();
  if (!touch.matches) find("prompt").focus();
}

/** Show everything that depends on the current conversation. */
function refresh() {
  const messages = path(current);
  const running = answerIn(current);
  document.body.dataset.empty = String(!messages.length);
  find("welcome").hidden = messages.length > 0;
  find("title").textContent = current.title || "New chat";
  document.title = current.title ? `${current.title} · dsv2` : "dsv2";
  if (messages.length && location.hash !== `#${current.id}`) history.replaceState(null, "", `#${current.id}`);
  thread.show(current);
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  showGauge(messages);
  fit();
  showTitles();
}

function showGauge(messages) {
  const used = messages.findLast((message) => message.usage)?.usage.total_tokens;
  const gauge = find("gauge");
  gauge.hidden = !used || !server?.context;
  if (gauge.hidden) return;
  gauge.setAttribute("aria-valuemax", server.context);
  gauge.setAttribute("aria-valuenow", used);
  gauge.title = `Context: ${count(used)} of ${count(server.context)} tokens`;
  gauge.querySelector(".figures").textContent = `${count(used)} / ${count(server.context)}`;
  gauge.querySelector("i").style.width = `${Math.min(100, (100 * used) / server.context)}%`;
  gauge.classList.toggle("full", used > 0.9 * server.context);
}

// What the server says of itself

function learn(found) {
  const news = found.model !== server?.model || found.state !== server?.state || found.context !== server?.context;
  server = found;
  if (!news) return;
  find("model").textContent = found.model ?? "dsv2";
  const facts = [found.device, found.context && `context ${count(found.context)} tokens`].filter(Boolean).join(" · ");
  const states = {
    loading: "The model is loading …",
    failed: "The model could not be loaded; the server’s log says why.",
    draining: "The server is shutting down.",
    unloaded: "The model is loaded with the next message.",
  };
  find("about").textContent = states[found.state] ?? facts;
  refresh();
}

async function meet() {
  try {
    learn(await status());
    if (server.state === "loading") setTimeout(meet, LOADING);
  } catch (error) {
    find("about").textContent = error.message;
    if (error.code === "unreachable") setTimeout(meet, LOADING);
  }
}

find("key-cancel").addEventListener("click", () => find("key").close("cancel"));
onKeyNeeded(
  (refused) =>
    new Promise((resolve) => {
      const dialog = find("key");
      const value = find("key-value");
      find("key-text").textContent = refused
        ? "The server does not accept this key. Enter another one."
        : "The server asks for a key. It is kept in this tab, until you close it.";
      value.value = "";
      dialog.returnValue = "cancel";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && value.value ? value.value : null), { once: true });
      dialog.showModal();
      value.focus();
    }),
);

// The message box

const prompt = find("prompt");

/** As high as its text, up to the limit of the style sheet. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  find("send").disabled = !prompt.value.trim();
}

function send() {
  const text = prompt.value.trim();
  if (!text || answerIn(current)) return;
  prompt.value = "";
  fit();
  ask(text, path(current).at(-1) ?? null);
}

prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("composer").addEventListener("click", (event) => {
  if (event.target.classList.contains("field")) prompt.focus();
});
find("stop").addEventListener("click", () => {
  const running = answerIn(current);
  if (running) stop(running);
  prompt.focus();
});

// Keys that work everywhere

document.addEventListener("keydown", (event) => {
  const command = event.ctrlKey || event.metaKey;
  if (command && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (!document.querySelector("dialog[open]")) open(newConversation());
  }
  if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
  const running = answerIn(current);
  if (running) stop(running);
  else if (narrow.matches && document.body.dataset.sidebar === "open") showSidebar(false, true);
  else if (overlaid.matches && machine.visible) showMachine(false, true);
});

// Panels

function showSidebar(shown, moveFocus = false) {
  document.body.dataset.sidebar = shown ? "open" : "closed";
  find("sidebar").inert = !shown;
  find("sidebar-open").setAttribute("aria-expanded", String(shown));
  find("sidebar-open").hidden = shown && !narrow.matches;
  if (!narrow.matches) remember("dsv2.sidebar", shown);
  if (shown && narrow.matches && machine.visible) showMachine(false);
  veil();
  if (moveFocus) find(shown ? "sidebar-close" : "sidebar-open").focus();
}

function showMachine(shown, moveFocus = false) {
  machine.visible = shown;
  document.body.dataset.machine = shown ? "open" : "closed";
  find("machine-toggle").setAttribute("aria-expanded", String(shown));
  if (!overlaid.matches) remember("dsv2.machine", shown);
  veil();
  if (moveFocus) find(shown ? "machine-close" : "machine-toggle").focus();
}

/** What is under a panel that lies over it cannot be used. */
function veil() {
  const sidebarOver = narrow.matches && document.body.dataset.sidebar === "open";
  const machineOver = overlaid.matches && machine.visible;
  find("veil").hidden = !sidebarOver && !machineOver;
  find("stage").inert = sidebarOver || (narrow.matches && machineOver);
}

function remember(name, value) {
  try {
    localStorage.setItem(name, String(value));
  } catch {
    // It holds until the page is left.
  }
}

find("sidebar-open").addEventListener("click", () => showSidebar(true, true));
find("sidebar-close").addEventListener("click", () => showSidebar(false, true));
find("machine-toggle").addEventListener("click", () => showMachine(!machine.visible, overlaid.matches && !machine.visible));
find("machine-close").addEventListener("click", () => showMachine(false, true));
find("veil").addEventListener("click", () => {
  if (narrow.matches) showSidebar(false);
  showMachine(false);
});
find("new-chat").addEventListener("click", () => open(newConversation()));
narrow.addEventListener("change", () => showSidebar(!narrow.matches));
overlaid.addEventListener("change", veil);

// Beginning

async function begin() {
  find("suggestions").append(
    ...SUGGESTIONS.map((text) => element("li", {}, element("button", { type: "button", onclick: () => ask(text, null) }, text))),
  );
  if (/Mac|iPhone|iPad/.test(navigator.platform)) find("new-chat").querySelector("kbd").textContent = "⌘ K";
  find("hint").textContent = "Enter sends, Shift+Enter begins a new line, Esc stops";
  const showChanged = () => {
    find("settings-open").classList.toggle("changed", isChanged());
    find("settings-open").setAttribute("aria-label", isChanged() ? "Settings (changed)" : "Settings");
  };
  prepareSettings(showChanged);
  showChanged();
  const stored = (name) => {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  };
  showSidebar(!narrow.matches && stored("dsv2.sidebar") !== "false");
  showMachine(!overlaid.matches && stored("dsv2.machine") === "true");
  try {
    titles = await store.list();
    const wanted = location.hash.slice(1);
    const conversation = wanted ? await store.load(wanted) : null;
    if (conversation) current = conversation;
  } catch (error) {
    setKept(false, error);
  }
  open(current);
  store.onChange(showTitles);
  addEventListener("pagehide", () => {
    const running = answerIn(current);
    if (running && isRunning(running)) keep(current);
  });
  document.body.dataset.ready = "true";
  meet();
}

begin();
