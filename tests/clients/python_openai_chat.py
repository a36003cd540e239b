"""The openai package: Chat Completions."""

import json

import openai
from common import BASE_URL, CALCULATION, CALCULATOR, MODEL, SUM, WORD, calculate, report

client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0)
ask = client.chat.completions.create
TOOLS = [
    {"type": "function", "function": {"name": "calculator", "description": calculate.__doc__, "parameters": CALCULATOR}}
]

chat = ask(model=MODEL, messages=[{"role": "user", "content": WORD}], temperature=0)
streamed = ""
for chunk in ask(model=MODEL, messages=[{"role": "user", "content": WORD}], temperature=0, stream=True):
    streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""

messages = [{"role": "user", "content": SUM}]
first = ask(model=MODEL, messages=messages, tools=TOOLS, temperature=0).choices[0]
messages.append(first.message.model_dump(exclude_none=True))
for call in first.message.tool_calls or ():
    result = calculate(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
second = ask(model=MODEL, messages=messages, tools=TOOLS, temperature=0).choices[0]

schema = {"type": "json_schema", "json_schema": {"name": "calculation", "schema": CALCULATION, "strict": True}}
structured = ask(model=MODEL, messages=[{"role": "user", "content": SUM}], temperature=0, response_format=schema)

errors = {}
for name, arguments in {
    "unknown model": {"model": "nobody", "messages": messages},
    "wrong value": {"model": MODEL, "messages": [{"role": "user", "content": WORD}], "temperature": 9},
}.items():
    try:
        ask(**arguments)
    except openai.APIStatusError as error:
        errors[name] = [error.status_code, type(error).__name__, error.code, error.param]

cancelled = ask(model=MODEL, messages=[{"role": "user", "content": WORD}], stream=True)
next(iter(cancelled))
cancelled.close()
report(
    chat=chat.choices[0].message.content,
    stream=streamed,
    call=first.message.tool_calls[0].function.arguments if first.message.tool_calls else None,
    finish=first.finish_reason,
    after_call=second.message.content,
    structured=json.loads(structured.choices[0].message.content),
    errors=errors,
    cancelled=True,
)
