// Conversations in IndexedDB. A browser without it, or with a full or broken one, still chats: what could not be kept
// stays in memory, is tried again, and the page says so.
import { readConversation } from "./transfer";
import { merge } from "./tree";
import { isLive, type Conversation } from "./types";

const DATABASE = "openelm_mlx";
const TABLE = "conversations";
const SAVE_AFTER = 400; // ms, so that a stream is not a write per token
const TRY_AGAIN_AFTER = 20_000;
const OPEN_WITHIN = 5_000;

export type StoreEvent = { kind: "changed" | "removed"; id: string } | { kind: "trouble"; text: string | null };

export class Store {
  readonly conversations = new Map<string, Conversation>();
  trouble: string | null = null;
  private database: IDBDatabase | null = null;
  private unsaved = new Set<string>();
  private timer = 0;
  private pause = SAVE_AFTER;
  private channel: BroadcastChannel | null = null;

  constructor(private listener: (event: StoreEvent) => void) {}

  async open(): Promise<void> {
    try {
      this.database = await openDatabase();
      // A browser that deletes databases behind an open page closes this one
      this.database.onclose = () => (this.database = null);
      this.database.onversionchange = () => this.database?.close();
      for (const value of await done(this.database.transaction(TABLE).objectStore(TABLE).getAll())) this.take(value);
    } catch (error) {
      this.setTrouble(sentenceOf(error));
    }
    if ("BroadcastChannel" in window) {
      this.channel = new BroadcastChannel(DATABASE);
      this.channel.onmessage = ({ data }) => void this.hear(data);
    }
    addEventListener("pagehide", () => void this.flush());
    document.addEventListener("visibilitychange", () => document.hidden && void this.flush());
  }

  save(conversation: Conversation): void {
    this.conversations.set(conversation.id, conversation);
    this.unsaved.add(conversation.id);
    this.timer ||= window.setTimeout(() => void this.flush(), this.pause);
  }

  async remove(id: string): Promise<void> {
    this.conversations.delete(id);
    this.unsaved.delete(id);
    try {
      const database = await this.reach();
      const change = database.transaction(TABLE, "readwrite");
      change.objectStore(TABLE).delete(id);
      await finished(change);
      this.channel?.postMessage({ kind: "removed", id });
      if (this.unsaved.size) await this.flush(); // there may be room now
    } catch (error) {
      this.setTrouble(sentenceOf(error));
    }
  }

  async flush(): Promise<void> {
    clearTimeout(this.timer);
    this.timer = 0;
    const begin = performance.now();
    for (const id of [...this.unsaved]) {
      const conversation = this.conversations.get(id);
      this.unsaved.delete(id);
      if (!conversation) continue;
      try {
        await this.write(conversation);
        this.channel?.postMessage({ kind: "changed", id });
      } catch (error) {
        if (this.conversations.has(id)) this.unsaved.add(id);
        this.setTrouble(sentenceOf(error));
      }
    }
    // A conversation of many megabytes takes its time, which an answer that grows wants for itself
    this.pause = Math.max(SAVE_AFTER, 10 * (performance.now() - begin));
    if (!this.unsaved.size) this.setTrouble(null);
    else this.timer ||= window.setTimeout(() => void this.flush(), TRY_AGAIN_AFTER);
  }

  // Another tab may have added messages to the same conversation: reading and writing are one transaction.
  private async write(conversation: Conversation): Promise<void> {
    const database = await this.reach();
    const change = database.transaction(TABLE, "readwrite");
    const table = change.objectStore(TABLE);
    const end = finished(change);
    end.catch(() => undefined); // reported by the await below, or by the error before it
    const stored = readConversation(await done(table.get(conversation.id)));
    await done(table.put(stored ? merge(stored, conversation) : conversation));
    await end;
  }

  private async reach(): Promise<IDBDatabase> {
    this.database ??= await openDatabase();
    return this.database;
  }

  private take(value: unknown): Conversation | null {
    const conversation = readConversation(value);
    if (conversation) this.conversations.set(conversation.id, conversation);
    return conversation;
  }

  private async hear(event: StoreEvent): Promise<void> {
    if (event.kind === "trouble") return;
    if (event.kind === "removed") this.conversations.delete(event.id);
    else {
      const own = this.conversations.get(event.id);
      if (own && Object.values(own.messages).some(isLive)) return; // this tab is writing it
      const value = await this.reach().then((database) => done(database.transaction(TABLE).objectStore(TABLE).get(event.id)), () => null);
      // The other tab may still be streaming: its state is no business of this one's
      if (!this.take(value)) return;
    }
    this.listener(event);
  }

  private setTrouble(text: string | null): void {
    if (text === this.trouble) return;
    this.trouble = text;
    this.listener({ kind: "trouble", text });
  }
}

function openDatabase(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error("the browser's storage does not answer")), OPEN_WITHIN);
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function done<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(change: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    change.oncomplete = () => resolve();
    change.onabort = change.onerror = () => reject(change.error ?? new Error("the browser gave up writing"));
  });
}

function sentenceOf(error: unknown): string {
  const full = error instanceof DOMException && error.name === "QuotaExceededError";
  return full
    ? "The browser’s storage for this page is full: what is new is lost when this tab closes. Export or delete conversations."
    : "This browser does not keep conversations here: they are lost when this tab closes. Export what you want to keep.";
}

// Small choices (theme, key, drafts) in localStorage, which may be switched off or full as well.
const forgotten = new Map<string, string>();

export const small = {
  get(key: string): string | null {
    try {
      return localStorage.getItem(`openelm_mlx.${key}`) ?? forgotten.get(key) ?? null;
    } catch {
      return forgotten.get(key) ?? null;
    }
  },
  set(key: string, value: string | null): void {
    try {
      if (value === null) localStorage.removeItem(`openelm_mlx.${key}`);
      else localStorage.setItem(`openelm_mlx.${key}`, value);
      forgotten.delete(key);
    } catch {
      if (value === null) forgotten.delete(key);
      else forgotten.set(key, value);
    }
  },
};
