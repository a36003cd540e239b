"""LiteLLM: chat, stream, tools, reasoning, errors by their status."""

import json

import litellm
from common import BASE_URL, CALCULATOR, MODEL, SUM, WORD, calculate, report

litellm.telemetry = False
TOOLS = [
    {"type": "function", "function": {"name": "calculator", "description": calculate.__doc__, "parameters": CALCULATOR}}
]


def ask(messages: list, model: str = MODEL, **options: object) -> object:
    return litellm.completion(
        model=f"openai/{model}", api_base=f"{BASE_URL}/v1", api_key="none", messages=messages, temperature=0,
        num_retries=0, **options,
    )  # fmt: skip


chat = ask([{"role": "user", "content": WORD}]).choices[0].message
streamed = "".join(
    chunk.choices[0].delta.content or "" for chunk in ask([{"role": "user", "content": WORD}], stream=True)
)
messages = [{"role": "user", "content": SUM}]
first = ask(messages, tools=TOOLS).choices[0].message
messages.append(first.model_dump(exclude_none=True))
for call in first.tool_calls or ():
    result = calculate(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
second = ask(messages, tools=TOOLS).choices[0].message
try:
    ask([{"role": "user", "content": WORD}], model="nobody")
    error = None
except litellm.NotFoundError as found:
    error = [type(found).__name__, found.status_code]
report(
    chat=chat.content,
    reasoning=getattr(chat, "reasoning_content", None),
    stream=streamed,
    call=first.tool_calls[0].function.arguments if first.tool_calls else None,
    after_call=second.content,
    errors={"unknown model": error},
)
