// The field to write in. What was written and not sent survives a reload.
import { byId, icon, isComposing } from "./dom";
import { small } from "./store";

interface Listener {
  /** Whether it was sent; the text stays otherwise. */
  send(text: string): boolean;
  stop(): void;
  editLast(): void;
  draftKey(): string;
}

export class Composer {
  private field = byId<HTMLTextAreaElement>("prompt");
  private button = byId<HTMLButtonElement>("send");
  private running = false;

  constructor(private listener: Listener) {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.metaKey && !event.ctrlKey && !isComposing(event)) {
        event.preventDefault();
        if (!this.running) this.submit();
      } else if (event.key === "ArrowUp" && !this.field.value && !this.running) {
        event.preventDefault();
        this.listener.editLast();
      }
    });
  }

  /** Shows the draft of the conversation that is open now. */
  open(): void {
    this.field.value = small.get(this.listener.draftKey()) ?? "";
    this.changed();
  }

  focus(): void {
    this.field.focus();
  }

  setRunning(running: boolean): void {
    const label = running ? "Stop" : "Send";
    if (running !== this.running || !this.button.firstChild) {
      this.button.replaceChildren(running ? stopMark() : icon("send"));
      this.button.setAttribute("aria-label", label);
      this.button.title = running ? "Stop (Esc)" : "Send (Enter)";
    }
    this.running = running;
    this.changed();
  }

  private submit(): void {
    if (this.running) return this.listener.stop();
    const text = this.field.value.trim();
    const draft = this.listener.draftKey();
    if (!text || !this.listener.send(text)) return;
    small.set(draft, null);
    this.field.value = "";
    this.changed();
  }

  private changed(): void {
    this.button.disabled = !this.running && !this.field.value.trim();
    small.set(this.listener.draftKey(), this.field.value || null);
    // Grows with its text up to the height that the style allows
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }
}

function stopMark(): HTMLElement {
  const mark = document.createElement("span");
  mark.className = "stop-mark";
  return mark;
}
