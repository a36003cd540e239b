// Vercel's ai: @ai-sdk/openai over Responses (which sends item references back), @ai-sdk/openai-compatible over chat.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { ask, BASE_URL, calculate, MODEL, report, SUM, WORD } from "./common.mjs";

const openai = createOpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "openelm_mlx", baseURL: `${BASE_URL}/v1`, supportsStructuredOutputs: true });
const found = {};
for (const [kind, provider] of [["responses", openai], ["chat", compatible]]) {
  const model = provider(MODEL);
  const calls = [];
  const calculator = tool({
    description: "Evaluates an arithmetic expression.",
    inputSchema: z.object({ expression: z.string() }),
    execute: async ({ expression }) => (calls.push(expression), calculate(expression)),
  });
  const options = { model, temperature: 0, maxRetries: 0 };
  const chat = await generateText({ ...options, prompt: WORD });
  let stream = "";
  for await (const part of streamText({ ...options, prompt: WORD }).textStream) stream += part;
  const summed = await generateText({ ...options, prompt: SUM, tools: { calculator }, stopWhen: stepCountIs(4) });
  const structured = await generateObject({ ...options, prompt: SUM, schema: z.object({ expression: z.string() }) });
  const error = await ask(() => generateText({ model: provider("nobody"), prompt: WORD, maxRetries: 0 }));
  const controller = new AbortController();
  for await (const part of streamText({ ...options, prompt: WORD, abortSignal: controller.signal }).textStream) controller.abort();
  found[kind] = { chat: chat.text, reasoning: chat.reasoningText ?? null, stream, calls, after_call: summed.text, structured: structured.object, errors: { "unknown model": error }, cancelled: true };
}
report(found);
