"""Hugging Face's `tokenizer.json`, read with the tokenizers library, without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from openelm_mlx.errors import TokenizerError
from openelm_mlx.files import one_line
from openelm_mlx.text.tokenizer_base import SPACE, Tokenizer, known_tokens
from openelm_mlx.text.tokenizer_files import (
    TokenizerSettings,
    read_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

# The names in Llama's and gpt-oss's vocabularies, used only when no file beside tokenizer.json gives them.
_BOS_NAMES = ("<s>", "<|startoftext|>")
_EOS_NAMES = ("</s>", "<|return|>")
# These end an answer in Harmony whatever a file says: gpt-oss's own generation_config.json once lacked the last one.
_HARMONY_STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")
_HARMONY_NAMES = ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>")


@final
class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`: byte-level, such as gpt-oss's, or converted from SentencePiece, such as Llama's.

    Truncation and padding that a tuner left in the file are ignored.
    """

    _opening_lasts = False

    def __init__(self, path: Path, settings: TokenizerSettings, chat_template: str = "plain") -> None:
        self.chat_template = chat_template
        self._tokenizer = _load_json_tokenizer(path)
        self._rule = _decoding_rule(path, _state(self._tokenizer.decoder))
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {added.content: token for token, added in self._added.items() if added.special}
        self.vocab_size = _largest_token(self._tokenizer, self._added) + 1
        self.files = settings.files
        bos = settings.find_token("bos_token", self._tokenizer.token_to_id)
        eos = settings.find_token("eos_token", self._tokenizer.token_to_id)
        self.bos_token = self._first_known(_BOS_NAMES) if bos is None else bos
        own_eos = self._first_known(_EOS_NAMES) if eos is None else eos
        stops = self._harmony_stops()
        self.eos_tokens = known_tokens((own_eos, *settings.eos_tokens, *stops), self.vocab_size)
        for token in (self.bos_token, own_eos, *stops):
            if token is not None:  # also where a fine-tune's file does not mark it as special
                self.special_tokens[self._piece(token)] = token
        self._begins_with_bos = not self._rule.is_byte_level or self._tokenizer.encode("").ids[:1] == [self.bos_token]
        # One mark for each broken character is what the byte-level decoder writes. The byte-fallback decoder gives up
        # a whole run of byte tokens, good characters too, when its end is broken; that cannot be streamed without
        # holding back the run, so there we write SentencePiece's marks: one for each bad byte.
        self._replace_each_byte = not self._rule.is_byte_level

    def token_bytes(self, token: int) -> bytes:
        self._check_token(token)
        if token in self._control_tokens:
            return b""
        return self._rule.piece_bytes(self._piece(token))

    def _opening_bytes(self, token: int) -> bytes:
        return self._rule.opening_bytes(self._piece(token))

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""  # "": a number without a piece in the file

    def _encode(self, text: str, continuation: bool) -> list[int]:
        tokenizer = self._continuing_tokenizer if continuation else self._tokenizer
        # The library's `encode` holds the interpreter's lock all the time, minutes for a text of megabytes.
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def _harmony_stops(self) -> tuple[int, ...]:
        """The tokens that end an answer in Harmony; none in another format's vocabulary."""
        number = self._tokenizer.token_to_id
        if any(number(name) is None for name in _HARMONY_NAMES):
            return ()
        return tuple(token for name in _HARMONY_STOPS if (token := number(name)) is not None)

    def _first_known(self, names: Iterable[str]) -> int | None:
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)

    @cached_property
    def _continuing_tokenizer(self) -> tokenizers.Tokenizer:
        normalizer, pre_tokenizer = _state(self._tokenizer.normalizer), _state(self._tokenizer.pre_tokenizer)
        steps = _without_prefix(normalizer), _without_prefix(pre_tokenizer)
        if steps == (normalizer, pre_tokenizer):
            return self._tokenizer
        from tokenizers import Tokenizer as Library

        empty = {"type": "BPE", "vocab": {}, "merges": []}
        twin = Library.from_str(json.dumps({"normalizer": steps[0], "pre_tokenizer": steps[1], "model": empty}))
        twin.model = self._tokenizer.model  # shared, not copied
        twin.add_tokens([added for _, added in sorted(self._added.items()) if not added.special])
        return twin


