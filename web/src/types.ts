// What is kept: conversations whose messages form a tree, so that an edit or another try never loses the first one.

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

/** What one answer took. Times are in seconds, by this browser's clock. */
export interface Statistics {
  promptTokens?: number;
  cachedTokens?: number;
  completionTokens?: number;
  reasoningTokens?: number;
  firstToken?: number;
  tokensPerSecond?: number;
}

export type MessageState = "waiting" | "reasoning" | "answering" | "done" | "stopped" | "failed";

export interface Message {
  id: string;
  parent: string | null;
  role: "user" | "assistant" | "tool";
  content: string;
  created: number;
  state: MessageState;
  // of an answer
  model?: string;
  reasoning?: string;
  reasoningSeconds?: number;
  calls?: ToolCall[];
  finish?: string;
  error?: string;
  statistics?: Statistics;
  // of a tool's result: whose
  callId?: string;
}

/** null is the server's own default, and is not sent. */
export interface Settings {
  model: string | null;
  system: string;
  effort: string | null;
  temperature: number | null;
  topP: number | null;
  maxTokens: number | null;
  seed: number | null;
  tools: string;
}

export interface Conversation {
  id: string;
  title: string;
  renamed: boolean;
  created: number;
  updated: number;
  leaf: string | null;
  messages: Record<string, Message>;
  settings: Settings;
}

export const DEFAULTS: Settings = {
  model: null,
  system: "",
  effort: null,
  temperature: null,
  topP: null,
  maxTokens: null,
  seed: null,
  tools: "",
};

export const isLive = (message: Message): boolean => ["waiting", "reasoning", "answering"].includes(message.state);
