"""Chats that are longer than a model's context: without their oldest turns, where the client asked for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..text.conversation import Message

Messages = Sequence[Mapping[str, Any] | Message]

_INSTRUCTING = ("system", "developer")
# Room for an answer without a limit, and the part of the context that is kept for any answer at most.
_USUAL_ANSWER, _MOST_OF_CONTEXT = 1024, 4


def most_prompt_tokens(context_length: int, max_tokens: int | None) -> int:
    """How long a prompt may be so that its answer has room."""
    return context_length - max(1, min(max_tokens or _USUAL_ANSWER, context_length // _MOST_OF_CONTEXT))


def shortened(messages: Messages, most_tokens: int, count: Callable[[Messages], int]) -> Messages:
    """The messages without as many of the oldest turns as it takes until `count` of them is at most `most_tokens`.

    A turn begins with a message of the user, so that calls and their results stay together. Instructions are kept, and so
    is the last turn, however long it is.
    """
    starts = [place for place, message in enumerate(messages) if _role(message) == "user"]
    low, high = 0, max(0, len(starts) - 1)
    if not high or count(messages) <= most_tokens:
        return messages
    low = 1
    while low < high:
        middle = (low + high) // 2
        if count(_without(messages, starts[0], starts[middle])) <= most_tokens:
            high = middle
        else:
            low = middle + 1
    return _without(messages, starts[0], starts[low])


def _without(messages: Messages, begin: int, end: int) -> Messages:
    kept = [message for message in messages[begin:end] if _role(message) in _INSTRUCTING]
    return [*messages[:begin], *kept, *messages[end:]]


def _role(message: Mapping[str, Any] | Message) -> Any:
    return message.role if isinstance(message, Message) else message.get("role")
