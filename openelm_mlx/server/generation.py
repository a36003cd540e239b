"""A request to a model, without the words of any API, and its answers as a stream of parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ..decoding.grammar import AnswerFormat
from ..decoding.sampling import SamplingParams
from ..text.conversation import Message
from ..text.schema import Tool, ToolNamespace
from .parts import Answer, AnswerBuilder, Part, TokenLogprob

Effort = Literal["none", "low", "medium", "high"]


@dataclass(frozen=True)
class NamedTool:
    """tool_choice: this function has to be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


@dataclass(frozen=True)
class AnswerSchema:
    """The JSON Schema of an answer. schema: {"type": "object"} where any object will do (json_object)."""

    schema: Mapping[str, Any]
    name: str = "answer"
    description: str | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """What an API asks of a model.

    Attributes:
        model: A name that the registry knows.
        messages: Chat dicts as text/openai_chat.py reads them (reasoning, tool_calls, results of tools), or, for gpt-oss, what
            it wrote before.
        prompts: Instead of messages: texts, or tokens, that the model goes on with, without a template. Each has n answers,
            the first n of the answers are the first one's.
        tools: Functions that may be called. lenient_tools: names of those whose schema need not be enforced where the
            engine cannot follow it; others are then refused.
        built_in: Tools that may be called beside them, of those that gpt-oss was trained with.
        tool_formats: Formats of calls' arguments that are known already, by the whole name of the tool.
        answer_schema: What the answer has to be. Reasoning stays free.
        max_tokens: For reasoning and answer together; None: the model's own limit.
        logprobs: How many likely tokens are told with each token of the answer; None: no log-probabilities.
        prompt_logprobs: The same for the tokens of prompts.
        n: How many answers to a prompt. With a seed, they have seed, seed + 1, ...
        reasoning_effort: "none", "low", "medium", "high", or None for the model's own.
        may_forget: Whether the oldest turns of messages that are longer than the context are left out.
        parallel_tool_calls: Taken, and without effect: gpt-oss makes one call a turn.
    """

    model: str
    messages: Sequence[Mapping[str, Any] | Message] | None = None
    prompts: Sequence[str | Sequence[int]] = ()
    tools: tuple[Tool, ...] = ()
    lenient_tools: frozenset[str] = frozenset()
    built_in: tuple[ToolNamespace, ...] = ()
    tool_formats: Mapping[str, AnswerFormat] = field(default_factory=dict)
    tool_choice: ToolChoice = "auto"
    answer_schema: AnswerSchema | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    reasoning_effort: Effort | None = None
    may_forget: bool = False
    parallel_tool_calls: bool = True


class Progress(NamedTuple):
    """How far a request is that has no text yet. place: how many are before it in the queue; None: it is computed."""

    place: int | None
    prompt_tokens_done: int
    prompt_tokens: int


class PromptText(NamedTuple):
    """A prompt of a request as the model read it. first: its first token, before which there was nothing.

    scored: the tokens after it, where their log-probabilities were asked for. A token that only says where a text begins is
    in neither.
    """

    text: str
    first: str | None = None
    scored: tuple[TokenLogprob, ...] = ()


class Generation(Protocol):
    """The running answers to one request.

        async with await generations.start(request) as generation:
            async for parts in generation.batches():
                ...

    Leaving the block cancels what still runs; its memory is free within one step of the engine. A failure is raised as
    ApiError by whoever waits for parts.
    """

    prompt_tokens: int

    def batches(self, every: float | None = None) -> AsyncIterator[list[Part]]:
        """All parts that are there, as soon as there is one; an empty list where none came for `every` seconds."""

    def progress(self) -> Progress:
        """How far the prompt is."""

    def prompt_texts(self) -> list[PromptText]:
        """The request's `prompts`; with their log-probabilities once there are parts."""

    def written(self) -> list[Message]:
        """The one answer as gpt-oss wrote it, message by message, when it has finished. For a thread: it may take a while."""

    async def __aenter__(self) -> Generation:
        """The generation itself."""

    async def __aexit__(self, *_: object) -> None:
        """Cancel what still runs."""


class Generations(Protocol):
    """Where requests are answered: the models of a registry, or a script in tests."""

    async def start(self, request: GenerationRequest) -> Generation:
        """Submit a request. Raises ApiError for what is wrong with it."""

    async def count_tokens(self, request: GenerationRequest) -> int:
        """The tokens of its prompt. Raises ApiError."""


async def collected(generation: Generation) -> list[Answer]:
    """The whole answers, waited for."""
    builder = AnswerBuilder()
    async for parts in generation.batches():
        for part in parts:
            builder.add(part)
    return builder.answers
