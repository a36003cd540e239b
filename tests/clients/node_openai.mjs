// The openai package for JavaScript: both APIs.
import OpenAI from "openai";
import { ask, BASE_URL, CALCULATOR, calculate, MODEL, report, SUM, WORD } from "./common.mjs";

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const chat = await client.chat.completions.create({ model: MODEL, messages: user(WORD), temperature: 0 });
let stream = "";
for await (const chunk of await client.chat.completions.create({ model: MODEL, messages: user(WORD), temperature: 0, stream: true }))
  stream += chunk.choices[0]?.delta?.content ?? "";
const tools = [{ type: "function", name: "calculator", description: "Evaluates an arithmetic expression.", parameters: CALCULATOR, strict: true }];
const first = await client.responses.create({ model: MODEL, input: SUM, tools, temperature: 0 });
const call = first.output.find((item) => item.type === "function_call");
const second = await client.responses.create({
  model: MODEL, tools, temperature: 0, previous_response_id: first.id,
  input: [{ type: "function_call_output", call_id: call.call_id, output: calculate(JSON.parse(call.arguments).expression) }],
});
const error = await ask(() => client.chat.completions.create({ model: "nobody", messages: user(WORD) }));
const cancelled = await client.responses.create({ model: MODEL, input: WORD, stream: true });
for await (const event of cancelled) { cancelled.controller.abort(); break; }
report({ chat: chat.choices[0].message.content, stream, call: call.arguments, after_call: second.output_text, errors: { "unknown model": error }, cancelled: true });
