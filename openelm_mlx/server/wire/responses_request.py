"""What a Responses request may have, and the generation that it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ..bodies import WholeNumber, Wire
from ..failures import ApiError, bad_request
from ..generation import AnswerSchema, GenerationRequest
from .responses_items import ADDITIONAL_TOOLS, Item, chat
from .responses_tools import Tools, read_tools
from .sampling import SamplingFields, sampling_params
from .shared import EFFORTS, StopField, stops_of

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"


class ReasoningConfig(Wire):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Wire):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CountTokens(Wire):
    """The part of a request that makes its prompt."""

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None


class CreateResponse(CountTokens, SamplingFields):
    """`POST /v1/responses`."""

    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: Annotated[WholeNumber, Field(ge=1)] | None = None
    max_tool_calls: WholeNumber | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    top_logprobs: Annotated[WholeNumber, Field(ge=0, le=20)] | None = None
    user: str | None = None
    stop: StopField = None  # not OpenAI's here, but some clients send it


def check_offered(body: CountTokens) -> None:
    """Raise ApiError for what this server does not have, with what to do instead."""
    if body.conversation is not None:
        raise _not_offered("conversation", "conversations are not kept here: use previous_response_id")
    if body.prompt is not None:
        raise _not_offered("prompt", "prompt templates are kept by OpenAI only: send instructions and input")
    if isinstance(body, CreateResponse) and body.background:
        reason = "an answer ends when its client goes away: leave background out, and use stream"
        raise _not_offered("background", reason)
    if body.input is None and body.previous_response_id is None:
        raise bad_request("input is missing.", "input", "missing_required_parameter")


def _not_offered(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param} is not offered: {reason}.", param=param, code="unsupported_parameter")


def tools_of(body: CountTokens, items: Iterable[Item]) -> Tools:
    """The tools of the request, and those that items of its conversation bring."""
    definitions = [(f"tools[{number}]", tool) for number, tool in enumerate(body.tools or ())]
    for item in items:
        if item["type"] == ADDITIONAL_TOOLS:
            definitions += [(f"input.tools[{number}]", tool) for number, tool in enumerate(item["tools"])]
    return read_tools(definitions, body.tool_choice)


def prompt_request(body: CountTokens, items: list[Item], tools: Tools) -> GenerationRequest:
    """The request whose prompt these items are."""
    effort = None if body.reasoning is None or body.reasoning.effort is None else EFFORTS[body.reasoning.effort]
    return GenerationRequest(
        model=body.model,
        messages=chat(body.instructions, items, tools),
        tools=tools.functions,
        lenient_tools=tools.lenient,
        tool_choice=tools.choice,
        answer_schema=_schema(body.text),
        reasoning_effort=effort,
        may_forget=body.truncation == "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )


def _schema(text: TextConfig | None) -> AnswerSchema | None:
    form = None if text is None else text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return AnswerSchema({"type": "object"})
    for key, value in (("name", form.name), ("schema", form.schema_)):
        if value is None:
            param = f"text.format.{key}"
            raise bad_request(f"{param} is missing.", param, "missing_required_parameter")
    return AnswerSchema(form.schema_ or {}, form.name or "answer", form.description)


def generation_request(body: CreateResponse, items: list[Item], tools: Tools) -> GenerationRequest:
    """The whole request. Raises ApiError."""
    return replace(
        prompt_request(body, items, tools),
        sampling=sampling_params(body),
        max_tokens=body.max_output_tokens,
        stop=stops_of(body.stop),
        logprobs=wanted_logprobs(body),
    )


def wanted_logprobs(body: CreateResponse) -> int | None:
    """How many likely tokens each token of a message comes with; None: messages have no log-probabilities."""
    if body.top_logprobs or LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    return None
