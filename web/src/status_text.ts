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
    case "loading": return `Loading ${status.health?.loading[0] ?? "the model"}`;
    case "busy": return `Busy, ${count(status.health?.waiting ?? 0)} waiting`;
    case "gone": return "Server gone";
    case "locked": return "Key needed";
    case "ready": return "Ready";
  }
}

export function memoryText(health: Health | null): string {
  const memory = health?.memory;
  return memory ? `Memory ${gigabytes(memory.used)} of ${gigabytes(memory.limit)}` : "";
}
