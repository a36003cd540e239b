// The tree of a conversation's messages: one path of it is shown, from the first message to the leaf.
import { DEFAULTS, type Conversation, type Message, type Settings } from "./types";

export function newId(): string {
  // crypto.randomUUID is missing where the page is reached over plain HTTP from another machine
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings: Settings): Conversation {
  const now = Date.now();
  return {
    id: newId(), title: "New chat", renamed: false, created: now, updated: now,
    leaf: null, messages: {}, settings: { ...DEFAULTS, ...settings },
  };
}

export function addMessage(conversation: Conversation, fields: Partial<Message> & Pick<Message, "parent" | "role">): Message {
  const message: Message = { id: newId(), content: "", created: Date.now(), state: "done", ...fields };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.updated = message.created;
  if (message.role === "user" && !conversation.renamed && message.parent === null) conversation.title = titleOf(message.content);
  return message;
}

/** The messages that are shown, from the first to the leaf. */
export function path(conversation: Conversation, leaf: string | null = conversation.leaf): Message[] {
  const messages: Message[] = [];
  const seen = new Set<string>(); // an imported file may hold a circle
  for (let id = leaf; id !== null && !seen.has(id); ) {
    const message: Message | undefined = conversation.messages[id];
    if (!message) break;
    seen.add(id);
    messages.push(message);
    id = message.parent;
  }
  return messages.reverse();
}

/** The versions of a message: those with the same parent, oldest first. */
export function versions(conversation: Conversation, message: Message): Message[] {
  return Object.values(conversation.messages)
    .filter((other) => other.parent === message.parent)
    .sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** Shows another version of a message, down to the newest message below it. */
export function choose(conversation: Conversation, message: Message): void {
  const newest = new Map<string | null, Message>();
  for (const each of Object.values(conversation.messages)) {
    const known = newest.get(each.parent);
    if (!known || each.created >= known.created) newest.set(each.parent, each);
  }
  let leaf = message;
  const seen = new Set<string>();
  for (let next = newest.get(leaf.id); next && !seen.has(next.id); next = newest.get(leaf.id)) {
    seen.add(next.id);
    leaf = next;
  }
  conversation.leaf = leaf.id;
}

export function titleOf(text: string): string {
  const line = text.trim().replace(/\s+/g, " ");
  const characters = Array.from(line);
  return characters.length > 60 ? `${characters.slice(0, 58).join("")}…` : line || "New chat";
}

/** Two copies of a conversation made one: no message of either is lost, nor what one of them has more of it. */
export function merge(stored: Conversation, current: Conversation): Conversation {
  const messages = { ...stored.messages, ...current.messages };
  const length = (message: Message) => message.content.length + (message.reasoning?.length ?? 0);
  for (const [id, message] of Object.entries(stored.messages)) {
    if (length(message) > length(messages[id]!)) messages[id] = message;
  }
  return { ...current, messages };
}
