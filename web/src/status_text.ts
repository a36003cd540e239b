// Numbers as people read them.
import type { Progress } from "./api";
import type { Health, Status } from "./connection";
import type { Message } from "./types";

const plain = new Intl.NumberFormat();
const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });

export const count = (value: number): string => plain.format(value);

export function seconds(value: number): string {
  if (value < 0.1) return "less than 0.1 s";
  if (value < 10) return `${short.format(value)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export const rate = (perSecond: number): string => `${(perSecond < 100 ? short : whole).format(perSecond)} tokens/s`;

export function gigabytes(bytes: number): string {
  return bytes < 1e9 ? `${plain.format(Math.round(bytes / 1e6))} MB` : `${short.format(bytes / 1e9)} GB`;
}

/** What an answer took: speed, tokens, and how much of the prompt was known. */
export function statisticsLine(message: Message): string {
  const { statistics: found, model, state } = message;
  const parts: string[] = model ? [model] : [];
  if (found?.tokensPerSecond) parts.push(rate(found.tokensPerSecond));
  if (found?.completionTokens) parts.push(`${count(found.completionTokens)} ${found.completionTokens === 1 ? "token" : "tokens"}`);
  if (found?.promptTokens) {
    const cached = found.cachedTokens ? `, ${count(found.cachedTokens)} of them cached` : "";
    parts.push(`prompt of ${count(found.promptTokens)}${cached}`);
  }
  if (found?.firstToken !== undefined) parts.push(`first after ${seconds(found.firstToken)}`);
  if (state === "stopped") parts.push("stopped");
  if (message.finish === "length") parts.push("cut at the limit of tokens");
  return parts.join(" · ");
}

/** Why an answer has not begun. */
export function waitingText(progress: Progress | null): string {
  if (progress?.place !== undefined) {
    return progress.place === 0 ? "Next in the queue" : `In the queue: ${count(progress.place)} before this one`;
  }
  if (progress?.total) return `Reading the prompt: ${count(progress.done ?? 0)} of ${count(progress.total)} tokens`;
  return "Waiting for the first token";
}

export function stateText(status: Status): string {
  switch (status.state) {
    case "connecting": return "Connecting";
    case "loading": return loadingText(status.health);
    case "busy": return `Busy, ${count(status.health?.waiting ?? 0)} waiting`;
    case "gone": return "Server gone";
    case "locked": return "Key needed";
    case "ready": return "Ready";
  }
}

function loadingText(health: Health | null): string {
  const loading = health?.models.find((model) => model.state === "loading");
  const share = loading?.share != null ? `, ${Math.round(loading.share * 100)} %` : "";
  return `Loading ${loading?.id ?? "the model"}${share}`;
}

/** The line below the field: the memory, and which tools the server runs. */
export function machineText(health: Health | null, model: string | null): string {
  return [memoryText(health, model), toolsText(health)].filter(Boolean).join(" · ");
}

function memoryText(health: Health | null, model: string | null): string {
  const memory = health?.memory;
  if (!memory) return "";
  const plan = health.models.find((each) => each.id === model)?.plan;
  const limit = memory.limit ? ` of ${gigabytes(memory.limit)}` : "";
  return `Memory ${gigabytes(memory.used)}${limit}${plan ? `, planned ${gigabytes(plan.total)}` : ""}`;
}

function toolsText(health: Health | null): string {
  const names = new Set(health?.tools.map((name) => name.split(".")[0]));
  return names.size ? `The server runs ${[...names].join(", ")}` : "";
}

/** What the plan is made of, and what is kept beside it; null for a model that is not in memory. */
export function planText(health: Health | null, model: string | null): string | null {
  const found = health?.models.find((each) => each.id === model);
  if (!found?.contextLength) return null;
  const { plan, kept, contextLength } = found;
  const parts = plan ? [
    `weights ${gigabytes(plan.weights)}`, `keys and values ${gigabytes(plan.cache)}`, `scratch ${gigabytes(plan.scratch)}`,
  ] : [];
  if (kept) parts.push(`beginnings of prompts ${gigabytes(kept)}`);
  return [`A context of ${count(contextLength)} tokens`, ...parts].join(", ");
}
