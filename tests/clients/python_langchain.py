"""langchain-openai: invoke, stream, tools, structured output, over both APIs."""

from common import BASE_URL, CALCULATION, MODEL, SUM, WORD, calculate, report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    return calculate(expression)


found = {}
for kind, uses_responses in (("chat", False), ("responses", True)):
    model = ChatOpenAI(
        model=MODEL,
        base_url=f"{BASE_URL}/v1",
        api_key="none",
        temperature=0,
        max_retries=0,
        use_responses_api=uses_responses,
    )
    with_tools = model.bind_tools([calculator])
    messages = [HumanMessage(SUM)]
    first = with_tools.invoke(messages)
    messages.append(first)
    for call in first.tool_calls:
        messages.append(ToolMessage(calculate(**call["args"]), tool_call_id=call["id"]))
    forced = model.bind_tools([calculator], tool_choice="calculator").invoke(WORD)
    found[kind] = {
        "chat": model.invoke(WORD).text,
        "stream": "".join(chunk.text for chunk in model.stream(WORD)),
        "call": first.tool_calls[0]["args"] if first.tool_calls else None,
        "after_call": with_tools.invoke(messages).text,
        "forced": [call["name"] for call in forced.tool_calls],
        "structured": model.with_structured_output(CALCULATION, method="json_schema").invoke(SUM),
    }
report(**found)
