"""SentencePiece's `tokenizer.model`, such as the one of Llama 2 that OpenELM uses."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

from openelm_mlx.errors import TokenizerError
from openelm_mlx.text.tokenizer_base import SPACE, Tokenizer, known_tokens
from openelm_mlx.text.tokenizer_files import (
    TokenizerSettings,
    read_vocabulary,
)

if TYPE_CHECKING:
    import sentencepiece


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
                self.special_tokens[added.text] = token  # not the unknown token, which stands for text and is shown
        self._added = {token: added.text for token, added in settings.added.items() if token >= self._num_pieces}
        self.vocab_size = max((self._num_pieces - 1, *self._added)) + 1
        self.files = settings.files
        own_bos, own_eos = self._processor.bos_id(), self._processor.eos_id()
        named_bos = settings.find_token("bos_token", self._token_of)
        named_eos = settings.find_token("eos_token", self._token_of)
        self.bos_token = next((token for token in (named_bos, own_bos) if token is not None and token >= 0), None)
        self.eos_tokens = known_tokens((named_eos, own_eos, *settings.eos_tokens), self.vocab_size)
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
        return self._processor.id_to_piece(token).replace(SPACE, " ").encode()

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


def _load_processor(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        processor.id_to_piece(list(range(processor.get_piece_size())))  # each of them is text
    except (RuntimeError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{path} is damaged, cut short or not a SentencePiece model; download it again."
        ) from error
    return processor
