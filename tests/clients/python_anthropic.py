"""The anthropic package: Messages."""

import anthropic
from common import BASE_URL, CALCULATOR, MODEL, SUM, WORD, calculate, report

client = anthropic.Anthropic(base_url=BASE_URL, api_key="none", max_retries=0)
GREEDY = {"temperature": 0}  # which the package itself has given up
TOOLS = [{"name": "calculator", "description": calculate.__doc__, "input_schema": CALCULATOR}]


def ask(messages: list, **options: object) -> anthropic.types.Message:
    return client.messages.create(model=MODEL, max_tokens=400, messages=messages, extra_body=GREEDY, **options)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


chat = ask([{"role": "user", "content": WORD}])
with client.messages.stream(
    model=MODEL, max_tokens=400, messages=[{"role": "user", "content": WORD}], extra_body=GREEDY
) as stream:
    streamed = "".join(stream.text_stream)

messages = [{"role": "user", "content": SUM}]
first = ask(messages, tools=TOOLS)
calls = [block for block in first.content if block.type == "tool_use"]
messages.append({"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]})
results = [{"type": "tool_result", "tool_use_id": call.id, "content": calculate(**call.input)} for call in calls]
messages.append({"role": "user", "content": results})
second = ask(messages, tools=TOOLS)
errors = {}
try:
    client.messages.create(model="nobody", max_tokens=4, messages=messages[:1])
except anthropic.APIStatusError as error:
    errors["unknown model"] = [error.status_code, type(error).__name__, error.body["error"]["type"]]
count = client.messages.count_tokens(model=MODEL, messages=messages[:1]).input_tokens
with client.messages.stream(model=MODEL, max_tokens=400, messages=[{"role": "user", "content": WORD}]) as cancelled:
    next(iter(cancelled))
report(
    chat=text_of(chat),
    stream=streamed,
    call=calls[0].input if calls else None,
    finish=first.stop_reason,
    after_call=text_of(second),
    errors=errors,
    count=count,
    cancelled=True,
)
