// What every client is asked, and how it tells the test what it got: one JSON object on standard output.
export const BASE_URL = process.env.BASE_URL ?? "http://127.0.0.1:8080";
export const MODEL = process.env.MODEL ?? "demo-gpt-oss";
export const WORD = "What is a harbor?";
export const SUM = "What is 23 * 19?";
export const CALCULATOR = { type: "object", properties: { expression: { type: "string" } }, required: ["expression"], additionalProperties: false };
export const calculate = (expression) => /^[-0-9+*/(). ]*$/.test(expression) ? String(eval(expression)) : "not an arithmetic expression";
export const report = (found) => console.log(JSON.stringify(found));
export const ask = async (call) => {
  try { await call(); return null; } catch (error) { return [error.status ?? error.statusCode ?? null, error.name]; }
};
