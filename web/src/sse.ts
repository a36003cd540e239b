// Server-sent events of a fetch: EventSource can neither post nor send a key.

export type ServerEvent = { kind: "data"; data: string } | { kind: "comment"; text: string };

/** Events and comments in their order. Pieces of the body may end anywhere, also within a character. */
export async function* serverEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data: string[] = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      // A CR at the end may be the half of a CRLF
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = done ? "" : (lines.pop() ?? "");
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { kind: "data", data: data.join("\n") };
          data = [];
        } else if (line.startsWith(":")) yield { kind: "comment", text: line.slice(1).trim() };
        else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) {
        if (data.length) yield { kind: "data", data: data.join("\n") };
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => undefined); // whoever stops reading ends the request too
  }
}
