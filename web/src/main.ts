// The page: which conversation is open, and what each part is told when something happens in another.
import { Answering } from "./answering";
import { Composer } from "./composer";
import { Connection, type Status } from "./connection";
import { byId, h, icon, isComposing } from "./dom";
import { askForKey, isMac, notice, showShortcuts } from "./dialogs";
import { showSettings } from "./settings_view";
import { Sidebar } from "./sidebar";
import { machineText, planText, stateText } from "./status_text";
import { small, Store, type StoreEvent } from "./store";
import { ThreadView } from "./thread_view";
import { readSettings } from "./transfer";
import { addMessage, choose, newConversation, path, versions } from "./tree";
import type { Conversation, Message, Settings, ToolCall } from "./types";

const NARROW = matchMedia("(max-width: 760px)");

class Page {
  private store = new Store((event) => this.stored(event));
  private connection = new Connection((status) => this.connected(status));
  private answering = new Answering(this.store, this.connection, {
    changed: (conversation, message) => this.thread.update(conversation, message.id),
    ended: (conversation) => this.ended(conversation),
    tell: (text) => notice(text),
    askForKey: (signal) => this.askForKey(signal),
  });
  private thread = new ThreadView({
    live: (message) => this.answering.live(message),
    place: (message) => {
      const all = versions(this.conversation, message);
      return { at: all.findIndex((each) => each.id === message.id) + 1, of: all.length };
    },
    step: (message, by) => this.step(message, by),
    regenerate: (message) => this.answerAgain(message),
    edit: (message, text) => this.send(text, message.parent),
    giveResults: (results) => this.giveResults(results),
    openCalls: (message) => this.openCalls(message),
  });
  private sidebar = new Sidebar(this.store, {
    open: (conversation) => this.open(conversation),
    removed: (conversation) => this.removed(conversation),
    current: () => this.conversation.id,
  });
  private composer = new Composer({
    send: (text) => this.send(text, this.conversation.leaf),
    stop: () => this.answering.stop(this.conversation),
    editLast: () => this.editLast(),
    // A chat that has not begun has no place in the store, and a new number after a reload
    draftKey: () => `draft.${this.conversation.leaf === null ? "new" : this.conversation.id}`,
  });
  private conversation: Conversation = newConversation(this.lastSettings());
  private asking: Promise<boolean> | null = null;
  private locked = false;

  async start(): Promise<void> {
    this.connectButtons();
    document.addEventListener("keydown", (event) => this.key(event));
    void this.connection.check();
    await this.store.open();
    const last = this.store.conversations.get(small.get("open") ?? "");
    this.open(last ?? this.conversation);
    document.body.classList.remove("starting");
  }

  // --- what a person does

  private send(text: string, parent: string | null): boolean {
    if (this.isAnswering()) return false;
    if (this.connection.status.state === "gone") {
      void this.connection.check();
      notice("The server does not answer: your text stays here until it is back");
      return false;
    }
    addMessage(this.conversation, { parent, role: "user", content: text.trim() });
    this.answer();
    return true;
  }

  // A conversation has one answer at a time: what would begin another one says why it does not.
  private isAnswering(): boolean {
    const running = this.answering.isRunning(this.conversation);
    if (running) notice("An answer is being written: stop it first");
    return running;
  }

  private answer(): void {
    const { conversation } = this;
    small.set("settings", JSON.stringify({ ...conversation.settings }));
    void this.answering.answer(conversation);
    this.thread.show(conversation);
    this.thread.goToEnd();
    this.composer.setRunning(true);
    this.composer.focus();
    this.sidebar.update();
  }

  private answerAgain(message: Message): void {
    if (this.isAnswering()) return;
    this.conversation.leaf = message.parent;
    this.answer();
  }

  private step(message: Message, by: number): void {
    const all = versions(this.conversation, message);
    const other = all[all.findIndex((each) => each.id === message.id) + by];
    if (!other || this.isAnswering()) return;
    choose(this.conversation, other);
    this.store.save(this.conversation);
    this.thread.show(this.conversation);
  }

  private giveResults(results: Map<string, string>): void {
    if (this.isAnswering()) return;
    for (const [callId, content] of results) {
      addMessage(this.conversation, { parent: this.conversation.leaf, role: "tool", callId, content });
    }
    this.answer();
  }

  private openCalls(message: Message): ToolCall[] {
    if (this.conversation.leaf !== message.id || message.state !== "done") return [];
    return (message.calls ?? []).filter((call) => call.id);
  }

  private editLast(): void {
    const buttons = document.querySelectorAll<HTMLElement>("#messages [data-edit]");
    buttons[buttons.length - 1]?.click();
  }

  private newChat(): void {
    this.open(newConversation(this.lastSettings()));
    this.composer.focus();
  }

  private lastSettings(): Settings {
    try {
      return readSettings(JSON.parse(small.get("settings") ?? "null"));
    } catch {
      return readSettings(null);
    }
  }

  private open(conversation: Conversation): void {
    this.conversation = conversation;
    small.set("open", conversation.id);
    this.thread.show(conversation);
    this.composer.open();
    this.composer.setRunning(this.answering.isRunning(conversation));
    this.showModels();
    this.sidebar.update();
    document.title = Object.keys(conversation.messages).length ? `${conversation.title} – openelm_mlx` : "openelm_mlx";
    if (NARROW.matches) this.toggleSidebar(false);
  }

  private removed(conversation: Conversation): void {
    this.answering.stop(conversation);
    small.set(`draft.${conversation.id}`, null);
    if (conversation.id === this.conversation.id) this.newChat();
  }

