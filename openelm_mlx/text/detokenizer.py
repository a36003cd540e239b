"""A stream of tokens to text, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    pass

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@final
class Detokenizer:
    """Turns a stream of tokens into text, whole characters only; `Tokenizer.detokenizer` makes one.

    The pieces that `add` returns and the rest from `finish`, joined, are `Tokenizer.decode` of the tokens. A character
    or an emoji whose bytes are spread over tokens is held back until it is whole. A token costs the same at any position:
    at most three bytes are held.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        opening_bytes: Callable[[int], bytes] | None,
        *,
        opening_lasts: bool = False,
        replace_each_byte: bool = False,
    ) -> None:
        """opening_bytes: what the first token with text gives instead of `token_bytes`, if anything else.

        opening_lasts: it goes on doing so until there is text. replace_each_byte: one U+FFFD for each byte that is
        not UTF-8, as SentencePiece writes it, rather than one for each broken character.
        """
        self._token_bytes = token_bytes
        self._opening_bytes = opening_bytes
        self._opening_lasts = opening_lasts
        self._replace_each_byte = replace_each_byte
        self._held = b""

    def add(self, token: int) -> str:
        """Take the next token; return the text that is now certain, which may be empty."""
        data = self._token_bytes(token)
        if not data:
            return self.finish()  # a control token: no character spans it
        if self._opening_bytes is not None:
            data = self._opening_bytes(token)
            if data or not self._opening_lasts:
                self._opening_bytes = None
        return self._take(data, final=False)

    def finish(self) -> str:
        """Return what is held back, as U+FFFD: the bytes that would complete the character are not coming."""
        return self._take(b"", final=True)

    def _take(self, data: bytes, final: bool) -> str:
        text, data = "", self._held + data
        while True:
            try:
                decoded, length = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:  # at [start, end): the longest run that could have been a character
                count = error.end - error.start if self._replace_each_byte else 1
                text += data[: error.start].decode() + _REPLACEMENT * count
                data = data[error.end :]
            else:
                self._held = data[length:]
                return text + decoded
