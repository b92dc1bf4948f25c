// Markdown as DOM nodes. Text becomes text nodes, never HTML: whatever a model writes stays text.
//
// A subset of GitHub's: headings, paragraphs (line breaks are kept), lists, quotes, tables, code, rules, emphasis,
// links to http, https and mailto. Images become links: the page loads nothing from elsewhere.

import { copyButton, element } from "./dom.js";

const DEEPEST = 16; // lists and quotes inside each other; what is deeper stays text
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;
const DASHES = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

/** Shows a text that grows, and renders again only what can still change. */
export class MarkdownView {
  /** `settled(text)` is called with the text of each block that is complete. */
  constructor(container, settled = () => {}) {
    this.container = container;
    this.text = "";
    this.settled = settled;
    this.from = 0; // where the first block begins that can still change
    this.kept = 0; // the blocks before it
  }

  /** Show `text`, which begins like the text before unless it is another one; `complete`: nothing more comes. */
  update(text, complete) {
    if (!text.startsWith(this.text.slice(0, this.from))) this.from = this.kept = 0;
    this.text = text;
    const lines = text.slice(this.from).split("\n");
    const found = blocks(lines, 0);
    // The last two: what looks like a paragraph after a list may become its next item.
    const settling = complete ? found.length : Math.max(0, found.length - 2);
    const children = this.container.children;
    found.forEach((block, number) => {
      const at = this.kept + number;
      const shown = children[at];
      if (shown && block.type === "code" && shown.dataset.language === block.language) {
        const code = shown.querySelector("code");
        if (code.textContent !== block.text) code.textContent = block.text;
      } else if (shown) {
        shown.replaceWith(render(block, 0));
      } else {
        this.container.append(render(block, 0));
      }
    });
    while (children.length > this.kept + found.length) this.container.lastElementChild.remove();
    for (let number = 0; number < settling; number++) this.settled(children[this.kept + number].textContent);
    const next = settling < found.length ? found[settling].line : lines.length;
    for (let line = 0; line < next; line++) this.from += lines[line].length + 1;
    this.from = Math.min(this.from, text.length);
    this.kept += settling;
  }
}

/** The blocks of some lines: {type, line, …}, `line` being where each begins. */
function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    found.push({ ...block, line: at });
    at = next;
  }
  return found;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line) && indent(line) < 4) return listAt(lines, at, depth);
  if (isTable(lines, at)) return tableAt(lines, at);
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end, depth)) end++;
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth >= DEEPEST) return false;
  const item = ITEM.exec(line);
  if (item && item[4] && indent(line) < 4 && (!/^\d/.test(item[2]) || parseInt(item[2], 10) === 1)) return true;
  return QUOTE.test(line) || isTable(lines, at);
}

function codeAt(lines, at, [, spaces, marks, info]) {
  const end = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  const strip = new RegExp(`^ {0,${spaces.length}}`);
  let next = at + 1;
  while (next < lines.length && !end.test(lines[next])) next++;
  const text = lines.slice(at + 1, next).map((line) => line.replace(strip, ""));
  return [{ type: "code", language: info.trim().split(/\s/)[0].slice(0, 30), text: text.join("\n") }, next + 1];
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (end > at && !blank(lines[end]) && !interrupts(lines, end, depth))))
    end++;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: blocks(inside, depth + 1) }, end];
}

function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const kind = first[2].at(-1);
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || indent(lines[next]) > 3 || item[2].at(-1) !== kind || RULE.test(lines[next])) break;
    const spaces = item[3] && item[3].length < 5 ? item[3].length : 1;
    const inner = item[1].length + item[2].length + spaces;
    const inside = [lines[next].slice(Math.min(inner, lines[next].length))];
    let end = next + 1;
    while (end < lines.length && belongs(lines, end, inner, item[1].length, depth)) inside.push(lines[end++]);
    const blanks = inside.length - inside.findLastIndex((line) => !blank(line)) - 1;
    const kept = inside.slice(0, inside.length - blanks).map((line, number) => (number ? unindent(line, inner) : line));
    items.push(blocks(kept, depth + 1));
    loose ||= kept.some((line, number) => number && blank(line));
    next = end;
    if (blanks && next < lines.length && ITEM.exec(lines[next])?.[2].at(-1) === kind && indent(lines[next]) < 4) loose = true;
  }
  const ordered = /\d/.test(first[2]);
  return [{ type: "list", ordered, start: parseInt(first[2], 10) || 0, loose, items }, next];
}

const unindent = (line, spaces) => line.slice(Math.min(spaces, indent(line)));

