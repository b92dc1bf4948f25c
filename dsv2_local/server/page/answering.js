// Answers that are being written. They go on while another conversation is shown.

import { ApiError, chat } from "./api.js";
import { promptOf } from "./conversation.js";
import { parameters } from "./settings.js";

const SHORTEST = 30; // milliseconds between the first and the last piece from which a speed can be told

const running = new Map(); // by the id of the answer: {controller, conversation, answer, named}

/** Whether something in a conversation is being answered, and what. */
export const answerIn = (conversation) =>
  [...running.values()].find((each) => each.conversation.id === conversation.id)?.answer ?? null;

export const isRunning = (answer) => running.has(answer.id);

/** The conversation of that name in which something is being answered, or null: it is newer than the stored one. */
export const liveConversation = (id) =>
  [...running.values()].find((each) => each.conversation.id === id)?.conversation ?? null;

/** The answer that the server calls `id`, or null. */
export const answerNamed = (id) => [...running.values()].find((each) => each.named === id)?.answer ?? null;

export const stop = (answer) => running.get(answer.id)?.controller.abort();

/**
 * Have an answer written into `answer.content`, to its end.
 *
 * `changed(conversation, answer)` is called with every piece, and `ended(conversation, answer)` once.
 */
export async function write(conversation, answer, { changed, ended }) {
  const controller = new AbortController();
  const entry = { controller, conversation, answer, named: null };
  running.set(answer.id, entry);
  const settings = parameters();
  let first = 0;
  let last = 0;
  try {
    const body = { model: "default", messages: promptOf(conversation, answer, settings.system), ...settings.options };
    for await (const { id, text, finish, usage } of chat(body, controller.signal)) {
      if (id) entry.named = id;
      if (text) {
        last = performance.now();
        first ||= last;
        answer.content += text;
      }
      if (finish) answer.finish = finish;
      if (usage) answer.usage = usage;
      changed(conversation, answer);
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.state === "failed") {
      const known = error instanceof ApiError;
      answer.error = { message: known ? error.message : "The answer could not be read.", code: known ? error.code : null };
      if (!known) console.error(error);
    }
  } finally {
    running.delete(answer.id);
    const tokens = answer.usage?.completion_tokens ?? 0;
    if (tokens > 1 && last - first > SHORTEST) answer.rate = ((tokens - 1) * 1000) / (last - first);
    ended(conversation, answer);
  }
}
