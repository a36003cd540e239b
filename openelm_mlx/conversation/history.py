"""Which messages a conversation keeps: dropping the oldest turns, and what remains of an interrupted turn.

A turn begins with a user's message and ends before the next one, so a call and its result are never separated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..text.conversation import Message

INTERRUPTED = "Error: the user interrupted this call. What it had done until then may be done."
NOT_RUN = "Error: the user interrupted the turn before this call was run."
LEFT_OUT = "[This result is left out: the context is full.]"

_KEPT_ROLES = ("system", "developer")


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where each turn begins."""
    return [i for i, message in enumerate(messages) if message.role == "user"]


def without_oldest(messages: Sequence[Message], num_turns: int) -> list[Message]:
    """`messages` without the first turns. Instructions, and messages before the first turn, are kept."""
    starts = turn_starts(messages)
    if not num_turns or not starts:
        return list(messages)
    begin, end = starts[0], (*starts, len(messages))[num_turns]
    instructing = [message for message in messages[begin:end] if message.role in _KEPT_ROLES]
    return [*messages[:begin], *instructing, *messages[end:]]


def fewest_to_forget(messages: Sequence[Message], most_tokens: int, count: Callable[[Sequence[Message]], int]) -> int:
    """How many of the oldest turns to drop until `count` of the rest is at most `most_tokens`; never the last turn."""
    low, high = 0, max(0, len(turn_starts(messages)) - 1)
    while low < high:
        middle = (low + high) // 2
        if count(without_oldest(messages, middle)) <= most_tokens:
            high = middle
        else:
            low = middle + 1
    return low


def settled(turn: Sequence[Message], num_begun: int) -> list[Message]:
    """The messages of a turn that are kept, its question first, however it ended.

    num_begun: how many of its calls, which run in order, have begun. A tool may have changed something, so the model has to
    know: if any has begun, all calls are kept, and those without a result get one that says that they were interrupted.
    Otherwise calls are dropped, and so is a question without an answer: it would be answered along with the next one.
    """
    calls = [message for message in turn if message.is_call]
    num_results = sum(message.role == "tool" for message in turn)
    is_answered = any(is_answer(message) for message in turn)
    if not num_begun:
        return [message for message in turn if not message.is_call] if is_answered else []
    results = [
        result_of(call, INTERRUPTED if number < num_begun else NOT_RUN)
        for number, call in enumerate(calls)
        if number >= num_results
    ]
    kept = [*turn, *results]
    if is_answered and is_answer(kept[-1]):
        return kept
    # The model would take reasoning without an answer for a turn that is still going on.
    return [message for message in kept if message.channel != "analysis" or message.is_call or message.role == "tool"]


def cut_off(messages: Sequence[Message]) -> list[Message]:
    """The messages kept of an interrupted completion: the part of the answer that the user has seen."""
    return [
        m for m in messages if m.role == "assistant" and m.channel != "analysis" and not m.is_call and m.text.strip()
    ]


def result_of(call: Message, text: str) -> Message:
    """The result of a call, as a message."""
    assert call.recipient is not None
    return Message("tool", text, call.recipient, call.channel, "assistant")


def without_old_results(turn: Sequence[Message]) -> list[Message]:
    """A turn with all tool results but the last replaced by a short notice, unless they are shorter."""
    last = max((i for i, message in enumerate(turn) if message.role == "tool"), default=0)
    return [
        replace(message, content=LEFT_OUT)
        if message.role == "tool" and i < last and len(message.text) > len(LEFT_OUT)
        else message
        for i, message in enumerate(turn)
    ]


def is_answer(message: Message) -> bool:
    """Whether the message is an answer to the user."""
    return message.role == "assistant" and message.channel == "final" and bool(message.text.strip())
