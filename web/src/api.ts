// The server's API as this page uses it: models, health, and streamed chat completions.
import { serverEvents } from "./sse";
import { small } from "./store";
import type { Message, Settings, ToolCall } from "./types";

/** What the server answered instead of what was asked for. */
export class ServerError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly retryAfter: number | null = null,
    readonly param: string | null = null,
  ) {
    super(message);
  }
}

/** No answer at all, or one that broke off. */
export class Unreachable extends Error {}

export interface Model {
  id: string;
  state: string | null;
}

export interface Progress {
  place?: number;
  done?: number;
  total?: number;
}

export interface Usage {
  prompt_tokens?: number;
  completion_tokens?: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: { reasoning_tokens?: number } | null;
}

export interface Delta {
  content?: string;
  reasoning?: string;
  calls?: { index: number; id?: string; name?: string; arguments?: string }[];
  finish?: string;
  usage?: Usage;
  progress?: Progress;
}

export const key = {
  get: () => keyOfThisTab ?? small.get("key"),
  set(value: string | null, keep = true) {
    keyOfThisTab = keep ? null : value;
    small.set("key", keep ? value : null);
  },
};
let keyOfThisTab: string | null = null;

export async function models(): Promise<Model[]> {
  const body = await (await ask("v1/models")).json();
  if (!Array.isArray(body?.data)) throw new ServerError(200, "The server's list of models cannot be read.");
  return body.data.filter((each: any) => typeof each?.id === "string").map((each: any) => ({ id: each.id, state: each.state ?? null }));
}

/** The body of /health, which answers while a model is being loaded too. */
export async function health(signal: AbortSignal): Promise<Record<string, any>> {
  const response = await reach("health", { signal });
  const body = await response.json().catch(() => null);
  // 503 with a body is a server that is loading; without one it is something in between
  if (typeof body !== "object" || body === null) throw await errorOf(response, null);
  if (response.status === 401 || response.status === 403) throw await errorOf(response, body);
  return body;
}

/** A streamed answer. Stops when `signal` does; then the server gives up the work. */
export async function* chat(messages: object[], settings: Settings, signal: AbortSignal): AsyncGenerator<Delta> {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(requestOf(messages, settings)),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  if (!response.body) throw new Unreachable("The server's answer has no body.");
  let finished = false;
  try {
    for await (const event of serverEvents(response.body)) {
      if (event.kind === "comment") yield { progress: progressOf(event.text) };
      else if (event.data === "[DONE]") finished = true;
      else yield deltaOf(JSON.parse(event.data));
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new Unreachable(error instanceof SyntaxError ? "The server sent something that is no answer." : "The connection to the server broke.");
  }
  if (!finished) throw new Unreachable("The connection to the server broke.");
}

function requestOf(messages: object[], settings: Settings): object {
  const request: Record<string, unknown> = {
    model: settings.model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  const given = {
    reasoning_effort: settings.effort,
    temperature: settings.temperature,
    top_p: settings.topP,
    max_completion_tokens: settings.maxTokens,
    seed: settings.seed,
    tools: toolsOf(settings.tools),
  };
  for (const [name, value] of Object.entries(given)) if (value !== null) request[name] = value;
  return request;
}

/** The tools of a settings field, null if it is empty. Throws a sentence. */
export function toolsOf(text: string): object[] | null {
  if (!text.trim()) return null;
  let tools: unknown;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${(error as Error).message}`);
  }
  const list = Array.isArray(tools) ? tools : [tools];
  const right = list.every((tool) => tool?.type === "function" && typeof tool.function?.name === "string");
  if (!right) throw new Error('Each tool has the form {"type": "function", "function": {"name": …, "parameters": {…}}}.');
  return list;
}

/** The messages as the API takes them. Reasoning goes back only with the calls that it led to. */
export function historyOf(messages: Message[], system: string): object[] {
  const history: object[] = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "user") history.push({ role: "user", content: message.content });
    else if (message.role === "tool") history.push({ role: "tool", tool_call_id: message.callId, content: message.content });
    else if (message.calls?.length) {
      const tool_calls = message.calls.map((call: ToolCall) => ({
        id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
      }));
      history.push({ role: "assistant", content: message.content || null, reasoning: message.reasoning || null, tool_calls });
    } else if (message.content) history.push({ role: "assistant", content: message.content });
  }
  return history;
}

function deltaOf(chunk: any): Delta {
  if (chunk?.error) throw new ServerError(500, String(chunk.error.message ?? "The server failed on this request."), chunk.error.code ?? null);
  const choice = chunk?.choices?.[0];
  const delta = choice?.delta ?? {};
  return {
    content: delta.content || undefined,
    reasoning: delta.reasoning || delta.reasoning_content || undefined,
    calls: delta.tool_calls?.map((call: any) => ({ index: call.index ?? 0, id: call.id, name: call.function?.name, arguments: call.function?.arguments })),
    finish: choice?.finish_reason ?? undefined,
    usage: chunk?.usage ?? undefined,
  };
}

// ": in the queue, 3 before this one" and ": prompt, 512 of 2048 tokens"
function progressOf(comment: string): Progress {
  const place = /queue\D*(\d+)/.exec(comment);
  const prompt = /prompt\D*(\d+)\D+(\d+)/.exec(comment);
  if (place) return { place: Number(place[1]) };
  if (prompt) return { done: Number(prompt[1]), total: Number(prompt[2]) };
  return {};
}

async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  const response = await reach(path, options);
  if (!response.ok) throw await errorOf(response, await response.json().catch(() => null));
  return response;
}

async function reach(path: string, options: RequestInit = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  const own = key.get();
  // What cannot be written into a header is no server's key
  if (own && !/^[\x21-\x7e]+$/.test(own)) throw new ServerError(401, "The key has characters that no key has.");
  if (own) headers.set("Authorization", `Bearer ${own}`);
  try {
    return await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Unreachable("The server does not answer.");
  }
}

async function errorOf(response: Response, body: any): Promise<ServerError> {
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  return new ServerError(response.status, String(message), body?.error?.code ?? null, Number.isFinite(seconds) ? seconds : null, body?.error?.param ?? null);
}
