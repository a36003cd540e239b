"""The openai package: Responses, with previous_response_id and the streaming helper."""

import json

import openai
from common import BASE_URL, CALCULATION, CALCULATOR, MODEL, SUM, WORD, calculate, report

client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0)
ask = client.responses.create
TOOLS = [
    {
        "type": "function",
        "name": "calculator",
        "description": calculate.__doc__,
        "parameters": CALCULATOR,
        "strict": True,
    }
]

chat = ask(model=MODEL, input=WORD, temperature=0)
with client.responses.stream(model=MODEL, input=WORD, temperature=0) as stream:
    streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    whole = stream.get_final_response().output_text

first = ask(model=MODEL, input=SUM, tools=TOOLS, temperature=0)
calls = [item for item in first.output if item.type == "function_call"]
results = [
    {"type": "function_call_output", "call_id": call.call_id, "output": calculate(**json.loads(call.arguments))}
    for call in calls
]
second = ask(model=MODEL, input=results, previous_response_id=first.id, tools=TOOLS, temperature=0)
schema = {"format": {"type": "json_schema", "name": "calculation", "schema": CALCULATION, "strict": True}}
structured = ask(model=MODEL, input=SUM, temperature=0, text=schema)
errors = {}
for name, arguments in {
    "unknown model": {"model": "nobody", "input": WORD},
    "unknown response": {"model": MODEL, "input": WORD, "previous_response_id": "resp_nobody"},
}.items():
    try:
        ask(**arguments)
    except openai.APIStatusError as error:
        errors[name] = [error.status_code, type(error).__name__, error.code, error.param]
cancelled = ask(model=MODEL, input=WORD, stream=True)
next(iter(cancelled))
cancelled.close()
report(
    chat=chat.output_text,
    stream=streamed,
    stream_whole=whole,
    call=calls[0].arguments if calls else None,
    after_call=second.output_text,
    structured=json.loads(structured.output_text),
    errors=errors,
    cancelled=True,
)
