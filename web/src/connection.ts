// Whether the server is there, loading, busy or gone: asked for by a timer, and told by each request that succeeds or fails.
import { health, key, models, ServerError, Unreachable, type Model } from "./api";

export type State = "connecting" | "loading" | "ready" | "busy" | "gone" | "locked";

export interface Status {
  state: State;
  models: Model[];
  health: Health | null;
}

/** What the page shows of /health. Sizes are in bytes. */
export interface Health {
  isLoading: boolean;
  models: ModelHealth[];
  waiting: number;
  memory: { used: number; limit: number } | null;
  /** Tools that the server runs itself: calculator, python, browser.search. */
  tools: string[];
}

export interface ModelHealth {
  id: string;
  state: string;
  error: string | null;
  /** The share of a download that is done. */
  share: number | null;
  waiting: number;
  contextLength: number | null;
  kept: number;
  plan: { total: number; weights: number; cache: number; scratch: number } | null;
}

// ms until the next question
const EVERY: Record<State, number> = { connecting: 500, loading: 1_000, ready: 10_000, busy: 2_000, gone: 1_000, locked: 30_000 };
const LONGEST = 8_000;
const ANSWER_WITHIN = 10_000;

export class Connection {
  status: Status = { state: "connecting", models: [], health: null };
  private timer = 0;
  private failures = 0;
  private asking: Promise<void> | null = null;

  constructor(private listener: (status: Status) => void) {
    addEventListener("online", () => void this.check());
    addEventListener("focus", () => void this.check());
    document.addEventListener("visibilitychange", () => !document.hidden && void this.check());
  }

  /** Asks now; whoever asks at the same time shares the answer. */
  check(): Promise<void> {
    this.asking ??= this.look().finally(() => (this.asking = null));
    return this.asking;
  }

  /** A request found nobody: shown at once, and asked again soon. */
  lost(): void {
    this.set({ ...this.status, state: "gone" });
    this.later();
  }

  private async look(): Promise<void> {
    const within = AbortSignal.timeout(ANSWER_WITHIN);
    try {
      const found = readHealth(await health(within));
      const known = await models();
      const busy = found.waiting > 0;
      this.failures = 0;
      this.set({ state: found.isLoading ? "loading" : busy ? "busy" : "ready", models: known, health: found });
    } catch (error) {
      if (error instanceof ServerError && error.status === 401) this.set({ ...this.status, state: "locked" });
      else if (error instanceof ServerError && error.status === 503) this.set({ ...this.status, state: "loading" });
      else if (error instanceof ServerError || error instanceof Unreachable || within.aborted) {
        this.failures += 1;
        this.set({ ...this.status, state: "gone" });
      } else throw error;
    } finally {
      this.later();
    }
  }

  private later(): void {
    clearTimeout(this.timer);
    const state = this.status.state;
    const slower = state === "gone" ? 1.5 ** Math.min(this.failures, 10) : 1;
    const wait = Math.min(EVERY[state] * slower, Math.max(LONGEST, EVERY[state]));
    this.timer = window.setTimeout(() => (document.hidden && state === "ready" ? this.later() : void this.check()), wait);
  }

  private set(status: Status): void {
    this.status = status;
    this.listener(status);
  }

  /** Takes a key and says whether the server does. */
  async unlock(value: string, keep: boolean): Promise<boolean> {
    key.set(value, keep);
    await this.asking;
    await this.check();
    return this.status.state !== "locked";
  }
}

// Without the key the body has the status alone. "dead" is an engine that the next request replaces.
function readHealth(body: Record<string, any>): Health {
  const list: any[] = Array.isArray(body.models) ? body.models : [];
  const models = list.filter((each) => typeof each?.id === "string").map(readModel);
  const { used_bytes: used, limit_bytes: limit } = body.memory ?? {};
  return {
    isLoading: body.status === "loading" || body.status === "dead",
    models,
    waiting: models.reduce((sum, each) => sum + each.waiting, 0),
    memory: used > 0 ? { used: Number(used), limit: Number(limit) || 0 } : null,
    tools: Array.isArray(body.tools) ? body.tools.map(String) : [],
  };
}

function readModel(each: any): ModelHealth {
  const { plan } = each;
  return {
    id: each.id,
    state: String(each.state),
    error: typeof each.error === "string" ? each.error : null,
    share: each.total > 0 ? Number(each.downloaded) / Number(each.total) : null,
    waiting: Number(each.waiting) || 0,
    contextLength: Number(each.context_length) || null,
    kept: Number(each.kept_bytes) || 0,
    plan: plan && {
      total: Number(plan.total_bytes), weights: Number(plan.weights_bytes),
      cache: Number(plan.kv_cache_bytes), scratch: Number(plan.scratch_bytes),
    },
  };
}
