"""From a completion's tokens to the text that may be shown, token by token: plain text, or Harmony's channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, final

from openelm_mlx.text.harmony import Delta, HarmonyFormat
from openelm_mlx.text.stops import StopStrings
from openelm_mlx.text.tokenizer import Tokenizer

FINAL = "final"
REASONING = "reasoning"


class Piece(NamedTuple):
    """The text that one token made certain, the channel it stands in, and whether a stop string ended the answer."""

    text: str = ""
    channel: str | None = None
    is_stopped: bool = False


class TextStream(Protocol):
    """Whole characters only, and never a stop string nor what may become one."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a completion of this format, whatever the model's files say."""

    @property
    def ended_in(self) -> str | None:
        """Where a completion that came to no answer was last: in its "reasoning", or a tool's name; None: in the answer.

        Models without channels are always in their answer.
        """

    def add(self, token: int) -> Piece:
        """What is certain with one more token."""

    def finish(self, end: int | None = None) -> Piece:
        """What was held back. `end`: the token that ended the completion, where one did."""


@final
class SilentStream:
    """Tokens without a tokenizer have no text."""

    stop_tokens: frozenset[int] = frozenset()
    ended_in: str | None = None

    def add(self, token: int) -> Piece:
        return Piece()

    def finish(self, end: int | None = None) -> Piece:
        return Piece()


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

    def add(self, token: int) -> Piece:
        text, self._is_stopped = self._stops.feed(self._detokenizer.add(token))
        return Piece(text, None, self._is_stopped)

    def finish(self, end: int | None = None) -> Piece:
        if self._is_stopped:
            return Piece()
        text, is_stopped = self._stops.feed(self._detokenizer.finish())
        return Piece(text if is_stopped else text + self._stops.finish(), None, is_stopped)


@final
class HarmonyStream:
    """gpt-oss's completion, read as Harmony. Stop strings count in the final channel only: in the reasoning they would
    end the request without an answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        harmony = HarmonyFormat(tokenizer)
        self.stop_tokens = harmony.stop_tokens
        self._parser = harmony.parser()
        self._stop = stop
        self._stops: StopStrings | None = None  # of the final message that is being written
        self._is_stopped = False
        self.ended_in: str | None = REASONING

    def add(self, token: int) -> Piece:
        return self._shown(self._parser.push(token))

    def finish(self, end: int | None = None) -> Piece:
        if self._is_stopped:
            return Piece()
        # The parser wants to see the token that ended it: `<|call|>` ends a message as well as the completion.
        last = self._shown(self._parser.push(end)) if end is not None else Piece()
        rest = self._shown(self._parser.finish())
        held = self._released() if not (last.is_stopped or rest.is_stopped) else ""
        if rest.text + held:
            # What is left of a thought, half a character, is never a part of the answer.
            channel = FINAL if held else rest.channel
            text = last.text * (last.channel == channel) + rest.text + held
            return Piece(text, channel, last.is_stopped or rest.is_stopped)
        return last

    def _shown(self, delta: Delta) -> Piece:
        if delta.channel == FINAL and delta.recipient is None and delta.text:
            self.ended_in = None
        elif delta.recipient is not None and self.ended_in is not None:
            self.ended_in = delta.recipient
        if delta.text and delta.role != "assistant":  # the model invents what others say: no part of its answer
            delta = replace(delta, channel="analysis")
        if delta.channel != FINAL or delta.recipient is not None:
            held = self._released()
            return Piece(held + delta.text, FINAL if held and not delta.text else delta.channel)
        if self._stops is None:
            self._stops = StopStrings(self._stop)
        text, self._is_stopped = self._stops.feed(delta.text)
        return Piece(text, FINAL, self._is_stopped)

    def _released(self) -> str:
        """What might have become a stop string in a final message that is over now."""
        text = "" if self._stops is None else self._stops.finish()
        self._stops = None
        return text
