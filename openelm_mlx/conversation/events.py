"""The events of a turn, as a caller sees them: reasoning, tool calls, results, the answer, the end."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.statistics import Statistics


@dataclass(frozen=True)
class Reasoning:
    """A piece of the model's reasoning, which a user is shown only on request."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model calls a tool. A piece of its arguments as it is written, or, with is_done, all of them."""

    name: str
    arguments: str
    is_done: bool = False


@dataclass(frozen=True)
class ToolResult:
    """A tool's result, as the model gets it."""

    name: str
    text: str
    is_error: bool = False


@dataclass(frozen=True)
class Answer:
    """A piece of the answer. is_preamble: said to the user before a tool call, and not the answer itself."""

    text: str
    is_preamble: bool = False


@dataclass(frozen=True)
class Notice:
    """A sentence about the conversation itself, for instance that its oldest part no longer fits.

    is_no_answer: it says why no answer came; `Done`, which follows, has it too.
    """

    text: str
    is_no_answer: bool = False


@dataclass(frozen=True)
class Done:
    """The end of a turn. finish_reason: "stop", "length" (max_tokens, or the context is full), "time" or "rounds".

    statistics: of the last of the turn's completions. num_tokens: of all of them together. no_answer: None, or a sentence
    that says why no answer came and what to change.
    """

    finish_reason: str
    statistics: Statistics | None
    num_tokens: int
    num_calls: int
    no_answer: str | None = None


Event = Reasoning | ToolCall | ToolResult | Answer | Notice | Done