/** Whether a line is part of the list item before it, whose text begins in column `inner`. */
function belongs(lines, at, inner, outer, depth) {
  const line = lines[at];
  if (blank(line)) {
    let next = at;
    while (next < lines.length && blank(lines[next])) next++;
    return next === lines.length || belongs(lines, next, inner, outer, depth) || ITEM.test(lines[next]);
  }
  if (indent(line) >= inner) return true;
  // Two spaces are enough for a list inside an item, as models write them.
  if (indent(line) >= outer + 2 && ITEM.test(line)) return true;
  return !blank(lines[at - 1]) && !ITEM.test(line) && !interrupts(lines, at, depth);
}

function isTable(lines, at) {
  const under = lines[at + 1];
  if (under === undefined || !lines[at].includes("|") || !under.includes("-") || !DASHES.test(under)) return false;
  return cells(lines[at]).length === cells(under).length;
}

function cells(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function tableAt(lines, at) {
  const align = cells(lines[at + 1]).map((dashes) =>
    dashes.endsWith(":") ? (dashes.startsWith(":") ? "center" : "right") : "left",
  );
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && lines[end].includes("|")) end++;
  return [{ type: "table", align, head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells) }, end];
}

/** The element of a block. */
function render(block) {
  switch (block.type) {
    case "heading":
      // The page has its own first and second level.
      return element(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));
    case "rule":
      return element("hr");
    case "code":
      return code(block);
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(render));
    case "list":
      return element(
        block.ordered ? "ol" : "ul",
        block.ordered && block.start !== 1 ? { start: String(block.start) } : {},
        ...block.items.map((item) => listItem(item, block.loose)),
      );
    case "table":
      return table(block);
    default:
      return element("p", {}, inline(block.text));
  }
}

function listItem(inside, loose) {
  const item = element("li");
  const task = inside[0]?.type === "paragraph" && /^\[([ xX])\] /.exec(inside[0].text);
  if (task) {
    inside[0].text = inside[0].text.slice(4);
    item.className = "task";
    item.append(element("span", { role: "img", "aria-label": task[1] === " " ? "open" : "done" }, task[1] === " " ? "☐ " : "☑ "));
  }
  for (const block of inside) item.append(!loose && block.type === "paragraph" ? inline(block.text) : render(block));
  return item;
}

function code({ language, text }) {
  const written = element("code", {}, text);
  const copy = copyButton("Copy code", () => written.textContent);
  return element(
    "figure",
    { class: "code", "data-language": language },
    element("figcaption", {}, element("span", {}, language || "text"), copy),
    element("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, written),
  );
}

function table({ align, head, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, ...head.map((_, column) => element(tag, { class: align[column] }, inline(texts[column] ?? ""))));
  return element(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((texts) => row("td", texts)))),
  );
}

const SPECIAL = /[\\`*_~[!<\n&]|https?:\/\//g;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
const LOOK_BACK = 256; // delimiters that are tried as the opening one of a pair

/** The inline elements of a text, as a fragment. */
function inline(text, inLink = false) {
  const fragment = document.createDocumentFragment();
  const delimiters = [];
  const ticks = backticks(text);
  const pairs = brackets(text);
  let plain = "";
  let at = 0;

  const flush = () => {
    if (plain) fragment.append(plain);
    plain = "";
  };
  const put = (node, next) => {
    flush();
    fragment.append(node);
    at = next;
  };

  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    plain += text.slice(at, found?.index ?? text.length);
    if (!found) break;
    at = found.index;
    const mark = found[0];
    if (mark === "\\") {
      if (text[at + 1] === "\n") put(element("br"), at + 2);
      else if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) (plain += text[at + 1]), (at += 2);
      else (plain += mark), at++;
    } else if (mark === "`") {
      const length = /^`+/.exec(text.slice(at))[0].length;
      const end = ticks(length, at);
      if (end < 0) (plain += "`".repeat(length)), (at += length);
      else put(element("code", {}, codeSpan(text.slice(at + length, end))), end + length);
    } else if (mark === "\n") {
      plain = plain.trimEnd();
      put(element("br"), at + 1);
      while (text[at] === " ") at++;
    } else if (mark === "*" || mark === "_" || mark === "~") {
      flush();
      const delimiter = delimiterAt(text, at, mark);
      fragment.append(delimiter.node);
      delimiters.push(delimiter);
      at += delimiter.count;
    } else if (mark === "<") {
      const link = /^<((?:https?:\/\/|mailto:)[^\s<>]*)>/.exec(text.slice(at, at + 2048));
      const broken = /^<br ?\/?>/i.exec(text.slice(at, at + 6));
      if (link && !inLink && address(link[1])) put(anchor(address(link[1]), link[1]), at + link[0].length);
      else if (broken) put(element("br"), at + broken[0].length);
      else (plain += mark), at++;
    } else if (mark === "&") {
      const entity = /^&(?:amp|lt|gt|quot|#39|nbsp);/.exec(text.slice(at, at + 6))?.[0];
      plain += entity ? ENTITIES[entity] : mark;
      at += entity?.length ?? 1;
    } else if (mark === "[" || mark === "!") {
      const from = mark === "!" ? at + 1 : at;
      const link = inLink || text[from] !== "[" ? null : linkAt(text, from, pairs);
      if (link) put(link.node, link.end);
      else (plain += mark), at++;
    } else {
      const whole = /^[^\s<>"`]+/.exec(text.slice(at, at + 2048))[0];
      const shown = withoutPunctuation(whole);
      const href = inLink || /\w/.test(text[at - 1] ?? "") ? null : address(shown);
      if (href) put(anchor(href, shown), at + shown.length);
      else (plain += mark), (at += mark.length);
    }
  }
  flush();
  emphasise(delimiters);
  return fragment;
}

