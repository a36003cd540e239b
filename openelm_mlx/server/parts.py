"""What an answer is made of: one vocabulary for all APIs, without the words of any.

An answer is a row of items: reasoning, messages, calls of functions. One item is open at a time, so the parts of one
answer come as ItemStarted, ItemText (any number), ItemDone, for each item, and then one Finished. With several answers to
a request (`index`), the parts of one mix with those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["reasoning", "message", "call"]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the answer and its log-probability. bytes: its own; they may be a part of a character.

    top: the likeliest tokens at its place, best first; the chosen one need not be among them.
    """

    token: str
    logprob: float
    bytes: list[int]
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. completion_tokens includes reasoning, calls and the format's own tokens.

    cached_tokens: of the prompt, not computed again. reasoning_tokens: of the completion.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class ItemStarted:
    """name: of the function that is called, as the client defined it; None in other items.

    is_preamble: a message on the commentary channel, which gpt-oss writes before a call. It is a message of its own, and
    has no format: OpenAI's client reads every message as JSON that is not marked as such.
    """

    index: int
    kind: Kind
    name: str | None = None
    is_preamble: bool = False


@dataclass(frozen=True, slots=True)
class ItemText:
    """More of the open item: reasoning, text of the message, or JSON text of the call's arguments. It is never empty."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ItemDone:
    """The open item's whole text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last part of an answer. stop_string: which one ended it, if one did."""

    index: int
    reason: FinishReason
    stop_string: str | None
    usage: Usage


Part = ItemStarted | ItemText | ItemDone | Finished


@dataclass
class Item:
    """A finished item."""

    kind: Kind
    name: str | None
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Answer:
    """A whole answer."""

    index: int
    items: list[Item]
    reason: FinishReason
    stop_string: str | None
    usage: Usage


class AnswerBuilder:
    """Puts the parts of any number of answers together: streamed and whole answers are made of the same parts."""

    def __init__(self) -> None:
        self._items: dict[int, list[Item]] = {}
        self._finished: dict[int, Finished] = {}

    def add(self, part: Part) -> None:
        items = self._items.setdefault(part.index, [])
        if isinstance(part, ItemStarted):
            items.append(Item(part.kind, part.name, ""))
        elif isinstance(part, ItemText):
            items[-1].logprobs.extend(part.logprobs)
        elif isinstance(part, ItemDone):
            items[-1].text = part.text
        else:
            self._finished[part.index] = part

    @property
    def answers(self) -> list[Answer]:
        """Those that have finished, by index."""
        return [
            Answer(index, self._items[index], end.reason, end.stop_string, end.usage)
            for index, end in sorted(self._finished.items())
        ]


def whole_usage(usages: Sequence[Usage], n: int) -> Usage:
    """The usage of a request, from those of its answers, n to each prompt: a prompt counts once."""
    firsts = usages[::n]
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in firsts),
        cached_tokens=sum(each.cached_tokens for each in firsts),
        completion_tokens=sum(each.completion_tokens for each in usages),
        reasoning_tokens=sum(each.reasoning_tokens for each in usages),
    )
