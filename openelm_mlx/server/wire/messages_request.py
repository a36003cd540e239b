"""What a request of Anthropic's messages may have, and the generation that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ...files import shown
from ...text.schema import Tool
from ..bodies import WholeNumber, Wire
from ..call_reasoning import CallReasoning
from ..failures import ApiError, bad_request
from ..generation import AnswerSchema, Effort, GenerationRequest, NamedTool, ToolChoice
from .functions import function_of
from .messages_content import chat
from .sampling import SamplingFields, sampling_params
from .shared import EFFORTS, StopStrings, stops_of

# Budgets from which on the effort is medium, and high.
_MEDIUM_BUDGET, _HIGH_BUDGET = 8_000, 24_000


class Thinking(Wire):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: WholeNumber | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokens(Wire):
    """`POST /v1/messages/count_tokens`: the part of a request that makes its prompt."""

    model: str
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where it was before output_config


class CreateMessage(CountTokens, SamplingFields):
    """`POST /v1/messages`."""

    max_tokens: Annotated[WholeNumber, Field(ge=1)]
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None


def shows_thinking(body: CountTokens) -> Literal["shown", "sealed", "hidden"]:
    """Whether the answer has thinking blocks. Clients that did not ask for them take the first block for the answer.

    sealed: blocks without their text, for the client to send back.
    """
    if body.thinking is None or body.thinking.type == "disabled":
        return "hidden"
    return "sealed" if body.thinking.display == "omitted" else "shown"


def prompt_request(body: CountTokens, known: CallReasoning) -> GenerationRequest:
    """The request for the prompt. known: reasoning that was not shown, by the calls it led to. Raises ApiError."""
    tools, lenient = _tools(body.tools or [])
    choice, is_parallel = _choice(body.tool_choice, tools)
    config = body.output_config
    form = body.output_format if config is None or config.format is None else config.format
    return GenerationRequest(
        model=body.model,
        messages=chat(body.system, body.messages, known),
        tools=tools,
        lenient_tools=lenient,
        tool_choice=choice,
        answer_schema=None if form is None else AnswerSchema(form.schema_),
        reasoning_effort=_effort(body, has_tools=bool(tools)),
        parallel_tool_calls=is_parallel,
    )


def generation_request(body: CreateMessage, known: CallReasoning) -> GenerationRequest:
    """The whole request. Raises ApiError."""
    return replace(
        prompt_request(body, known),
        sampling=sampling_params(body),
        max_tokens=body.max_tokens,
        stop=stops_of(body.stop_sequences, "stop_sequences"),
    )


def _effort(body: CountTokens, has_tools: bool) -> Effort | None:
    """gpt-oss was trained with three efforts. With tools it cannot do without reasoning: a call needs its channel."""
    thinking, config = body.thinking, body.output_config
    if thinking is not None and thinking.type == "disabled":
        return "low" if has_tools else "none"
    if config is not None and config.effort is not None:
        return EFFORTS[config.effort]
    if thinking is not None and thinking.budget_tokens is not None:
        budget = thinking.budget_tokens
        return "low" if budget < _MEDIUM_BUDGET else "medium" if budget < _HIGH_BUDGET else "high"
    return None


def _tools(definitions: list[Any]) -> tuple[tuple[Tool, ...], frozenset[str]]:
    """The client's own tools, and those of them whose schemas need not be enforced.

    Tools with a type of Anthropic's (web_search_20250305, bash_20250124, ...) have no schema: they are left out.
    """
    tools: dict[str, Tool] = {}
    lenient = set()
    for number, definition in enumerate(definitions):
        place = f"tools[{number}]"
        if not isinstance(definition, Mapping):
            raise bad_request(f"{place} is {shown(definition)}: it should be an object.", place)
        if definition.get("type") not in (None, "custom"):
            continue
        for key in ("name", "input_schema"):
            if definition.get(key) is None:
                raise bad_request(f"{place}.{key} is missing.", f"{place}.{key}", "missing_required_parameter")
        description, schema = definition.get("description"), definition["input_schema"]
        tool = function_of(definition["name"], description, schema, place, "input_schema")
        if tool.name in tools:
            raise bad_request(f"Two tools are called {shown(tool.name)}: rename one of them.", f"{place}.name")
        tools[tool.name] = tool
        if definition.get("strict") is not True:
            lenient.add(tool.name)
    return tuple(tools.values()), frozenset(lenient)


def _choice(given: Mapping[str, Any] | None, tools: tuple[Tool, ...]) -> tuple[ToolChoice, bool]:
    """tool_choice, and whether several calls at once are allowed."""
    if given is None:
        return "auto", True
    kind, is_parallel = given.get("type"), given.get("disable_parallel_tool_use") is not True
    if kind in ("auto", "none"):
        return kind, is_parallel
    if kind == "any":
        if not tools:
            raise bad_request("tool_choice asks for a call, and there is no tool to call: give tools.", "tool_choice")
        return "required", is_parallel
    if kind == "tool":
        name = given.get("name")
        if name not in [tool.name for tool in tools]:
            raise ApiError(
                400, f"tool_choice names {shown(name)}, which is not among the tools.", param="tool_choice.name"
            )
        return NamedTool(str(name)), is_parallel
    raise bad_request(
        f'tool_choice.type is {shown(kind)}: it should be "auto", "any", "tool" or "none".', "tool_choice.type"
    )