@dataclass(frozen=True)
class _DecodingRule:
    """What a tokenizer.json's decoder does to one piece."""

    is_byte_level: bool = False
    has_byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    opening_spaces: str = "keep"  # or "drop one", "drop all": of the first piece

    def piece_bytes(self, piece: str) -> bytes:
        if self.is_byte_level:
            return _byte_level_bytes(piece)
        if self.has_byte_fallback and _is_byte_piece(piece):
            return bytes.fromhex(piece[3:5])
        for pattern, content in self.replacements:
            piece = piece.replace(pattern, content)
        return piece.encode()

    def opening_bytes(self, piece: str) -> bytes:
        if self.opening_spaces == "drop all":
            piece = piece.replace(SPACE, "")
        data = self.piece_bytes(piece)
        return data.removeprefix(b" ") if self.opening_spaces == "drop one" else data


def _decoding_rule(path: Path, decoder: dict[str, Any] | None) -> _DecodingRule:
    """Read a decoder's steps as a rule for single pieces, so that text can be streamed; TokenizerError if it cannot."""
    rule: dict[str, Any] = {}
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                rule["is_byte_level"] = True
            case {"type": "ByteFallback"}:
                rule["has_byte_fallback"] = True
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                rule["replacements"] = (*rule.get("replacements", ()), (pattern, content))
            case {"type": "Metaspace", "replacement": str(space), "prepend_scheme": scheme} if space == SPACE:
                rule["replacements"] = (*rule.get("replacements", ()), (space, " "))
                rule["opening_spaces"] = "keep" if scheme == "never" else "drop all"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                rule["opening_spaces"] = "drop one"
            case {"type": "Fuse"}:
                pass
            case _:
                kind = step["type"] if step else "none"
                raise TokenizerError(
                    f"{path} has a decoder ({kind}) that this library cannot stream; "
                    "use the tokenizer of Llama 2 for OpenELM, or the tokenizer.json that comes with gpt-oss."
                )
    return _DecodingRule(**rule)


def _is_byte_piece(piece: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) is not None


def _byte_level_bytes(piece: str) -> bytes:
    """Undo GPT-2's spelling of bytes as printable characters; any other piece is its own text."""
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes in order for U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer, as its JSON, without the space it puts before a text's first word."""
    match step:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return step | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return step | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            return step | {key: [kept for inner in step[key] if (kept := _without_prefix(inner)) is not None]}
    return step


def _state(component: Any) -> dict[str, Any] | None:
    """A component of a tokenizer.json as its JSON: what the library pickles, so the 28 MB file is not parsed twice."""
    return None if component is None else json.loads(component.__getstate__())


def _largest_token(tokenizer: tokenizers.Tokenizer, added: Iterable[int]) -> int:
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    # Numbers without gaps end at size - 1. Asking for two names saves a dictionary of 200,000.
    if tokenizer.id_to_token(size - 1) is None or (tokenizer.id_to_token(size) is not None and size not in added):
        size = max(tokenizer.get_vocab(with_added_tokens=False).values()) + 1
    return max((size - 1, *added))


def _load_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    try:
        tokenizer = Library.from_buffer(read_vocabulary(path))
    except TokenizerError:
        raise
    except Exception as error:  # the library has no exception of its own
        raise TokenizerError(
            f"{path} is damaged, cut short or not a tokenizer ({one_line(error)}); download it again."
        ) from error
    if tokenizer.get_vocab_size() == 0:
        raise TokenizerError(f"{path} has no tokens in it; download it again.")
    tokenizer.encode_special_tokens = True  # "encode special tokens as text": `</s>` in a prompt is four characters
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