/** A function (length, from) -> where the closing run of so many backticks begins, or -1; both only ever grow. */
function backticks(text) {
  let runs = null;
  return (length, from) => {
    if (runs === null) {
      runs = new Map();
      for (const run of text.matchAll(/`+/g)) {
        if (!runs.has(run[0].length)) runs.set(run[0].length, []);
        runs.get(run[0].length).push(run.index);
      }
      for (const positions of runs.values()) positions.reverse();
    }
    const positions = runs.get(length) ?? [];
    while (positions.length && positions.at(-1) <= from) positions.pop();
    return positions.at(-1) ?? -1;
  };
}

function codeSpan(text) {
  const line = text.replaceAll("\n", " ");
  return line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
}

/** The closing bracket of each opening one. */
function brackets(text) {
  const pairs = new Map();
  const open = [];
  for (const { 0: found, index } of text.matchAll(/\\.|[[\]]/gs)) {
    if (found === "[") open.push(index);
    else if (found === "]" && open.length) pairs.set(open.pop(), index);
  }
  return pairs;
}

function linkAt(text, at, pairs) {
  const close = pairs.get(at);
  if (close === undefined || text[close + 1] !== "(") return null;
  const target = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
    text.slice(close + 1, close + 4096),
  );
  const href = target && address((target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
  if (!href) return null;
  const node = anchor(href, "");
  const shown = text.slice(at + 1, close);
  node.append(shown ? inline(shown, true) : href);
  return { node, end: close + 1 + target[0].length };
}

/** The address of a link, if it is one that a click may follow; else null. */
function address(text) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(text)) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const anchor = (href, shown) => element("a", { href, target: "_blank", rel: "noopener noreferrer" }, shown);

function withoutPunctuation(text) {
  let end = text.length;
  for (;;) {
    const last = text[end - 1];
    if (/[.,;:!?'"*_~\]]/.test(last)) end--;
    else if (last === ")" && !text.slice(0, end).includes("(")) end--;
    else return text.slice(0, end);
  }
}

function delimiterAt(text, at, mark) {
  let end = at;
  while (text[end] === mark) end++;
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  const word = (char) => /[\p{L}\p{N}]/u.test(char);
  const left = !/\s/.test(after) && (word(after) || /\s/.test(before) || !word(before));
  const right = !/\s/.test(before) && (word(before) || /\s/.test(after) || !word(after));
  const within = mark === "_"; // which does not count inside a word, as in snake_case
  return {
    mark,
    count: end - at,
    length: end - at,
    opens: left && !(within && right && word(before)),
    closes: right && !(within && left && word(after)),
    node: document.createTextNode(mark.repeat(end - at)),
  };
}

/** Wrap what is between pairs of delimiters, as CommonMark does. */
function emphasise(delimiters) {
  delimiters.forEach((closer, number) => {
    while (closer.closes && closer.count) {
      let at = number - 1;
      const last = Math.max(0, number - LOOK_BACK);
      while (at >= last && !matches(delimiters[at], closer)) at--;
      if (at < last) break;
      const opener = delimiters[at];
      const used = closer.mark === "~" ? closer.count : Math.min(2, opener.count, closer.count);
      const wrapper = element(closer.mark === "~" ? "del" : used === 2 ? "strong" : "em");
      while (opener.node.nextSibling !== closer.node) wrapper.append(opener.node.nextSibling);
      opener.node.after(wrapper);
      for (const inner of delimiters.slice(at + 1, number)) inner.count = 0;
      for (const side of [opener, closer]) {
        side.count -= used;
        side.node.data = side.mark.repeat(side.count);
      }
    }
  });
}

function matches(opener, closer) {
  if (!opener.opens || !opener.count || opener.mark !== closer.mark) return false;
  if (closer.mark === "~") return opener.count === closer.count && closer.count < 3;
  const both = (opener.closes || closer.opens) && (opener.length + closer.length) % 3 === 0;
  return !both || (opener.length % 3 === 0 && closer.length % 3 === 0);
}
