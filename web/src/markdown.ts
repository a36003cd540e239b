// Markdown of a model as DOM. What a model writes is not trusted: HTML in it stays text, what the libraries make of it is
// purified once more, nothing is loaded from anywhere, and formulas are built as nodes.
import { tex } from "@mdit/plugin-tex";
import DOMPurify from "dompurify";
import katex from "katex";
import MarkdownIt from "markdown-it";
import type Token from "markdown-it/lib/token.mjs";
import { copyButton, h } from "./dom";
import { highlighted, languageName } from "./highlight";

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const LONGEST_FORMULA = 10_000; // characters; KaTeX works on the page's only thread

const markdown: MarkdownIt = new MarkdownIt({ html: false, linkify: true, typographer: false });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // main.py is no site of Paraguay
markdown.validateLink = (url) => SAFE_LINK.test(url.trim());
markdown.use(tex, {
  delimiters: "all",
  render: (content, display) => `<span class="formula"${display ? " data-display" : ""}>${escape(content)}</span>`,
});

const escape = (text: string): string => markdown.utils.escapeHtml(text);

markdown.renderer.rules.fence = markdown.renderer.rules.code_block = (tokens, index) => {
  const { content, info } = tokens[index]!;
  const language = info.trim().split(/\s+/)[0] ?? "";
  return `<pre data-language="${escape(language)}"><code>${highlighted(content, language) ?? escape(content)}</code></pre>`;
};

// A picture would tell its host who reads this, and when: it is a link that someone may follow.
markdown.renderer.rules.image = (tokens, index, options, env, renderer) => {
  const token = tokens[index]!;
  const name = renderer.renderInlineAsText(token.children ?? [], options, env) || "picture";
  return `<a class="picture" href="${escape(token.attrGet("src") ?? "")}">${escape(name)}</a>`;
};

// Each block takes its direction from its own text. Alignment is a class, since inline styles are forbidden here.
const DIRECTED = ["paragraph_open", "heading_open", "bullet_list_open", "ordered_list_open", "blockquote_open", "th_open", "td_open"];
markdown.core.ruler.push("directions", ({ tokens }) => {
  for (const token of tokens) {
    if (DIRECTED.includes(token.type)) token.attrSet("dir", "auto");
    const aligned = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
    if (!aligned) continue;
    token.attrs = (token.attrs ?? []).filter(([name]) => name !== "style");
    token.attrSet("class", `align-${aligned[1]}`);
  }
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "span", "ul", "ol", "li",
    "blockquote", "table", "thead", "tbody", "tr", "th", "td", "a",
  ],
  ALLOWED_ATTR: ["class", "href", "dir", "start", "title", "data-display", "data-language"],
  ALLOWED_URI_REGEXP: SAFE_LINK,
  // All others have to look like a link
  ADD_URI_SAFE_ATTR: ["dir", "start", "data-display", "data-language"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true as const,
};

export interface Block {
  start: number; // first line
  isOpenCode: boolean;
  tokens: Token[];
}

/** The blocks of a text at its top level. */
export function blocksOf(text: string): Block[] {
  const blocks: Block[] = [];
  const tokens = markdown.parse(text, {});
  const lines = text.split("\n");
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) {
      const [start, end] = token.map ?? [blocks.at(-1)?.start ?? 0, 0];
      const isOpenCode = token.type === "fence" && (end - start < 2 || !isFence(lines[end - 1] ?? "", token.markup));
      blocks.push({ start, isOpenCode, tokens: [] });
    }
    blocks.at(-1)?.tokens.push(token);
  }
  return blocks;
}

const isFence = (line: string, markup: string): boolean => {
  const bare = line.trim();
  return bare.startsWith(markup) && bare.replaceAll(markup[0]!, "") === "";
};

export const htmlOf = (tokens: Token[]): string => markdown.renderer.render(tokens, markdown.options, {});
export const wholeHtml = (text: string): string => markdown.render(text);

/** HTML that was made here, purified and brought to life: formulas, copy buttons, links that leave in a new tab. */
export function nodesOf(html: string, isLive = false): DocumentFragment {
  const fragment = purified(html);
  for (const element of fragment.querySelectorAll<HTMLElement>("span.formula")) showFormula(element, isLive);
  for (const element of fragment.querySelectorAll("pre")) frameCode(element);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href; // where it leads, before anyone follows
  }
  return fragment;
}

export const purified = (html: string): DocumentFragment => DOMPurify.sanitize(html, ALLOWED) as unknown as DocumentFragment;

function showFormula(element: HTMLElement, isLive: boolean): void {
  const source = element.textContent ?? "";
  const displayMode = "display" in element.dataset;
  element.classList.toggle("display", displayMode);
  element.dir = "ltr";
  try {
    if (source.length > LONGEST_FORMULA) throw new Error("This formula is too long to be set.");
    katex.render(source, element, { displayMode, trust: false, strict: false, throwOnError: true, maxSize: 20, maxExpand: 500 });
  } catch (error) {
    // Also what is not finished yet
    const code = h("code", { class: "formula-source" }, source);
    if (!isLive) code.title = (error as Error).message;
    element.replaceChildren(code);
  }
}

function frameCode(pre: HTMLPreElement): void {
  const language = pre.dataset.language ?? "";
  const frame = h("div", { class: "code-frame", dir: "ltr" });
  pre.tabIndex = 0; // it scrolls, so the keyboard has to reach it
  pre.replaceWith(frame);
  const bar = h("div", { class: "code-bar" }, h("span", {}, languageName(language)), copyButton("Copy this code", () => pre.textContent ?? ""));
  frame.append(bar, pre);
}
