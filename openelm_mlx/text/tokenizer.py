"""Text to tokens and back: SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`, without transformers.

Encoding is ordinary: text that spells a control token (`</s>`, `<|end|>`) stays text. Who wants a control token puts
its number among the tokens, as chat.py and harmony.py do. Which tokens may be sampled is decoding's business, which
reads `vocab_size`.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from openelm_mlx.errors import PromptError, TokenizerError
from openelm_mlx.files import one_line
from openelm_mlx.text.tokenizer_files import (
    SENTENCEPIECE_FILE,
    TokenizerSettings,
    find_vocabulary,
    read_settings,
    read_vocabulary,
)

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_SPACE = "▁"  # U+2581, how both formats write a space inside a piece
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# What Llama's and gpt-oss's vocabularies call them; asked only when no file beside tokenizer.json gives the names.
_BOS_NAMES = ("<s>", "<|startoftext|>")
_EOS_NAMES = ("</s>", "<|return|>")
# What ends an answer in Harmony, whatever a file says: gpt-oss's own generation_config.json has forgotten the last once.
_HARMONY_STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")
_HARMONY_NAMES = ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>")


def load_tokenizer(path: Path, chat_template: str = "plain") -> Tokenizer:
    """Load the tokenizer in a folder, or the one that `path` is a file of; TokenizerError says what is wrong there.

    A folder that holds both `tokenizer.model` and `tokenizer.json` is read from `tokenizer.model`: it is what OpenELM
    was trained with, `tokenizer.json` is a conversion of it, and it loads some twenty times faster. Names of special
    tokens come from `tokenizer_config.json` or `special_tokens_map.json`, more stop tokens from
    `generation_config.json`, where there are such files. chat_template: the one that prompts go through.
    """
    vocabulary = find_vocabulary(Path(path))
    settings = read_settings(vocabulary)
    if vocabulary.name == SENTENCEPIECE_FILE:
        return SentencePieceTokenizer(vocabulary, settings, chat_template)
    return JsonTokenizer(vocabulary, settings, chat_template)


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
    """The template (chat.py) that prompts go through: the model's, where it was loaded with one."""

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
        # No name in sight: normalization made it. Halving ends inside it, at the price of a few odd cuts.
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


