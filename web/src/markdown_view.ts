// Markdown that grows. Blocks that can no longer change are rendered once and stay; only the last ones are rendered again.
import { h } from "./dom";
import { highlighted, languageName } from "./highlight";
import { blocksOf, htmlOf, nodesOf, purified, wholeHtml } from "./markdown";

// Open code longer than this grows without colours until it is closed.
const LONGEST_LIVE_CODE = 8_000;
// Rendering may take this share of the time while an answer grows, however long its last block is.
const SHARE = 0.25;

export class MarkdownView {
  readonly element = h("div", { class: "markdown" });
  private tail = h("div", { class: "tail" });
  private text = "";
  private settled = 0; // characters whose blocks stand
  private html = ""; // of those blocks
  private tailHtml = "";
  private openCode: { code: HTMLElement; shown: string; language: string } | null = null;
  private frame = 0;
  private notBefore = 0;
  private isWhole = false;

  constructor(private grown: () => void = () => undefined) {
    this.element.append(this.tail);
  }

  /** Shows a text that begins with the one before. Calls between two frames are one rendering. */
  update(text: string): void {
    if (this.isWhole) this.reset();
    this.text = text;
    this.frame ||= requestAnimationFrame((now) => this.inFrame(now));
  }

  /** Shows the whole text, and as if it had been there from the start. */
  finish(text: string): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (this.isWhole || !text.startsWith(this.text)) this.reset();
    const isNew = this.text === "";
    this.text = text;
    this.isWhole = true;
    const html = wholeHtml(text);
    if (isNew) {
      this.element.replaceChildren(nodesOf(html));
      return;
    }
    this.render();
    // What follows can change what stands above, as a link's address given at the end
    const isSame = !this.openCode && this.html + this.tailHtml === html;
    if (!isSame) this.element.replaceChildren(nodesOf(html));
    else this.tail.replaceChildren(nodesOf(this.tailHtml)); // formulas that stay wrong may now say why
    this.grown();
  }

  private reset(): void {
    this.tail.replaceChildren();
    this.element.replaceChildren(this.tail);
    this.openCode = null;
    this.isWhole = false;
    this.settled = 0;
    this.text = this.html = this.tailHtml = "";
  }

  private inFrame(now: number): void {
    this.frame = 0;
    if (now < this.notBefore) {
      this.frame = requestAnimationFrame((next) => this.inFrame(next));
      return;
    }
    const begin = performance.now();
    this.render();
    this.notBefore = now + (performance.now() - begin) / SHARE;
    this.grown();
  }

  private render(): void {
    const rest = this.text.slice(this.settled);
    const blocks = blocksOf(rest);
    const last = this.settledBlocks(rest, blocks.map((block) => block.start));
    if (last > 0) {
      const html = htmlOf(blocks.slice(0, last).flatMap((block) => block.tokens));
      this.tail.before(nodesOf(html));
      this.html += html;
      this.settled += offsetOfLine(rest, blocks[last]!.start);
      this.openCode = null;
    }
    const growing = blocks.slice(last);
    const code = growing.length === 1 && growing[0]!.isOpenCode ? growing[0]!.tokens[0]! : null;
    if (code) this.growCode(code.content, code.info.trim().split(/\s+/)[0] ?? "");
    else {
      this.openCode = null;
      const html = htmlOf(growing.flatMap((block) => block.tokens));
      if (html !== this.tailHtml || !this.tail.childNodes.length) this.tail.replaceChildren(nodesOf(html, true));
      this.tailHtml = html;
    }
  }

  // How many blocks cannot change any more: those before a block whose first line is whole. The beginning of a line may
  // still turn out to go on with the list above it.
  private settledBlocks(rest: string, starts: number[]): number {
    const wholeLines = countLines(rest);
    let last = starts.length - 1;
    while (last > 0 && starts[last]! >= wholeLines) last -= 1;
    return Math.max(last, 0);
  }

  private growCode(content: string, language: string): void {
    const open = this.openCode;
    this.tailHtml = "";
    if (!open || open.language !== language) {
      this.tail.replaceChildren(nodesOf(`<pre><code></code></pre>`, true));
      const label = this.tail.querySelector(".code-bar span");
      if (label) label.textContent = languageName(language);
      this.openCode = { code: this.tail.querySelector("code")!, shown: "", language };
      return this.growCode(content, language);
    }
    const html = content.length <= LONGEST_LIVE_CODE ? highlighted(content, language) : null;
    if (html !== null) open.code.replaceChildren(purified(html));
    else if (content.startsWith(open.shown)) open.code.append(content.slice(open.shown.length));
    else open.code.textContent = content;
    open.shown = content;
  }
}

function countLines(text: string): number {
  let lines = 0;
  for (let at = text.indexOf("\n"); at !== -1; at = text.indexOf("\n", at + 1)) lines += 1;
  return lines;
}

function offsetOfLine(text: string, line: number): number {
  let at = 0;
  for (; line > 0; line -= 1) at = text.indexOf("\n", at) + 1;
  return at;
}
