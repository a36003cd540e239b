// Conversations as files, and files as conversations. A file may come from anywhere: every field is checked.
import { newId, path, titleOf } from "./tree";
import { DEFAULTS, isLive, type Conversation, type Message, type Settings, type Statistics, type ToolCall } from "./types";

const FORMAT = "openelm_mlx conversations";
const ROLES = ["user", "assistant", "tool"];
const STATES = ["waiting", "reasoning", "answering", "done", "stopped", "failed"];

export function asJson(conversations: Conversation[]): string {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 2);
}

/** The conversations of an exported file, with new ids where `taken` has theirs already. Throws a sentence. */
export function fromJson(text: string, taken: (id: string) => boolean): Conversation[] {
  let file: unknown;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON: choose one that was exported here.");
  }
  const list = isObject(file) && Array.isArray(file.conversations) ? file.conversations : null;
  const conversations = (list ?? []).map(readConversation).filter((each) => each !== null);
  if (!conversations.length) throw new Error("This file holds no conversations: choose one that was exported here as JSON.");
  for (const each of conversations) if (taken(each.id)) each.id = newId();
  return conversations;
}

export function asMarkdown(conversation: Conversation): string {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push(`> **System:** ${conversation.settings.system.replace(/\n/g, "\n> ")}`);
  for (const message of path(conversation)) {
    const who = { user: "You", assistant: message.model ?? "Assistant", tool: "Result of the tool" }[message.role];
    parts.push(`## ${who}`);
    if (message.reasoning) parts.push(`<details><summary>Reasoning</summary>\n\n${message.reasoning.trim()}\n\n</details>`);
    if (message.role === "tool") parts.push(fenced("", message.content));
    else if (message.content) parts.push(message.content.trim());
    for (const call of message.calls ?? []) parts.push(`Called \`${call.name}\`:`, fenced("json", call.arguments));
    if (message.state === "stopped") parts.push("*(stopped)*");
    if (message.error) parts.push(`*(${message.error})*`);
  }
  return parts.join("\n\n") + "\n";
}

export function fileName(title: string, ending: string): string {
  const name = title.normalize("NFKC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  return `${Array.from(name).slice(0, 50).join("") || "chat"}.${ending}`;
}

// A fence longer than any in the text
function fenced(language: string, text: string): string {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), (run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);
const textOr = <T>(value: unknown, other: T): string | T => (typeof value === "string" ? value : other);
const numberOr = <T>(value: unknown, other: T): number | T => (typeof value === "number" && Number.isFinite(value) ? value : other);

/** A conversation from storage or a file, or null if it is none. */
export function readConversation(value: unknown): Conversation | null {
  if (!isObject(value) || typeof value.id !== "string" || !isObject(value.messages)) return null;
  const messages: Record<string, Message> = Object.create(null);
  for (const each of Object.values(value.messages)) {
    const message = readMessage(each);
    if (message) messages[message.id] = message;
  }
  const now = Date.now();
  const leaf = textOr(value.leaf, null);
  return {
    id: value.id,
    title: titleOf(textOr(value.title, "")),
    renamed: value.renamed === true,
    created: numberOr(value.created, now),
    updated: numberOr(value.updated, now),
    leaf: leaf !== null && messages[leaf] ? leaf : newest(messages),
    messages,
    settings: readSettings(value.settings),
  };
}

function newest(messages: Record<string, Message>): string | null {
  return Object.values(messages).sort((a, b) => b.created - a.created)[0]?.id ?? null;
}

function readMessage(value: unknown): Message | null {
  if (!isObject(value) || typeof value.id !== "string" || !ROLES.includes(String(value.role))) return null;
  const message: Message = {
    id: value.id,
    parent: textOr(value.parent, null),
    role: value.role as Message["role"],
    content: textOr(value.content, ""),
    created: numberOr(value.created, 0),
    state: STATES.includes(String(value.state)) ? (value.state as Message["state"]) : "done",
  };
  if (isLive(message)) message.state = "stopped"; // the page was closed while it was written
  for (const key of ["model", "reasoning", "finish", "error", "callId"] as const) {
    const text = value[key];
    if (typeof text === "string") message[key] = text;
  }
  message.reasoningSeconds = numberOr(value.reasoningSeconds, undefined);
  if (Array.isArray(value.calls)) message.calls = value.calls.map(readCall).filter((call) => call !== null);
  if (isObject(value.statistics)) message.statistics = readStatistics(value.statistics);
  return message;
}

function readCall(value: unknown): ToolCall | null {
  if (!isObject(value) || typeof value.id !== "string" || typeof value.name !== "string") return null;
  return { id: value.id, name: value.name, arguments: textOr(value.arguments, "") };
}

function readStatistics(value: Record<string, unknown>): Statistics {
  const names = ["promptTokens", "cachedTokens", "completionTokens", "reasoningTokens", "firstToken", "tokensPerSecond"] as const;
  return Object.fromEntries(names.map((name) => [name, numberOr(value[name], undefined)]));
}

export function readSettings(value: unknown): Settings {
  const given = isObject(value) ? value : {};
  return {
    model: textOr(given.model, DEFAULTS.model),
    system: textOr(given.system, DEFAULTS.system),
    effort: textOr(given.effort, DEFAULTS.effort),
    temperature: numberOr(given.temperature, DEFAULTS.temperature),
    topP: numberOr(given.topP, DEFAULTS.topP),
    maxTokens: numberOr(given.maxTokens, DEFAULTS.maxTokens),
    seed: numberOr(given.seed, DEFAULTS.seed),
    tools: textOr(given.tools, DEFAULTS.tools),
  };
}
