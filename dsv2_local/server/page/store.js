// Conversations in this browser (IndexedDB): whole ones in "conversations", what the list shows in "titles".

const NAME = "dsv2";
const VERSION = 1;

let opening = null;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("titles", { keyPath: "id" });
    };
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab uses an older version of this page"));
  });
  return opening;
}

/** Run `work(conversations, titles)` in one transaction, and return the result of the request that it returns. */
async function transaction(mode, work) {
  const opened = await database();
  return new Promise((resolve, reject) => {
    const transaction = opened.transaction(["conversations", "titles"], mode);
    const request = work(transaction.objectStore("conversations"), transaction.objectStore("titles"));
    transaction.commit?.(); // at once, so that it is done even if the page is left now
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request?.error);
  });
}

/** {id, title, updated} of all conversations, the newest first. */
export async function list() {
  const titles = await transaction("readonly", (_, titles) => titles.getAll());
  return titles.sort((a, b) => b.updated - a.updated);
}

/** A conversation, or null. */
export const load = async (id) => (await transaction("readonly", (conversations) => conversations.get(id))) ?? null;

/** Keep a conversation. */
export async function save(conversation) {
  const { id, title, updated } = conversation;
  await transaction("readwrite", (conversations, titles) => {
    titles.put({ id, title, updated });
    return conversations.put(conversation);
  });
  tell();
}

/** Delete a conversation. */
export async function remove(id) {
  await transaction("readwrite", (conversations, titles) => {
    titles.delete(id);
    return conversations.delete(id);
  });
  tell();
}

const others = "BroadcastChannel" in globalThis ? new BroadcastChannel("dsv2") : null;
const tell = () => others?.postMessage("changed");

/** Call `changed` when another tab has changed the list. */
export function onChange(changed) {
  others?.addEventListener("message", changed);
}

/** Whether an error says that there is no room left. */
export const isFull = (error) => error?.name === "QuotaExceededError";
