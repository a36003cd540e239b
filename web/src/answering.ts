// Answers being written: one request each, read into its message. Several conversations may be answered at once.
import { chat, historyOf, ServerError, toolsOf, Unreachable, type Delta, type Progress } from "./api";
import type { Connection } from "./connection";
import type { Store } from "./store";
import { addMessage, path } from "./tree";
import type { Conversation, Message, Settings, ToolCall } from "./types";

const MOST_TRIES = 20;
const LONGEST_WAIT = 30; // seconds between tries

/** What is known of an answer only while it is written. */
export interface Live {
  progress: Progress | null;
  note: string | null;
  started: number;
  first: number | null;
  last: number;
  pieces: number;
}

// Settings of a chat that not every model has: the chat keeps them for the next model, and this one answers without.
const OPTIONAL: Record<string, { setting: "effort" | "tools"; none: null | ""; what: string }> = {
  reasoning_effort: { setting: "effort", none: null, what: "has no reasoning effort" },
  tools: { setting: "tools", none: "", what: "cannot call tools" },
};

interface Listener {
  changed(conversation: Conversation, message: Message): void;
  ended(conversation: Conversation, message: Message): void;
  /** Something that the person should know. */
  tell(text: string): void;
  /** Resolves to whether there is a key now. */
  askForKey(signal: AbortSignal): Promise<boolean>;
}

export class Answering {
  private running = new Map<string, AbortController>();
  private lives = new Map<string, Live>();
  private unsupported = new Set<string>();

  constructor(
    private store: Store,
    private connection: Connection,
    private listener: Listener,
  ) {}

  isRunning = (conversation: Conversation): boolean => this.running.has(conversation.id);
  live = (message: Message): Live | null => this.lives.get(message.id) ?? null;
  stop = (conversation: Conversation): void => this.running.get(conversation.id)?.abort();

  /** Answers the conversation's leaf. */
  async answer(conversation: Conversation): Promise<void> {
    if (this.isRunning(conversation)) return;
    const settings = { ...conversation.settings };
    const history = historyOf(path(conversation), settings.system);
    const message = addMessage(conversation, {
      parent: conversation.leaf, role: "assistant", state: "waiting", model: settings.model ?? undefined,
    });
    const stopping = new AbortController();
    const live: Live = { progress: null, note: null, started: performance.now(), first: null, last: 0, pieces: 0 };
    this.running.set(conversation.id, stopping);
    this.lives.set(message.id, live);
    this.store.save(conversation);
    this.tell(conversation, message);
    try {
      toolsOf(settings.tools); // a sentence before the request
      for (const name of Object.keys(OPTIONAL)) if (this.unsupported.has(`${name} ${settings.model}`)) this.leaveOut(settings, name);
      await this.read(conversation, message, live, settings, () => chat(history, settings, stopping.signal), stopping.signal);
      message.state = "done";
    } catch (error) {
      this.fail(message, error, stopping.signal.aborted);
    } finally {
      close(message, live);
      this.running.delete(conversation.id);
      this.lives.delete(message.id);
      conversation.updated = Date.now();
      this.tell(conversation, message);
      this.listener.ended(conversation, message);
    }
  }

  // A server that is full or loading says when to come back; one that wants a key gets one.
  private async read(conversation: Conversation, message: Message, live: Live, settings: Settings, open: () => AsyncGenerator<Delta>, signal: AbortSignal) {
    for (let tries = 1; ; tries += 1) {
      try {
        for await (const delta of open()) {
          take(message, live, delta);
          this.tell(conversation, message);
        }
        return;
      } catch (error) {
        if (signal.aborted || live.first !== null || !(error instanceof ServerError) || tries >= MOST_TRIES) throw error;
        if (error.status === 401) {
          live.note = "The server asks for a key";
          this.tell(conversation, message);
          if (!(await this.listener.askForKey(signal))) throw error;
        } else if (error.code === "unsupported_parameter" && this.leaveOut(settings, error.param)) {
          continue;
        } else if (error.status === 503 || (error.status === 429 && error.retryAfter !== null)) {
          void this.connection.check();
          await this.wait(conversation, message, live, Math.min(Math.max(error.retryAfter ?? 2, 1), LONGEST_WAIT), signal);
        } else throw error;
        live.note = null;
      }
    }
  }

