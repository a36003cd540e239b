// The messages of the conversation that is open, and scrolling that follows the end only while the reader is there.
import { byId, h, iconButton } from "./dom";
import { viewOf, type Actions, type MessageView } from "./message_view";
import { path } from "./tree";
import type { Conversation } from "./types";

// More messages than this are shown when asked for: a long conversation opens as fast as a short one.
const SHOWN_AT_ONCE = 40;
const NEAR_END = 48; // pixels

export class ThreadView {
  private scroller = byId("scroller");
  private list = byId("messages");
  private views = new Map<string, MessageView>();
  private conversation: Conversation | null = null;
  private limit = SHOWN_AT_ONCE;
  private follows = true;
  private lastTop = 0;
  private grown = new Set<string>();
  private frame = 0;
  private toEnd = iconButton("down", "Go to the end", () => this.goToEnd(), { class: "to-end", hidden: true });

  constructor(private actions: Omit<Actions, "grown">) {
    byId("composer-area").prepend(this.toEnd);
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => {
      // The field below is as wide as the messages, whatever a scroll bar takes of them
      const gutter = this.scroller.offsetWidth - this.scroller.clientWidth;
      document.body.style.setProperty("--gutter", `${gutter}px`);
      this.keepEnd();
    }).observe(this.scroller);
  }

  /** Shows a conversation, or what has changed in it. */
  show(conversation: Conversation): void {
    if (conversation.id !== this.conversation?.id) {
      this.views.clear();
      this.list.replaceChildren();
      this.limit = SHOWN_AT_ONCE;
      this.follows = true;
    }
    this.conversation = conversation;
    const all = path(conversation);
    const shown = all.slice(-this.limit);
    const views = shown.map((message) => {
      const view = this.views.get(message.id);
      if (view) view.update(message);
      else this.views.set(message.id, viewOf(message, { ...this.actions, grown: () => this.keepEnd() }));
      return this.views.get(message.id)!;
    });
    this.place(views.map((view) => view.element), all.length - shown.length);
    const kept = new Set(shown.map((message) => message.id));
    for (const id of this.views.keys()) if (!kept.has(id)) this.views.delete(id);
    document.body.classList.toggle("empty", all.length === 0);
    this.keepEnd();
  }

  /** Shows one message's growth in the next frame, if it is on the page. */
  update(conversation: Conversation, id: string): void {
    if (conversation.id !== this.conversation?.id) return;
    this.grown.add(id);
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      for (const each of this.grown) {
        const message = this.conversation?.messages[each];
        if (message) this.views.get(each)?.update(message);
      }
      this.grown.clear();
      this.keepEnd();
    });
  }

  goToEnd(): void {
    this.follows = true;
    this.keepEnd();
  }

  // Elements that stay are not moved: moving one would lose its focus and its selection.
  private place(elements: HTMLElement[], hidden: number): void {
    const earlier = hidden > 0
      ? [h("button", { type: "button", class: "button earlier", onclick: () => this.showEarlier() }, `Show ${hidden} earlier messages`)]
      : [];
    this.list.querySelector(":scope > .earlier")?.remove();
    const wanted = new Set<Element>(elements);
    for (const child of [...this.list.children]) if (!wanted.has(child)) child.remove();
    elements.forEach((element, index) => {
      if (this.list.children[index] !== element) this.list.insertBefore(element, this.list.children[index] ?? null);
    });
    this.list.prepend(...earlier);
  }

  private showEarlier(): void {
    const fromEnd = this.scroller.scrollHeight - this.scroller.scrollTop;
    this.limit += 2 * SHOWN_AT_ONCE;
    this.follows = false;
    if (this.conversation) this.show(this.conversation);
    this.scroller.scrollTop = this.scroller.scrollHeight - fromEnd; // what was read stays where it was
  }

  private scrolled(): void {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const left = scrollHeight - scrollTop - clientHeight;
    // Growth never moves up, and what shrinks stays at its end: a way up that leaves the end is the reader's, however short
    if (scrollTop < this.lastTop && left > 1) this.follows = false;
    else if (left < NEAR_END) this.follows = true;
    this.lastTop = scrollTop;
    this.toEnd.hidden = this.follows || left < NEAR_END;
  }

  private keepEnd(): void {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.toEnd.hidden = false;
  }
}
