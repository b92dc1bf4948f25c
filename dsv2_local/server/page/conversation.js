// A conversation: a tree of messages. Editing or regenerating adds a branch beside the old one, which is kept.
//
// A message is {id, parent, role, content, created, chosen}; `chosen` is the child that is shown after it. An answer
// also has `state` ("running", "done", "stopped" or "failed"), and `finish`, `usage`, `rate` and `error` when known.

import { randomId } from "./dom.js";

export const TITLE_LENGTH = 60;

export function newConversation() {
  const now = Date.now();
  return { id: randomId(), title: "", named: false, created: now, updated: now, chosen: null, messages: [] };
}

const byId = (conversation, id) => conversation.messages.find((message) => message.id === id) ?? null;

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const found = [];
  for (let id = conversation.chosen; id !== null; id = found.at(-1).chosen) {
    const message = byId(conversation, id);
    if (message === null) break;
    found.push(message);
  }
  return found;
}

/** The branches of which `message` is one, itself included. */
export const branches = (conversation, message) =>
  conversation.messages.filter((other) => other.parent === message.parent);

/** Show the branch of `message`. */
export function choose(conversation, message) {
  (byId(conversation, message.parent) ?? conversation).chosen = message.id;
}

/** Add a message after `parent` (null: as the first one), and show its branch. */
export function add(conversation, parent, role, content) {
  const message = { id: randomId(), parent: parent?.id ?? null, role, content, created: Date.now(), chosen: null };
  if (role === "assistant") Object.assign(message, { state: "running", finish: null, usage: null, rate: null, error: null });
  conversation.messages.push(message);
  choose(conversation, message);
  conversation.updated = message.created;
  if (!conversation.named && role === "user" && message.parent === null) conversation.title = titleOf(content);
  return message;
}

function titleOf(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

/** The messages for the API that `answer` answers. */
export function promptOf(conversation, answer, system) {
  const before = [];
  for (let at = byId(conversation, answer.parent); at !== null; at = byId(conversation, at.parent)) before.unshift(at);
  const messages = before.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** The conversation as a program reads it: every branch. */
export const asJson = (conversation) => `${JSON.stringify(conversation, null, 2)}\n`;

/** The messages that are shown, as a text to read. */
export function asMarkdown(conversation) {
  const parts = path(conversation).map(({ role, content }) => `## ${role === "user" ? "You" : "Answer"}\n\n${content}`);
  return `${[`# ${conversation.title || "Conversation"}`, ...parts].join("\n\n")}\n`;
}

/** A file name for it. */
export function fileName(conversation, ending) {
  const words = conversation.title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${words.slice(0, 48) || "conversation"}.${ending}`;
}
