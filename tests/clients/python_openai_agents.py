"""openai-agents: an agent with a function tool, over Responses and over Chat Completions."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import BASE_URL, MODEL, SUM, WORD, calculate, report
from openai import AsyncOpenAI

set_tracing_disabled(True)
calls: list[str] = []


@function_tool
def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    calls.append(expression)
    return calculate(expression)


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0)
    found = {}
    for kind, model_class in (("responses", OpenAIResponsesModel), ("chat", OpenAIChatCompletionsModel)):
        model = model_class(model=MODEL, openai_client=client)
        plain = Agent(name="words", model=model, model_settings=ModelSettings(temperature=0))
        result = await Runner.run(plain, WORD)
        calls.clear()
        agent = Agent(name="sums", model=model, tools=[calculator], model_settings=ModelSettings(temperature=0))
        summed = await Runner.run(agent, SUM, max_turns=4)
        streamed = Runner.run_streamed(plain, WORD)
        deltas = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        found[kind] = {
            "chat": result.final_output, "calls": list(calls), "after_call": summed.final_output, "stream": "".join(deltas),
        }  # fmt: skip
    report(**found)


asyncio.run(main())
