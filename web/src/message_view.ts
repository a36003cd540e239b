// One message on the page. A view is kept while its message grows, and only what has changed is touched.
import { speed, type Live } from "./answering";
import { announce, copyButton, h, icon, iconButton, isComposing } from "./dom";
import { MarkdownView } from "./markdown_view";
import { count, rate, seconds, statisticsLine, waitingText } from "./status_text";
import { isLive, type Message, type ToolCall } from "./types";

export interface Actions {
  live(message: Message): Live | null;
  /** The place of a message among its versions, from 1, and how many there are. */
  place(message: Message): { at: number; of: number };
  step(message: Message, by: number): void;
  regenerate(message: Message): void;
  edit(message: Message, text: string): void;
  giveResults(results: Map<string, string>): void;
  /** Calls that have no result yet. */
  openCalls(message: Message): ToolCall[];
  grown(): void;
}

export interface MessageView {
  readonly element: HTMLElement;
  update(message: Message): void;
}

export function viewOf(message: Message, actions: Actions): MessageView {
  if (message.role === "user") return new UserView(message, actions);
  return message.role === "tool" ? new ResultView(message) : new AnswerView(message, actions);
}

class UserView implements MessageView {
  readonly element = h("article", { class: "message user", "aria-label": "You" });
  private shown = "";

  constructor(private message: Message, private actions: Actions) {
    this.update(message);
  }

  update(message: Message): void {
    this.message = message;
    const { at, of } = this.actions.place(message);
    const now = JSON.stringify([message.content, at, of]);
    if (now === this.shown) return;
    this.shown = now;
    this.show();
  }

  edit(): void {
    const field = h("textarea", { class: "edit-field", dir: "auto", rows: "3", "aria-label": "Edit your message" });
    field.value = this.message.content;
    const cancel = () => {
      this.show();
      this.element.querySelector<HTMLElement>("[data-edit]")?.focus();
    };
    const send = () => field.value.trim() && this.actions.edit(this.message, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
        event.preventDefault();
        send();
      }
    });
    this.element.replaceChildren(
      h("form", { class: "edit", onsubmit: (event) => { event.preventDefault(); send(); } },
        field,
        h("div", { class: "row end" },
          h("button", { type: "button", class: "button", onclick: cancel }, "Cancel"),
          h("button", { type: "submit", class: "button primary" }, "Send"))));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  private show(): void {
    this.element.replaceChildren(
      h("div", { class: "bubble", dir: "auto" }, this.message.content),
      h("div", { class: "actions" },
        versions(this.message, this.actions),
        copyButton("Copy this message", () => this.message.content),
        iconButton("edit", "Edit this message", () => this.edit(), { "data-edit": true })));
  }
}

class ResultView implements MessageView {
  readonly element = h("article", { class: "message tool", "aria-label": "Result of a tool" });

  constructor(message: Message) {
    this.update(message);
  }

  update(message: Message): void {
    this.element.replaceChildren(
      h("div", { class: "call" }, h("div", { class: "call-head" }, icon("tool"), h("span", {}, "Result")),
        h("pre", { dir: "auto", tabindex: "0" }, message.content)));
  }
}

class AnswerView implements MessageView {
  readonly element: HTMLElement;
  private reasoning: ReasoningView | null = null;
  private text: MarkdownView;
  private calls = h("div", { class: "calls", hidden: true });
  private waiting = h("div", { class: "waiting", hidden: true });
  private trouble = h("div", { class: "trouble", role: "alert", hidden: true });
  private actionRow = h("div", { class: "actions" });
  private statistics = h("div", { class: "statistics" });
  private state: string | null = null;
  private finished: string | null = null;

  constructor(message: Message, private actions: Actions) {
    this.text = new MarkdownView(() => actions.grown());
    this.element = h("article", { class: "message answer", "aria-label": message.model ?? "Assistant" },
      this.text.element, this.calls, this.waiting, this.trouble,
      h("div", { class: "answer-foot" }, this.actionRow, this.statistics));
    this.update(message);
  }

  update(message: Message): void {
    const live = isLive(message) ? this.actions.live(message) : null;
    const ended = !isLive(message);
    this.element.classList.toggle("live", !ended);
    this.element.setAttribute("aria-busy", String(!ended));
    if (message.reasoning) this.showReasoning(message);
    if (!ended) this.text.update(message.content);
    else if (this.finished !== message.content) {
      this.finished = message.content;
      this.text.finish(message.content);
    }
    this.showCalls(message, ended);
    this.showWaiting(message, live);
    this.showStatistics(message, live);
    if (ended) this.showEnd(message);
    if (this.state !== message.state) this.say(message, this.state);
    this.state = message.state;
  }

  private showReasoning(message: Message): void {
    if (!this.reasoning) {
      this.reasoning = new ReasoningView(() => this.actions.grown());
      this.element.prepend(this.reasoning.element);
    }
    this.reasoning.update(message);
  }

  private showWaiting(message: Message, live: Live | null): void {
    this.waiting.hidden = message.state !== "waiting";
    if (this.waiting.hidden) return;
    const text = live?.note ?? waitingText(live?.progress ?? null);
    const { done, total } = live?.progress ?? {};
    if (!this.waiting.firstChild) {
      const bar = h("progress", { hidden: true, "aria-label": "Prompt read" });
      this.waiting.append(h("span", { class: "pulse" }), h("span", { class: "waiting-text" }), bar);
    }
    this.waiting.querySelector(".waiting-text")!.textContent = text;
    const bar = this.waiting.querySelector("progress")!;
    bar.hidden = live?.note != null || !total;
    if (total) bar.max = total;
    bar.value = done ?? 0;
  }

