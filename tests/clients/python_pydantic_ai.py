"""pydantic-ai: an agent with a tool, and structured output, over both APIs."""

import asyncio

from common import BASE_URL, MODEL, SUM, WORD, calculate, report
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Calculation(BaseModel):
    expression: str


calls: list[str] = []


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    calls.append(expression)
    return calculate(expression)


async def main() -> None:
    provider = OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none")
    found = {}
    for kind, model_class in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
        model = model_class(MODEL, provider=provider, settings={"temperature": 0})
        plain, agent = Agent(model), Agent(model, tools=[calculator])
        calls.clear()
        async with plain.run_stream(WORD) as stream:
            streamed = [delta async for delta in stream.stream_text(delta=True)]
        found[kind] = {
            "chat": (await plain.run(WORD)).output,
            "stream": "".join(streamed),
            "after_call": (await agent.run(SUM)).output,
            "calls": list(calls),
            "structured": (await Agent(model, output_type=NativeOutput(Calculation)).run(SUM)).output.model_dump(),
            "forced": (await Agent(model, output_type=Calculation).run(SUM)).output.model_dump(),
        }
    report(**found)


asyncio.run(main())
