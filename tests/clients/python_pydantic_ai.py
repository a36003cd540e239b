"""pydantic-ai: an agent with a tool, and structured output, over both APIs and over Anthropic's."""

import asyncio

from common import BASE_URL, MODEL, SUM, WORD, calculate, report
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Calculation(BaseModel):
    expression: str


async def main() -> None:
    openai, anthropic = (
        OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none"),
        AnthropicProvider(base_url=BASE_URL, api_key="none"),
    )
    models = {
        "chat": OpenAIChatModel(MODEL, provider=openai),
        "responses": OpenAIResponsesModel(MODEL, provider=openai),
        "anthropic": AnthropicModel(MODEL, provider=anthropic),
    }
    found = {}
    for kind, model in models.items():
        calls: list[str] = []
        plain = Agent(model, model_settings={"temperature": 0})
        agent = Agent(model, model_settings={"temperature": 0})

        @agent.tool_plain
        def calculator(expression: str, calls: list[str] = calls) -> str:
            """Evaluates an arithmetic expression."""
            calls.append(expression)
            return calculate(expression)

        async with plain.run_stream(WORD) as stream:
            streamed = [delta async for delta in stream.stream_text(delta=True)]
        found[kind] = {
            "chat": (await plain.run(WORD)).output,
            "stream": "".join(streamed),
            "after_call": (await agent.run(SUM)).output,
            "calls": calls,
        }
        if kind != "anthropic":
            native = Agent(model, output_type=NativeOutput(Calculation), model_settings={"temperature": 0})
            forced = Agent(model, output_type=Calculation, model_settings={"temperature": 0})
            found[kind]["structured"] = (await native.run(SUM)).output.model_dump()
            found[kind]["forced"] = (await forced.run(SUM)).output.model_dump()
    report(**found)


asyncio.run(main())
