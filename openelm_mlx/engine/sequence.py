"""One request from its first token to its last: `Sequence.accept` turns each token into the chunk that a caller sees."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, final

from ..text.conversation import Message
from ..text.streams import FINAL, Piece, TextStream
from .request import Request
from .statistics import Clock, Statistics


@dataclass(frozen=True)
class Chunk:
    """One token of a completion, and the text that can be shown after it.

    Attributes:
        text: Of the answer, and nothing else; may be empty, since a character can take several tokens.
        reasoning: Of what gpt-oss thinks.
        preamble: Of what it says to the user before a call.
        arguments: Of a call, whose tool is `recipient`.
        channel: Of the message that the token belongs to ("analysis", "commentary" or "final"); None in models
            without channels, and in headers.
        recipient: Of that message: the tool that it calls ("functions.f"), or None.
        finish_reason: None, "stop" (end of text, or a stop string), or "length" (max_tokens or the context
            ended it).
        stop: The stop string that ended the answer, in the last chunk; None where it was something else.
        logprob: The token's log-probability, if logprobs were requested.
        top_logprobs: The likeliest alternatives by token, if requested.
        statistics: In the last chunk.
    """

    text: str
    token: int
    finish_reason: str | None = None
    channel: str | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    statistics: Statistics | None = None
    reasoning: str = ""
    preamble: str = ""
    arguments: str = ""
    recipient: str | None = None
    stop: str | None = None


def _chunk(**fields: Any) -> Chunk:
    """A `Chunk` of all its fields. There is one for every token, and a frozen class's own way takes six times as long."""
    made = object.__new__(Chunk)
    made.__dict__.update(fields)
    return made


@final
class Sequence:
    """A request that is being answered. A loop, for one request or for many, passes it one token after the other.

    request: checked. end_tokens: tokens that end the completion. tokens: those of the completion so far.
    finish_reason: None while it goes on. clock: set when its prompt begins to be computed.
    """

    def __init__(self, request: Request, text: TextStream, end_tokens: Collection[int]) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.clock: Clock | None = None
        self._text = text
        self._end_tokens = frozenset(end_tokens) | text.stop_tokens

    @property
    def messages(self) -> list[Message]:
        """The finished messages of a completion in Harmony; all messages after the end, or `close`."""
        return self._text.messages

    def accept(self, token: int, logprob: float | None = None, top_logprobs: dict[int, float] | None = None) -> Chunk:
        """Take the next token. The chunk has a finish_reason when it was the last one."""
        assert self.finish_reason is None, "the sequence has ended"
        self.tokens.append(token)
        if self.clock is not None:
            self.clock.token_arrived()
        piece = self._read(token)
        if self.clock is not None and piece.channel in (None, FINAL) and self._text.ended_in is None:
            self.clock.token_is_answer()
        statistics = None
        if self.finish_reason is not None and self.clock is not None:
            statistics = self.clock.statistics(self.finish_reason, self._text.ended_in)
        return _chunk(
            text=piece.text,
            reasoning=piece.reasoning,
            preamble=piece.preamble,
            arguments=piece.arguments,
            channel=piece.channel,
            recipient=piece.recipient,
            token=token,
            logprob=logprob,
            top_logprobs=top_logprobs,
            finish_reason=self.finish_reason,
            statistics=statistics,
            stop=piece.stop,
        )

    def close(self) -> None:
        """End the sequence early. The message that was being written counts as finished."""
        if self.finish_reason is None:
            self._text.finish()

    def _read(self, token: int) -> Piece:
        if token in self._end_tokens:
            self.finish_reason = "stop"
            return self._text.finish(token)
        piece = self._text.add(token)
        if not piece.is_stopped and len(self.tokens) < self.request.limit:
            return piece
        piece = piece.then(self._text.finish())
        self.finish_reason = "stop" if piece.is_stopped else "length"
        return piece
