"""One turn of a conversation: its limits, its messages, and which of them are kept, however it ends."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..decoding.prefix_cache import PrefixCache
from ..decoding.sampling import SamplingParams
from ..engine.sequence import Chunk, Sequence
from ..engine.single import new_sequence, run
from ..engine.statistics import Statistics
from ..text.conversation import Message
from .history import (
    cut_off,
    is_answer,
    settled,
)

if TYPE_CHECKING:
    from ..models import Model
    from ..text.tokenizer import Tokenizer
from .events import Answer, Done, Event, Reasoning, ToolCall


class Conversation(Protocol):
    """What a turn needs from its chat."""

    model: Model
    sampling: SamplingParams | None
    max_tokens: int | None
    max_rounds: int
    time_limit: float | None
    options: dict[str, Any]
    prefix_cache: PrefixCache | None
    messages: list[Message]
    is_harmony: bool
    tool_schemas: dict[str, Mapping[str, Any]]
    turn: Turn | None

    @property
    def any_tokenizer(self) -> Tokenizer:
        """The tokenizer, which a chat always has."""

    def harmony_prompt(self, messages: abc.Sequence[Message]) -> list[int]:
        """The prompt for the next completion after these messages."""


class Turn:
    """The current turn: its limits, its messages, and which of them are kept in the chat's history.

    An interruption may come between any two steps. So the messages are one value, replaced at once, and `settle` makes the
    history from it, however often it is called.
    """

    def __init__(self, chat: Conversation, question: Message) -> None:
        self.chat = chat
        self.started = time.monotonic()
        self.ended_by: str | None = None
        self.filled_context = False
        self.statistics: Statistics | None = None
        self.num_tokens = self.num_rounds = self.num_begun = 0
        self.said = ""  # OpenELM's answer so far
        # The messages, and the completion that is being written.
        self._state: tuple[list[Message], Sequence | None] = ([question], None)
        self._own: dict[
            int, Message
        ] = {}  # every message of this turn that was ever in the chat's history, by identity
        self._is_settled = self._is_answered = False
        # Restores older turns that were dropped for this one, in case nothing of this one is kept.
        self.bring_back: Callable[[], None] | None = None

    @property
    def messages(self) -> list[Message]:
        """The messages of the turn, the question first, without the unfinished one."""
        return self._state[0]

    @property
    def others(self) -> list[Message]:
        """The messages of the chat's history that are not of this turn."""
        return [message for message in self.chat.messages if id(message) not in self._own]

    @property
    def num_messages(self) -> int:
        return len(self.messages)

    @property
    def num_left(self) -> int | None:
        """How many tokens the turn may still generate; None: no limit."""
        return None if self.chat.max_tokens is None else self.chat.max_tokens - self.num_tokens

    def add(self, messages: list[Message]) -> None:
        self.replace([*self.messages, *messages])

    def replace(self, messages: list[Message]) -> None:
        self._state = (messages, None)
        self.publish()

    def take_back(self, num_messages: int) -> None:
        """Return to the state with the first `num_messages` messages."""
        self.ended_by, self.filled_context = None, False
        self.replace(self.messages[:num_messages])

    def has_said_more_than(self, num_messages: int) -> bool:
        """Whether the user has seen something, or a call was written, after the first messages."""
        return bool(cut_off(self.messages[num_messages:]))

    def publish(self, messages: list[Message] | None = None) -> None:
        """Put the turn's messages into the chat's history."""
        messages = self.messages if messages is None else messages
        self._own.update({id(message): message for message in messages})
        self.chat.messages[:] = self.others + messages

    def settle(self) -> None:
        """Leave in the history only the messages that are kept."""
        if self._is_settled or not self._own or self.chat.turn is not self:
            return
        messages, sequence = self._state
        if sequence is not None:  # the iterator was closed, or an error occurred: this completion ends here
            sequence.close()
            messages = [*messages, *cut_off(sequence.messages)]
        if self.said.strip():
            messages = [*messages, Message("assistant", self.said.strip(), channel="final")]
        kept = settled(messages, self.num_begun)
        self.publish(kept)
        if not kept and self.bring_back is not None:
            self.bring_back()
        self._is_answered = any(is_answer(message) for message in kept)
        self._is_settled = True

    def completion(self) -> Iterator[Event]:
        """Run one completion of gpt-oss and yield its events; its messages are added to the turn."""
        sequence = self.begin(self.chat.harmony_prompt(self.chat.messages))
        if sequence is None:
            return
        self._state = (self.messages, sequence)
        self.num_rounds += 1
        for chunk in self.chunks(sequence):
            yield from shown_as_events(chunk)
        sequence.close()
        # Messages of other roles were invented by the model.
        messages = [message for message in sequence.messages if message.role == "assistant"]
        self.add(messages if self.ended_by is None else cut_off(messages))

    def begin(self, prompt: list[int]) -> Sequence | None:
        """Start the next completion of the turn; None if the turn may not generate more tokens."""
        chat, room = self.chat, self.num_left
        if room is not None and room < 1:
            self.ended_by = "length"
            return None
        options = {"sampling": chat.sampling, "prefix_cache": chat.prefix_cache, **chat.options}
        if chat.is_harmony and chat.tool_schemas:
            options["tool_schemas"] = chat.tool_schemas  # so that calls always parse
        if room is None and not chat.is_harmony:
            room = chat.model.context_length
        return new_sequence(chat.model, chat.any_tokenizer, prompt, max_tokens=room, **options)

    def chunks(self, sequence: Sequence) -> Iterator[Chunk]:
        """The tokens of one completion, until a limit of the turn ends it."""
        chat, room = self.chat, sequence.request.max_tokens
        for chunk in run(chat.model, chat.any_tokenizer, sequence):
            self.num_tokens += 1
            if chunk.finish_reason is not None:
                self.statistics = chunk.statistics
                self.ended_by = "length" if chunk.finish_reason == "length" else None
                limit = sequence.request.limit
                self.filled_context = self.ended_by == "length" and (room is None or limit < room)
            yield chunk
            if chat.time_limit is not None and time.monotonic() - self.started > chat.time_limit:
                self.ended_by = "time"
                return

    def done(self) -> Done:
        """The `Done` event of the finished turn."""
        reason = self.ended_by or "stop"
        return Done(reason, self.statistics, self.num_tokens, self.num_begun, self._no_answer())

    def _no_answer(self) -> str | None:
        chat = self.chat
        if self._is_answered or not chat.is_harmony:
            return None
        if self.ended_by == "time":
            return f"The turn's {chat.time_limit:g} seconds passed before an answer came: raise time_limit."
        if self.ended_by == "rounds":
            return (
                f"The model called tools {chat.max_rounds} times in a row and gave no answer: ask it to go "
                "on, or raise max_rounds."
            )
        if self.ended_by == "length" and chat.max_tokens is not None and not self.filled_context:
            what = "Reasoning and tool calls" if self.num_begun else "Reasoning"
            return (
                f"{what} used up the turn's {chat.max_tokens:,} tokens, and no answer came: raise max_tokens above "
                f'{chat.max_tokens}, or leave it out; or let it think less with reasoning_effort="low".'
            )
        return None if self.statistics is None else self.statistics.no_answer


def shown_as_events(chunk: Chunk) -> Iterator[Event]:
    """The events of one chunk of gpt-oss's completion."""
    if chunk.text:
        yield Answer(chunk.text)
    if chunk.reasoning:
        yield Reasoning(chunk.reasoning)
    if chunk.preamble:
        yield Answer(chunk.preamble, is_preamble=True)
    if chunk.arguments:
        yield ToolCall(chunk.recipient or "", chunk.arguments)
