"""From the chunks of one answer to its parts: where items begin and end, and which tokens belong to which text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import final

from ..engine.sequence import Chunk
from ..errors import TokenizerError
from ..text.conversation import FUNCTIONS, resolve_recipient
from ..text.streams import ANALYSIS, FINAL
from ..text.tokenizer import Tokenizer
from .parts import Finished, FinishReason, ItemDone, ItemStarted, ItemText, Kind, Part, TokenLogprob, Usage

# The channel that a message for the user is on without being an answer.
_PREAMBLE = "preamble"


@final
class TokenTexts:
    """Tokens as clients see them beside log-probabilities: their text, and their bytes, which may be half a character."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._names = {} if tokenizer is None else {token: name for name, token in tokenizer.special_tokens.items()}

    def is_special(self, token: int) -> bool:
        """Whether a token is not text."""
        return token in self._names

    def scored(self, token: int, logprob: float, top: dict[int, float] | None = None) -> TokenLogprob:
        """A token with its log-probability, and with the likeliest ones of its place."""
        data = self.bytes_of(token)
        others = tuple(self.scored(each, value) for each, value in (top or {}).items())
        return TokenLogprob(data.decode("utf-8", "replace"), logprob, list(data), others)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, of a special one those of its name."""
        if token in self._names:
            return self._names[token].encode()
        try:
            return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)
        except TokenizerError:  # a row of the model's vocabulary without a token
            return b""


@final
class AnswerReader:
    """Reads one answer's chunks.

    index: of the answer. recipients: of functions that the request defines ("functions.f"); a call of anything else is no
    call that the client could answer: without functions, what the model wrote is shown to the user. has_channels: whether
    the model is gpt-oss. num_stops: stop strings of the request.
    """

    def __init__(
        self, index: int, recipients: Collection[str], texts: TokenTexts, has_channels: bool, num_stops: int = 0
    ) -> None:
        self.index, self.is_finished = index, False
        self._recipients, self._texts, self._has_channels = recipients, texts, has_channels
        self._holds_text = num_stops > 0
        self._open: tuple[Kind, str | None] | None = None
        self._last_kind: Kind | None = None
        self._whole: list[str] = []
        self._new: list[str] = []  # of the open item, since the last part
        self._parts: list[Part] = []
        self._num_reasoning_tokens = 0
        self.usage = Usage(0, 0, 0, 0)  # at the end
        # Tokens of messages whose text has not come yet, the bytes of those that have gone, and of the text.
        self._waiting: list[TokenLogprob] = []
        self._scored: list[TokenLogprob] = []
        self._num_bytes = self._num_shown = 0

    def read(self, chunks: Iterable[Chunk]) -> Sequence[Part]:
        """The parts that these chunks are. Text of one item that comes together is one part."""
        self._parts = []
        for chunk in chunks:
            self._read(chunk)
        self._flush()
        return self._parts

    def _read(self, chunk: Chunk) -> None:
        is_call = chunk.recipient is not None
        if chunk.logprob is not None and self._is_answer(chunk):
            self._waiting.append(self._texts.scored(chunk.token, chunk.logprob, chunk.top_logprobs))
        if chunk.channel == ANALYSIS and not is_call:
            self._num_reasoning_tokens += 1
        # Text that was held back as the beginning of a stop string belongs to the message before.
        is_first = self._open == ("message", FINAL)
        if chunk.text and is_first:
            self._add("message", FINAL, chunk.text)
        if chunk.preamble:
            self._add("message", _PREAMBLE, chunk.preamble)
        if chunk.reasoning:
            self._add("reasoning", None, chunk.reasoning)
        if chunk.recipient is not None:
            self._add_to_call(chunk.recipient, chunk.arguments)
        if chunk.text and not is_first:
            self._add("message", FINAL, chunk.text)
        if chunk.finish_reason is not None:
            self._finish(chunk)
        elif self._has_channels and chunk.channel is None:  # a header: the next message is one of its own
            self._close()

    def _is_answer(self, chunk: Chunk) -> bool:
        if chunk.recipient is not None or self._texts.is_special(chunk.token):
            return False
        return not self._has_channels or chunk.channel not in (None, ANALYSIS)

    def _add_to_call(self, recipient: str, arguments: str) -> None:
        if not self._recipients:
            if arguments:
                self._add("message", _PREAMBLE, arguments)
            return
        known = resolve_recipient(recipient, self._recipients) or recipient
        self._add("call", known.removeprefix(f"{FUNCTIONS}."), arguments)

    def _add(self, kind: Kind, name: str | None, text: str) -> None:
        if self._open != (kind, name):
            self._close()
            self._open = kind, name
            self._last_kind = kind
            self._parts.append(
                ItemStarted(self.index, kind, name if kind == "call" else None, kind == "message" and name == _PREAMBLE)
            )
        if not text:
            return
        self._new.append(text)
        if self._waiting and kind == "message":
            self._take_scores(text)

    def _take_scores(self, text: str) -> None:
        """The tokens whose text has come."""
        if not self._holds_text:
            self._scored += self._waiting
            self._waiting.clear()
            return
        self._num_shown += len(text.encode())
        while self._waiting and self._num_bytes < self._num_shown:
            self._num_bytes += len(self._waiting[0].bytes)
            self._scored.append(self._waiting.pop(0))

    def _flush(self) -> None:
        if self._new:
            text = "".join(self._new)
            self._whole.append(text)
            self._parts.append(ItemText(self.index, text, tuple(self._scored)))
            self._new.clear()
            self._scored.clear()

    def _close(self) -> None:
        if self._open is None:
            return
        if self._open[0] == "call" and not self._whole and not self._new:
            self._new.append("{}")  # clients read arguments as JSON
        self._flush()
        self._open = None
        self._parts.append(ItemDone(self.index, "".join(self._whole)))
        self._whole.clear()
        self._waiting.clear()

    def _finish(self, chunk: Chunk) -> None:
        self._close()
        self.is_finished = True
        statistics = chunk.statistics
        assert statistics is not None
        reason: FinishReason = "length" if chunk.finish_reason == "length" else "stop"
        if reason == "stop" and self._last_kind == "call":
            reason = "tool_calls"
        self.usage = Usage(
            prompt_tokens=statistics.prompt_tokens,
            cached_tokens=statistics.cached_tokens,
            completion_tokens=statistics.completion_tokens,
            reasoning_tokens=self._num_reasoning_tokens,
        )
        self._parts.append(Finished(self.index, reason, chunk.stop, self.usage))