  // --- what happens by itself

  private ended(conversation: Conversation): void {
    void this.store.flush();
    this.sidebar.update();
    void this.connection.check();
    if (conversation.id !== this.conversation.id) return;
    this.composer.setRunning(false);
    this.thread.show(conversation);
    document.title = `${conversation.title} – openelm_mlx`;
  }

  private stored(event: StoreEvent): void {
    if (event.kind === "trouble") {
      showBanner("store-banner", event.text);
      return;
    }
    if (event.id === this.conversation.id) {
      const other = this.store.conversations.get(event.id);
      if (other) {
        this.conversation = other;
        this.thread.show(other);
        this.showModels();
      } else this.newChat();
    }
    this.sidebar.update();
  }

  private connected(status: Status): void {
    const pill = byId("state");
    pill.dataset.state = status.state;
    const text = stateText(status);
    if (byId("state-text").textContent !== text) byId("state-text").textContent = text; // or it would be read aloud again
    showBanner("gone-banner", status.state === "gone" ? "The server does not answer. This page tries again by itself." : null);
    const failed = status.health?.models.find((model) => model.state === "failed");
    showBanner("failed-banner", failed ? `${failed.id} could not be loaded: ${failed.error}` : null);
    this.showModels();
    // Once: who closes it is asked again only by a request that needs the key
    if (status.state === "locked" && !this.locked) void this.askForKey();
    this.locked = status.state === "locked";
  }

  private askForKey(signal?: AbortSignal): Promise<boolean> {
    this.asking ??= askForKey((value, keep) => this.connection.unlock(value, keep), signal).finally(() => (this.asking = null));
    return this.asking;
  }

  private showModels(): void {
    const { settings } = this.conversation;
    const known = this.connection.status.models.map((model) => model.id);
    if (known.length && !known.includes(settings.model ?? "")) settings.model = known[0]!;
    const names = known.length ? known : settings.model ? [settings.model] : [];
    const field = byId<HTMLSelectElement>("model");
    const memory = byId("memory");
    memory.textContent = machineText(this.connection.status.health, settings.model);
    memory.title = planText(this.connection.status.health, settings.model) ?? "";
    const now = JSON.stringify([names, settings.model]);
    field.disabled = names.length === 0;
    if (field.dataset.shown === now) return; // drawing it anew would close it under the pointer
    field.dataset.shown = now;
    field.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === settings.model }, name)));
  }

  // --- buttons and keys

  private connectButtons(): void {
    byId("new-chat").addEventListener("click", () => this.newChat());
    byId("settings").addEventListener("click", () => this.openSettings());
    byId("keyboard").addEventListener("click", () => showShortcuts());
    byId("toggle-sidebar").addEventListener("click", () => this.toggleSidebar());
    byId("close-sidebar").addEventListener("click", () => this.toggleSidebar(false));
    byId("sidebar-shade").addEventListener("click", () => this.toggleSidebar(false));
    byId("model").addEventListener("change", (event) => {
      this.conversation.settings.model = (event.target as HTMLSelectElement).value;
      this.settingsChanged();
      this.showModels();
    });
    for (const button of document.querySelectorAll<HTMLElement>("[data-icon]")) button.prepend(icon(button.dataset.icon!));
    this.toggleSidebar(!NARROW.matches && small.get("sidebar") !== "hidden");
  }

  private openSettings(): void {
    const plan = planText(this.connection.status.health, this.conversation.settings.model);
    showSettings(this.conversation.settings, plan, () => this.settingsChanged());
  }

  private settingsChanged(): void {
    small.set("settings", JSON.stringify(this.conversation.settings));
    if (this.conversation.leaf !== null) this.store.save(this.conversation);
  }

  private toggleSidebar(shown = document.body.classList.contains("no-sidebar")): void {
    document.body.classList.toggle("no-sidebar", !shown);
    byId("toggle-sidebar").setAttribute("aria-expanded", String(shown));
    byId("sidebar").inert = !shown;
    if (!NARROW.matches) small.set("sidebar", shown ? null : "hidden");
  }

  private key(event: KeyboardEvent): void {
    const command = isMac ? event.metaKey : event.ctrlKey;
    const key = event.key.toLowerCase();
    const isOpen = document.querySelector("dialog[open]") !== null;
    const run = (action: () => void) => {
      event.preventDefault();
      action();
    };
    if (isComposing(event) || isOpen) return;
    if (key === "escape" || (command && key === ".")) {
      if (this.answering.isRunning(this.conversation)) run(() => this.answering.stop(this.conversation));
      else if (NARROW.matches) run(() => this.toggleSidebar(false));
    } else if (!command || event.altKey) return;
    else if (key === "k") run(() => { this.toggleSidebar(true); this.sidebar.focusSearch(); });
    else if (key === "b" && !event.shiftKey) run(() => this.toggleSidebar());
    else if (key === "o" && event.shiftKey) run(() => this.newChat());
    else if (key === "/") run(showShortcuts);
    else if (key === ",") run(() => this.openSettings());
    else if (key === "enter" && event.shiftKey) {
      const last = path(this.conversation).at(-1);
      if (last?.role === "assistant") run(() => this.answerAgain(last));
    }
  }
}

function showBanner(id: string, text: string | null): void {
  const banner = byId(id);
  banner.hidden = text === null;
  if (text !== null && banner.textContent !== text) banner.textContent = text;
}

void new Page().start();