  // Whether there is something to leave out. It is told once a model.
  private leaveOut(settings: Settings, name: string | null): boolean {
    const found = OPTIONAL[name ?? ""];
    if (!found || !settings[found.setting]) return false;
    Object.assign(settings, { [found.setting]: found.none });
    const both = `${name} ${settings.model}`;
    if (!this.unsupported.has(both)) this.listener.tell(`${settings.model} ${found.what}: it answers without`);
    this.unsupported.add(both);
    return true;
  }

  private async wait(conversation: Conversation, message: Message, live: Live, seconds: number, signal: AbortSignal): Promise<void> {
    for (let left = Math.ceil(seconds); left > 0; left -= 1) {
      const loading = this.connection.status.state === "loading";
      live.note = `${loading ? "The server is loading the model" : "The server is busy"}: trying again in ${left} s`;
      this.tell(conversation, message);
      await new Promise((resolve) => setTimeout(resolve, 1000));
      signal.throwIfAborted();
      if (loading && this.connection.status.state === "ready") return;
    }
  }

  private fail(message: Message, error: unknown, stopped: boolean): void {
    message.state = stopped ? "stopped" : "failed";
    if (stopped) return;
    message.error = (error as Error).message;
    if (error instanceof Unreachable) this.connection.lost();
    else if (error instanceof ServerError && error.status === 401) void this.connection.check();
  }

  private tell(conversation: Conversation, message: Message): void {
    // Not one that was deleted meanwhile
    if (this.store.conversations.has(conversation.id)) this.store.save(conversation);
    this.listener.changed(conversation, message);
  }
}

function take(message: Message, live: Live, delta: Delta): void {
  if (delta.progress) {
    live.progress = delta.progress.place === undefined && !delta.progress.total ? live.progress : delta.progress;
    return;
  }
  const now = performance.now();
  if (delta.reasoning || delta.content || delta.calls) {
    if (live.first === null) {
      live.first = now;
      message.statistics = { firstToken: (now - live.started) / 1000 };
    }
    live.last = now;
    live.pieces += 1;
  }
  if (delta.reasoning) {
    message.state = "reasoning";
    message.reasoning = (message.reasoning ?? "") + delta.reasoning.replace(/\r\n?/g, "\n");
  }
  if (message.state === "reasoning") message.reasoningSeconds = (now - (live.first ?? now)) / 1000;
  if (delta.content || delta.calls) message.state = "answering";
  if (delta.content) message.content += delta.content.replace(/\r\n?/g, "\n");
  for (const call of delta.calls ?? []) takeCall((message.calls ??= []), call);
  if (delta.finish) message.finish = delta.finish;
  if (delta.usage) {
    message.statistics = {
      ...message.statistics,
      promptTokens: delta.usage.prompt_tokens,
      completionTokens: delta.usage.completion_tokens,
      cachedTokens: delta.usage.prompt_tokens_details?.cached_tokens,
      reasoningTokens: delta.usage.completion_tokens_details?.reasoning_tokens,
    };
  }
}

function takeCall(calls: ToolCall[], piece: NonNullable<Delta["calls"]>[number]): void {
  const call = (calls[piece.index] ??= { id: "", name: "", arguments: "" });
  if (piece.id) call.id = piece.id;
  if (piece.name) call.name = piece.name;
  call.arguments += piece.arguments ?? "";
}

// The first token's wait is not a part of the speed, and neither is the first token.
function close(message: Message, live: Live): void {
  const statistics = (message.statistics ??= {});
  statistics.completionTokens ??= live.pieces || undefined;
  statistics.tokensPerSecond = speed(live, statistics.completionTokens ?? 0) ?? undefined;
}

export function speed(live: Live, tokens = live.pieces): number | null {
  if (live.first === null || tokens < 2 || live.last <= live.first) return null;
  return ((tokens - 1) * 1000) / (live.last - live.first);
}
