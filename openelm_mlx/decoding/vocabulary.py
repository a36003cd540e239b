"""A tokenizer's tokens as bytes, and text as such tokens, for the engine and for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final
from weakref import ref

import numpy as np

from ..text.tokenizer import Tokenizer

# Of a token that text is spelled with, in bytes.
_LONGEST = 32


@final
class Vocabulary:
    """A Tokenizer in the form that llguidance needs: the bytes of each token, tokens that are not text, and encoding.

    Control tokens, role tags and the unknown token are never text. The tokenizer itself is not kept alive:
    engines are kept for as long as their tokenizers live.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        tokens = [
            names[token].encode() if token in names else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self.tokens: Sequence[bytes] = tokens
        self.special_token_ids = [
            token for token, data in enumerate(tokens) if token in names or not data or _is_tag(data)
        ]
        self.eos_token_id = tokenizer.eos_tokens[0]
        self.bos_token_id = tokenizer.bos_token
        self._tokenizer = ref(tokenizer)
        self._special = special = frozenset(self.special_token_ids)
        self._by_bytes = {data: token for token, data in reversed(list(enumerate(tokens))) if token not in special}
        self.longest = min(max(map(len, self._by_bytes)), _LONGEST)
        # How long the tokens are that begin with two bytes, the longest first.
        lengths: dict[bytes, set[int]] = {}
        for data in self._by_bytes:
            if 2 <= len(data) <= self.longest:
                lengths.setdefault(data[:2], set()).add(len(data))
        self._lengths = {start: sorted(each, reverse=True) for start, each in lengths.items()}
        # A token for each printable character that has one: completions are written in these first.
        ordinary = ((chr(byte), self._by_bytes.get(bytes([byte]))) for byte in (*range(0x20, 0x7F), 0x0A))
        self.characters = {character: token for character, token in ordinary if token is not None}
        self._characters = list(self.characters)
        character_tokens = np.array(list(self.characters.values()), np.uint32)
        self._words, self._shifts = character_tokens >> 5, character_tokens & 31

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        if tokenizer is None:  # the engine is still in use: any tokens with the same bytes will do
            return self.spell(text.encode() if isinstance(text, str) else text)
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return tokenizer.encode(text, continuation=True)

    def characters_in(self, words: np.ndarray) -> list[str]:
        """The characters whose tokens are in a mask, as the engine gives it: one bit a token in uint32 words."""
        return [self._characters[i] for i in np.flatnonzero(words[self._words] >> self._shifts & 1).tolist()]

    def token_of(self, data: bytes) -> int | None:
        """The token with exactly these bytes."""
        return self._by_bytes.get(data)

    def encode(self, data: bytes) -> list[int]:
        """Tokens with exactly these bytes; for whole characters those that the tokenizer gives."""
        tokens = self(data)
        spelled = b"".join(self.tokens[token] for token in tokens if token not in self._special)
        return tokens if spelled == data else self.spell(data)

    def spell(self, data: bytes) -> list[int]:
        """Tokens with these bytes, always the longest that fits; bytes without a token are skipped."""
        tokens, start = [], 0
        while start < len(data):
            for length in (*self._lengths.get(data[start : start + 2], ()), 1):
                token = self._by_bytes.get(data[start : start + length])
                if token is not None:
                    tokens.append(token)
                    break
            start += length
        return tokens


def _is_tag(data: bytes) -> bool:
    """Whether a token spells a role tag such as `<|user|>`, or is " ⁇ ", which means unknown text."""
    return (data.startswith(b"<|") and data.endswith(b"|>") and len(data) > 4) or data == " ⁇ ".encode()