  private showCalls(message: Message, ended: boolean): void {
    const calls = message.calls ?? [];
    this.calls.hidden = !calls.length;
    if (!calls.length) return;
    calls.forEach((call, index) => {
      const card = this.calls.querySelectorAll(".call")[index] ?? this.calls.appendChild(callCard());
      card.querySelector(".call-name")!.textContent = call.name;
      card.querySelector("pre")!.textContent = ended ? readable(call.arguments) : call.arguments;
    });
    const open = ended ? this.actions.openCalls(message) : [];
    const form = this.calls.querySelector("form");
    if (!open.length) form?.remove();
    else if (!form) this.calls.append(this.resultForm(open));
  }

  // This page runs no tools. Who tries them out gives the result by hand.
  private resultForm(open: ToolCall[]): HTMLFormElement {
    const fields = open.map((call) => ({
      call, field: h("textarea", { rows: "2", dir: "auto", required: true, placeholder: "What the tool gives", "aria-label": `Result of ${call.name}` }),
    }));
    return h("form", {
      class: "results",
      onsubmit: (event) => {
        event.preventDefault();
        this.actions.giveResults(new Map(fields.map(({ call, field }) => [call.id, field.value])));
      },
    }, ...fields.map(({ call, field }) => h("label", {}, `Result of ${call.name}`, field)),
      h("button", { type: "submit", class: "button primary" }, open.length > 1 ? "Send the results" : "Send the result"));
  }

  private showStatistics(message: Message, live: Live | null): void {
    if (live) {
      const now = live.first === null ? null : speed(live);
      this.statistics.textContent = now === null ? "" : `${rate(now)} · ${count(live.pieces)} tokens`;
    } else this.statistics.textContent = statisticsLine(message);
  }

  private showEnd(message: Message): void {
    this.trouble.hidden = message.state !== "failed";
    if (message.state === "failed") {
      this.trouble.replaceChildren(
        h("span", { dir: "auto" }, message.error ?? "The answer failed."),
        h("button", { type: "button", class: "button", onclick: () => this.actions.regenerate(message) }, "Try again"));
    }
    this.actionRow.replaceChildren(...[
      versions(message, this.actions),
      message.content ? copyButton("Copy this answer", () => message.content) : null,
      iconButton("again", "Answer again", () => this.actions.regenerate(message)),
    ].filter((each) => each !== null));
  }

  // What a screen reader is told: the states of an answer, and the whole of it at its end, instead of every token.
  private say(message: Message, before: string | null): void {
    if (before === null && !isLive(message)) return; // an old one
    if (message.state === "waiting") announce("Waiting for the answer");
    else if (message.state === "reasoning") announce("The model is thinking");
    else if (message.state === "answering") announce("The answer is being written");
    else if (message.state === "stopped") announce("Stopped");
    else if (message.state === "done") announce(`Answer: ${Array.from(this.text.element.textContent?.trim() ?? "").slice(0, 2000).join("")}`);
  }
}

class ReasoningView {
  readonly element = h("details", { class: "reasoning", ontoggle: () => this.show() });
  private label = h("span", { class: "reasoning-label" });
  private last = h("bdi");
  private text: MarkdownView;
  private message: Message | null = null;
  private shown = "";

  constructor(private grown: () => void) {
    this.text = new MarkdownView(grown);
    this.element.append(h("summary", {}, icon("right"), this.label, h("span", { class: "reasoning-last", "aria-hidden": "true" }, this.last)), h("div", { class: "reasoning-text" }, this.text.element));
  }

  update(message: Message): void {
    this.message = message;
    const going = message.state === "reasoning";
    const took = message.reasoningSeconds;
    this.element.classList.toggle("going", going);
    this.label.textContent = going ? `Thinking${took && took >= 1 ? ` · ${seconds(Math.floor(took))}` : ""}` : took && took >= 1 ? `Thought for ${seconds(took)}` : "Thought for a moment";
    this.last.textContent = going ? (message.reasoning ?? "").slice(-120).replace(/\s+/g, " ") : "";
    this.show();
  }

  // Nothing is rendered while it is folded.
  private show(): void {
    if (!this.element.open || !this.message) return;
    const { reasoning = "" } = this.message;
    if (isLive(this.message)) this.text.update(reasoning);
    else if (this.shown !== reasoning) {
      this.shown = reasoning;
      this.text.finish(reasoning);
    }
    this.grown();
  }
}

function versions(message: Message, actions: Actions): HTMLElement | null {
  const { at, of } = actions.place(message);
  if (of < 2) return null;
  return h("span", { class: "versions", role: "group", "aria-label": `Version ${at} of ${of}` },
    iconButton("left", "Version before", () => actions.step(message, -1), { disabled: at === 1 }),
    h("span", {}, `${at}/${of}`),
    iconButton("right", "Next version", () => actions.step(message, 1), { disabled: at === of }));
}

function callCard(): HTMLElement {
  return h("div", { class: "call" },
    h("div", { class: "call-head" }, icon("tool"), h("span", {}, "Called ", h("code", { class: "call-name" }))),
    h("pre", { dir: "ltr", tabindex: "0" }));
}

function readable(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
