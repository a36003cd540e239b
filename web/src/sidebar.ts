// The list of conversations: search, rename, delete, export, import.
import { byId, download, h, icon, isComposing } from "./dom";
import { notice } from "./dialogs";
import type { Store } from "./store";
import { asJson, asMarkdown, fileName, fromJson } from "./transfer";
import type { Conversation } from "./types";

const DAY = 86_400_000;

interface Listener {
  open(conversation: Conversation): void;
  removed(conversation: Conversation): void;
  current(): string;
}

export class Sidebar {
  private list = byId("conversations");
  private search = byId<HTMLInputElement>("search");
  private renaming: string | null = null;
  private frame = 0;

  constructor(
    private store: Store,
    private listener: Listener,
  ) {
    this.search.addEventListener("input", () => {
      this.closeMenus();
      this.update();
    });
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.search.value) {
        event.stopPropagation();
        this.search.value = "";
        this.update();
      }
    });
    byId("export-all").addEventListener("click", () => this.exportAll());
    const file = byId<HTMLInputElement>("import-file");
    byId("import").addEventListener("click", () => file.click());
    file.addEventListener("change", () => void this.importFile(file));
    // One menu at a time, gone when something else is pressed
    document.addEventListener("click", (event) => this.closeMenus(event.target as Node));
  }

  /** Draws the list in the next frame; calls until then are one drawing. */
  update(): void {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (this.renaming !== null) return;
      const menu = this.openMenu();
      // An answer that goes on must not take a menu from under the pointer
      if (menu) menu.addEventListener("toggle", () => this.update(), { once: true });
      else this.draw();
    });
  }

  /** The open menu of a conversation that is still there. */
  private openMenu(): HTMLDetailsElement | null {
    const menu = this.list.querySelector<HTMLDetailsElement>("details.menu[open]");
    const id = menu?.closest("li")?.dataset.id;
    return id !== undefined && this.store.conversations.has(id) ? menu : null;
  }

  private closeMenus(except: Node | null = null): void {
    for (const menu of document.querySelectorAll<HTMLDetailsElement>("details.menu[open]")) {
      if (!menu.contains(except)) menu.open = false;
    }
  }

  focusSearch(): void {
    this.search.focus();
    this.search.select();
  }

  private draw(): void {
    const words = fold(this.search.value).split(/\s+/).filter(Boolean);
    const all = [...this.store.conversations.values()].filter((each) => Object.keys(each.messages).length > 0);
    const found = all.filter((each) => matches(each, words)).sort((a, b) => b.updated - a.updated);
    const focused = document.activeElement?.closest("li")?.dataset.id;
    const groups = new Map<string, HTMLElement[]>();
    for (const each of found) {
      const name = groupOf(each.updated);
      groups.set(name, [...(groups.get(name) ?? []), this.entry(each)]);
    }
    this.list.replaceChildren(...[...groups].map(([name, entries]) => h("section", {}, h("h3", {}, name), h("ul", {}, ...entries))));
    if (!found.length) this.list.append(h("p", { class: "nothing" }, words.length ? "Nothing found" : "No chats yet"));
    if (!focused) return;
    const again = this.list.querySelector<HTMLElement>(`li[data-id="${focused}"] .open`) ?? this.list.querySelector<HTMLElement>(".open");
    (again ?? this.search).focus();
  }

  private entry(conversation: Conversation): HTMLElement {
    const current = conversation.id === this.listener.current();
    const menu = h("details", { class: "menu" },
      h("summary", { "aria-label": `More for ${conversation.title}`, title: "More" }, icon("more")),
      h("div", { class: "menu-items" },
        item("Rename", () => this.rename(conversation)),
        item("Export as Markdown", () => download(fileName(conversation.title, "md"), "text/markdown", asMarkdown(conversation))),
        item("Export as JSON", () => download(fileName(conversation.title, "json"), "application/json", asJson([conversation]))),
        item("Delete", () => void this.remove(conversation), "danger")));
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      menu.querySelector("summary")?.focus();
    });
    return h("li", { "data-id": conversation.id, class: current && "current" },
      h("button", {
        type: "button", class: "open", dir: "auto", title: conversation.title, "aria-current": current && "page",
        onclick: () => this.listener.open(conversation), ondblclick: () => this.rename(conversation),
      }, conversation.title), menu);
  }

  private rename(conversation: Conversation): void {
    const entry = this.list.querySelector<HTMLElement>(`li[data-id="${conversation.id}"]`);
    if (!entry) return;
    this.renaming = conversation.id;
    const field = h("input", { type: "text", value: conversation.title, dir: "auto", "aria-label": "New name", maxlength: "200" });
    const end = (keep: boolean) => {
      if (this.renaming === null) return; // removing the field blurs it
      this.renaming = null;
      const title = field.value.trim();
      if (keep && title && title !== conversation.title) {
        Object.assign(conversation, { title, renamed: true });
        this.store.save(conversation);
      }
      this.draw();
      this.list.querySelector<HTMLElement>(`li[data-id="${conversation.id}"] .open`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    field.addEventListener("blur", () => end(true));
    entry.replaceChildren(field);
    field.focus();
    field.select();
  }

  private async remove(conversation: Conversation): Promise<void> {
    this.listener.removed(conversation); // ends its answer, which would be saved otherwise
    await this.store.remove(conversation.id);
    this.update();
    notice(`“${conversation.title}” is deleted`, {
      label: "Undo",
      run: () => {
        this.store.save(conversation);
        this.listener.open(conversation);
      },
    });
  }

  private exportAll(): void {
    const all = [...this.store.conversations.values()].filter((each) => Object.keys(each.messages).length > 0);
    if (!all.length) return notice("There is nothing to export yet");
    download(`chats-${new Date().toISOString().slice(0, 10)}.json`, "application/json", asJson(all));
  }

  private async importFile(field: HTMLInputElement): Promise<void> {
    const file = field.files?.[0];
    field.value = "";
    if (!file) return;
    try {
      const imported = fromJson(await file.text(), (id) => this.store.conversations.has(id));
      for (const each of imported) this.store.save(each);
      this.update();
      notice(imported.length === 1 ? "One chat is imported" : `${imported.length} chats are imported`);
    } catch (error) {
      notice((error as Error).message);
    }
  }
}

function item(label: string, run: () => void, className = ""): HTMLElement {
  return h("button", {
    type: "button", class: className,
    onclick: (event) => {
      const menu = event.target.closest("details");
      menu.querySelector("summary").focus(); // a hidden button would lose it
      menu.open = false;
      run();
    },
  }, label);
}

/** Letters without case and accents, for a search that finds Café by cafe. */
const fold = (text: string): string => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

function matches(conversation: Conversation, words: string[]): boolean {
  if (!words.length) return true;
  const text = fold([conversation.title, ...Object.values(conversation.messages).map((message) => message.content)].join("\n"));
  return words.every((word) => text.includes(word));
}

function groupOf(time: number): string {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 7 * DAY) return "Last seven days";
  return "Earlier";
}
