"""What both kinds of tokenizer offer: encoding, decoding, special tokens.

Encoding is ordinary: text that spells a control token (`</s>`, `<|end|>`) stays text. Whoever needs a control token puts its
number among the tokens, as chat.py and harmony.py do.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.errors import PromptError, TokenizerError
from openelm_mlx.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    pass

SPACE = "▁"  # U+2581, how both formats write a space inside a piece


class Tokenizer(ABC):
    """What both kinds of tokenizer offer."""

    vocab_size: int
    """Largest token + 1. A model may have more rows; no token past this one means anything."""

    bos_token: int | None
    """The token before a text's first one, if the vocabulary has one."""

    eos_tokens: tuple[int, ...]
    """Tokens that end an answer; the first is the tokenizer's own, others come from `generation_config.json`."""

    files: tuple[Path, ...]
    """The files to copy, under the same names, for the same tokenizer; `generation_config.json` goes with the model."""

    special_tokens: dict[str, int]
    """Every control token by its name. They have no text, and no text is encoded as one of them."""

    chat_template: str
    """The chat template (chat.py) used for prompts: the model's, if it was loaded with one."""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Encode ordinary text, without BOS; PromptError where `text` holds half a surrogate pair.

        continuation: the text follows other tokens, so it gets no space before its first word. (Llama's tokenizer
        puts one before a text, so that a word at the start is the same token as inside a sentence.)
        """
        _check_text(text)
        tokens = self._encode(text, continuation)
        control = self._control_tokens
        return tokens if control.isdisjoint(tokens) else self._encode_in_parts(text, continuation)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode text that begins a sequence: BOS, then the text.

        OpenELM needs BOS, so a SentencePiece or Llama-like vocabulary always gives it, also where a file says
        `add_bos_token: false`. A byte-level vocabulary gives it if its own file does; gpt-oss's does not.
        """
        bos = [self.bos_token] if self._begins_with_bos and self.bos_token is not None else []
        return bos + self.encode(text)

    def decode(self, tokens: Iterable[int], *, continuation: bool = False) -> str:
        """The text of `tokens`; control tokens have none, and what is not UTF-8 becomes U+FFFD.

        It is by definition what a detokenizer gives piece by piece. continuation: as in `detokenizer`.
        """
        detokenizer = self.detokenizer(continuation=continuation)
        pieces = [detokenizer.add(token) for token in tokens]
        return "".join(pieces) + detokenizer.finish()

    def detokenizer(self, *, continuation: bool = False) -> Detokenizer:
        """Begin a stream of tokens to text.

        continuation: the tokens follow other text (an answer that completes a prompt), so a leading space is kept.
        """
        return Detokenizer(
            self.token_bytes,
            self._opening_bytes if not continuation else None,
            opening_lasts=self._opening_lasts,
            replace_each_byte=self._replace_each_byte,
        )

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token inside a text, b"" for a control token; TokenizerError outside 0 to vocab_size - 1."""

    _begins_with_bos: bool
    _opening_lasts: bool
    _replace_each_byte: bool

    @abstractmethod
    def _encode(self, text: str, continuation: bool) -> list[int]:
        """Encode as the library does, which may yield a control token where the vocabulary merges text to its name."""

    @abstractmethod
    def _opening_bytes(self, token: int) -> bytes:
        """The bytes of a token that opens a text: without the space that encoding put there."""

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def _encode_in_parts(self, text: str, continuation: bool) -> list[int]:
        """Encode text whose own encoding has a control token in it: cut inside that token's name, then each part."""
        if len(text) == 1:
            return [token for token in self._encode(text, continuation) if token not in self._control_tokens]
        names = "|".join(map(re.escape, self.special_tokens))
        cuts = [match.start() + 1 for match in re.finditer(f"(?={names})", text) if match.start() + 1 < len(text)]
        # No name in the text: normalization made the token. Halving ends inside it, with a few unusual cuts on the way.
        borders = [0, *(cuts or [len(text) // 2]), len(text)]
        parts = [text[start:end] for start, end in pairwise(borders)]
        tokens = self.encode(parts[0], continuation=continuation)
        for part in parts[1:]:
            tokens += self.encode(part, continuation=True)
        return tokens

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"Token {token} is outside this tokenizer's 0 to {self.vocab_size - 1}; "
                "the tokens come from another tokenizer, or from rows that only pad the model's vocabulary."
            )


def known_tokens(candidates: Iterable[int | None], vocab_size: int) -> tuple[int, ...]:
    """The candidates that are tokens, each once, in their order."""
    return tuple(dict.fromkeys(token for token in candidates if token is not None and 0 <= token < vocab_size))


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise PromptError(f"A prompt is text, and {type(text).__name__} is not; pass a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The text has U+{ord(text[error.start]):04X} at character {error.start}, which is half a character: "
            "it was read from something that is not UTF-8. Read it with errors='replace', or correct it."
        ) from error