@final
class Detokenizer:
    """Turns a stream of tokens into text, whole characters only; `Tokenizer.detokenizer` makes one.

    The pieces that `add` returns and the rest from `finish`, joined, are `Tokenizer.decode` of the tokens. A character
    or an emoji whose bytes are spread over tokens is held back until it is whole. A token costs the same wherever it
    stands: at most three bytes are held.
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
            return self.finish()  # a control token: no character reaches across it
        if self._opening_bytes is not None:
            data = self._opening_bytes(token)
            if data or not self._opening_lasts:
                self._opening_bytes = None
        return self._take(data, final=False)

    def finish(self) -> str:
        """Return what is held back, as U+FFFD: the bytes that would complete the character do not come."""
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


@final
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, such as Llama's, which OpenELM uses.

    Tokens past its pieces (a fine-tune's added ones, from `tokenizer_config.json` or `added_tokens.json`) are decoded
    and can be stop tokens, but text is not encoded as them.
    """

    # Llama's library writes one mark for each bad byte; so do we, and decode equals its DecodeIds on any tokens.
    _replace_each_byte = True
    _begins_with_bos = True

    def __init__(self, path: Path, settings: TokenizerSettings, chat_template: str = "plain") -> None:
        self.chat_template = chat_template
        self._processor = _load_processor(path, read_vocabulary(path))
        self._num_pieces: int = self._processor.get_piece_size()
        pieces = range(self._num_pieces)
        self.special_tokens = {
            self._processor.id_to_piece(token): token
            for token, is_control in zip(pieces, self._processor.is_control(list(pieces)), strict=True)
            if is_control
        }
        for token, added in settings.added.items():
            if added.is_special and added.text and token != self._processor.unk_id():
                self.special_tokens[added.text] = token  # the unknown token is none: it stands for text, and shows
        self._added = {token: added.text for token, added in settings.added.items() if token >= self._num_pieces}
        self.vocab_size = max((self._num_pieces - 1, *self._added)) + 1
        self.files = settings.files
        own_bos, own_eos = self._processor.bos_id(), self._processor.eos_id()
        named_bos = settings.find_token("bos_token", self._token_of)
        named_eos = settings.find_token("eos_token", self._token_of)
        self.bos_token = next((token for token in (named_bos, own_bos) if token is not None and token >= 0), None)
        self.eos_tokens = _eos_tokens((named_eos, own_eos, *settings.eos_tokens), self.vocab_size)
        for key, named in (("bos_token", named_bos), ("eos_token", named_eos)):
            if named is not None:  # also where the model has it as text
                self.special_tokens[settings.names[key]] = named
        # Where runs of spaces are folded (never for Llama), all spaces at the start go, not the first token's alone.
        self._opening_lasts = not self._processor.encode("  ")

    def token_bytes(self, token: int) -> bytes:
        self._check_token(token)
        if token in self._control_tokens:
            return b""
        if token >= self._num_pieces:
            return self._added.get(token, "").encode()
        if self._processor.is_byte(token):
            return self._one_byte(token)
        if self._processor.is_unknown(token):
            return self._opening_bytes(token)  # " ⁇ " or what the model gives for it
        return self._processor.id_to_piece(token).replace(_SPACE, " ").encode()

    def _opening_bytes(self, token: int) -> bytes:
        if token >= self._num_pieces:
            return self._added[token].encode()
        if self._processor.is_byte(token):
            return self._one_byte(token)
        return self._processor.decode([token]).encode()  # the library drops the space that its model says it adds

    def _encode(self, text: str, continuation: bool) -> list[int]:
        return (self._continuing_processor if continuation else self._processor).encode(text)

    def _one_byte(self, token: int) -> bytes:
        return bytes.fromhex(self._processor.id_to_piece(token)[3:5])  # "<0xE2>"

    def _token_of(self, name: str) -> int | None:
        if name in self.special_tokens:
            return self.special_tokens[name]
        token: int = self._processor.piece_to_id(name)  # the unknown token, if there is no such piece
        return token if self._processor.id_to_piece(token) == name else None

    @cached_property
    def _continuing_processor(self) -> sentencepiece.SentencePieceProcessor:
        # Two serialized protobuf messages in a row are their merge. These four bytes are a ModelProto that holds only
        # normalizer_spec (field 3) with add_dummy_prefix (field 3) = false.
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self._processor.serialized_model_proto() + b"\x1a\x02\x18\x00")
        return processor


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
        self.eos_tokens = _eos_tokens((own_eos, *settings.eos_tokens, *stops), self.vocab_size)
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
        return self._tokenizer.id_to_token(token) or ""  # "": a number that the file gives to nothing

    def _encode(self, text: str, continuation: bool) -> list[int]:
        tokenizer = self._continuing_tokenizer if continuation else self._tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

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
            piece = piece.replace(_SPACE, "")
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
            case {"type": "Metaspace", "replacement": str(space), "prepend_scheme": scheme} if space == _SPACE:
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
    """Undo GPT-2's spelling of bytes as printable characters; a piece that is not so spelled is its own text."""
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


def _eos_tokens(candidates: Iterable[int | None], vocab_size: int) -> tuple[int, ...]:
    """The candidates that are tokens, each once, in their order."""
    return tuple(dict.fromkeys(token for token in candidates if token is not None and 0 <= token < vocab_size))


def _load_processor(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        processor.id_to_piece(list(range(processor.get_piece_size())))  # each of them is text
    except (RuntimeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is damaged, cut short or no SentencePiece model; fetch it again.") from error
    return processor


def _load_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    try:
        tokenizer = Library.from_buffer(read_vocabulary(path))
    except TokenizerError:
        raise
    except Exception as error:  # the library has no exception of its own
        raise TokenizerError(
            f"{path} is damaged, cut short or no tokenizer ({one_line(error)}); fetch it again."
        ) from error
    if tokenizer.get_vocab_size() == 0:
        raise TokenizerError(f"{path} has no tokens in it; fetch it again.")
    tokenizer.encode_special_tokens = True  # "encode special tokens as text": `</s>` in a prompt is four characters
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
