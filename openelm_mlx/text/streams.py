"""From a completion's tokens to the text that may be shown, token by token: plain text, or Harmony's channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, final

from openelm_mlx.text.conversation import Message
from openelm_mlx.text.harmony import Delta, HarmonyFormat
from openelm_mlx.text.stops import StopStrings
from openelm_mlx.text.tokenizer import Tokenizer

ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
REASONING = "reasoning"


class Piece(NamedTuple):
    """The text that may be shown after one more token, by its kind, and the stop string that ended the answer, if one did.

    text: of the answer. reasoning: of the analysis channel. preamble: said to the user before a call. arguments: of the call
    to `recipient`. channel, recipient: of the message that the token belongs to; None in models without channels.
    """

    text: str = ""
    reasoning: str = ""
    preamble: str = ""
    arguments: str = ""
    channel: str | None = None
    recipient: str | None = None
    stop: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self.stop is not None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.reasoning or self.preamble or self.arguments)

    def then(self, rest: Piece) -> Piece:
        """Both as one piece, with the channel and recipient of the later text."""
        place = self if rest.is_empty else rest
        return Piece(
            text=self.text + rest.text,
            reasoning=self.reasoning + rest.reasoning,
            preamble=self.preamble + rest.preamble,
            arguments=self.arguments + rest.arguments,
            channel=place.channel,
            recipient=place.recipient,
            stop=self.stop or rest.stop,
        )


class TextStream(Protocol):
    """Text from tokens: whole characters only, without stop strings and what may still become one."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a completion of this format, whatever the model's files say."""

    @property
    def ended_in(self) -> str | None:
        """Where a completion without an answer ended: in its "reasoning", or a tool's name; None: in the answer.

        Models without channels are always in their answer.
        """

    @property
    def messages(self) -> list[Message]:
        """The finished messages of a completion in Harmony; none in models without messages."""

    def add(self, token: int) -> Piece:
        """Take one more token; return the text that may be shown now."""

    def finish(self, end: int | None = None) -> Piece:
        """Return the text that was held back. `end`: the token that ended the completion, if one did."""


_NOTHING = Piece()


@final
class SilentStream:
    """The stream of a model without a tokenizer: no text."""

    stop_tokens: frozenset[int] = frozenset()
    ended_in: str | None = None

    @property
    def messages(self) -> list[Message]:
        return []

    def add(self, token: int) -> Piece:
        return _NOTHING

    def finish(self, end: int | None = None) -> Piece:
        return _NOTHING


@final
class PlainStream:
    """The text of a model without channels.

    continues_text: the answer goes on with the prompt's own text, so a leading space belongs to it.
    """

    stop_tokens: frozenset[int] = frozenset()
    ended_in: str | None = None

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], continues_text: bool) -> None:
        self._detokenizer = tokenizer.detokenizer(continuation=continues_text)
        self._stops = StopStrings(stop)
        self._is_stopped = False

    @property
    def messages(self) -> list[Message]:
        return []

    def add(self, token: int) -> Piece:
        text, self._is_stopped = self._stops.feed(self._detokenizer.add(token))
        return Piece(text, stop=self._stops.found)

    def finish(self, end: int | None = None) -> Piece:
        if self._is_stopped:
            return Piece()
        text, is_stopped = self._stops.feed(self._detokenizer.finish())
        return Piece(text if is_stopped else text + self._stops.finish(), stop=self._stops.found)


@final
class HarmonyStream:
    """gpt-oss's completion, parsed as Harmony. Stop strings apply to the final channel only: in the reasoning they would
    end the request without an answer.

    channel: of the message that the prompt has begun, if it has.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], channel: str | None = None) -> None:
        harmony = HarmonyFormat(tokenizer)
        self.stop_tokens = harmony.stop_tokens
        self._parser = harmony.parser(channel=channel)
        self._stop = stop
        self._stops: StopStrings | None = None  # of the final message that is being written
        self._is_stopped = False
        self._num_shown = 0  # characters of the answer
        self.ended_in: str | None = None if channel == FINAL else REASONING

    @property
    def messages(self) -> list[Message]:
        """The finished messages; the answer ends where a stop string ended it."""
        if not self._stop:
            return self._parser.messages
        left, kept = self._num_shown, []
        for message in self._parser.messages:
            if message.role == "assistant" and message.channel == FINAL and not message.is_call:
                message = replace(message, content=message.text[:left])
                left -= len(message.text)
            kept.append(message)
        return kept

    def add(self, token: int) -> Piece:
        return self._shown(self._parser.push(token))

    def finish(self, end: int | None = None) -> Piece:
        # The parser needs the token that ended the completion: `<|call|>` ends a message too.
        last = self._parser.push(end) if end is not None else Delta()
        if self._is_stopped:
            self._parser.finish()
            return Piece()
        piece = self._shown(last)
        rest = self._parser.finish()
        if not piece.is_stopped:
            piece = piece.then(self._shown(rest))
        return piece if piece.is_stopped else piece.then(self._released())

    def _shown(self, delta: Delta) -> Piece:
        """The part of a delta that may be shown, after the text held back from an answer that has ended."""
        if delta.channel == FINAL and delta.recipient is None and delta.text:
            self.ended_in = None
        elif delta.recipient is not None and self.ended_in is not None:
            self.ended_in = delta.recipient
        if delta.text and delta.role != "assistant":  # the model invents a reply of somebody else: not its answer
            return self._released().then(Piece(reasoning=delta.text, channel=ANALYSIS))
        if delta.channel == FINAL and delta.recipient is None:
            return self._answer(delta.text)
        piece = Piece(channel=delta.channel, recipient=delta.recipient)
        if delta.recipient is not None:
            piece = piece._replace(arguments=delta.text)
        elif delta.channel == COMMENTARY:
            piece = piece._replace(preamble=delta.text)
        else:
            piece = piece._replace(reasoning=delta.text)
        return self._released().then(piece) if delta.text else piece.then(self._released())

    def _answer(self, text: str) -> Piece:
        if self._stops is None:
            self._stops = StopStrings(self._stop)
        shown, self._is_stopped = self._stops.feed(text)
        self._num_shown += len(shown)
        return Piece(shown, channel=FINAL, stop=self._stops.found)

    def _released(self) -> Piece:
        """Text that was held back as a possible stop string, in a final message that has ended."""
        text = "" if self._stops is None else self._stops.finish()
        self._stops = None
        self._num_shown += len(text)
        return Piece(text, channel=FINAL if text else None)
