"""Reading and writing SentencePiece's `tokenizer.model`, a protobuf message, without a protobuf library.

Of sentencepiece_model.proto only these fields matter here: ModelProto { pieces = 1, trainer_spec = 2,
normalizer_spec = 3 }, SentencePiece { piece = 1, score = 2, type = 3 }.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from openelm_mlx.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary: texts, scores and types of its pieces, and how text is prepared.

    is_bpe: whether it merges pairs by score. is_verbatim: text is neither normalized nor are its spaces folded.
    """

    texts: tuple[bytes, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    is_bpe: bool = True
    adds_space: bool = True
    is_verbatim: bool = True


def parse_pieces(data: bytes, origin: str) -> Pieces:
    """The vocabulary in a tokenizer.model. Raises TokenizerError if it is not one."""
    texts, scores, types = [], [], []
    model_type, adds_space, folds, table = 1, True, True, b""
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                inner = dict(_fields(value))
                texts.append(_data(inner.get(1, b"")))
                scores.append(struct.unpack("<f", _data(inner.get(2, b"\0\0\0\0")))[0])
                types.append(_number(inner.get(3, NORMAL)))
            elif field == 2:
                model_type = _number(dict(_fields(_data(value))).get(3, model_type))
            elif field == 3:
                inner = dict(_fields(_data(value)))
                adds_space, folds = bool(inner.get(3, 1)), bool(inner.get(4, 1))
                table = _data(inner.get(2, b""))
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{origin} is damaged or not a SentencePiece model: fetch it again.") from error
    return Pieces(tuple(texts), tuple(scores), tuple(types), model_type == BPE, adds_space, not folds and not table)


def write_pieces(pieces: Pieces, unknown: int, bos: int, eos: int) -> bytes:
    """A tokenizer.model of type BPE with these pieces, and byte fallback if they include byte pieces."""
    out = bytearray()
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True):
        piece = _field(1, text) + _tag(2, _FIXED32) + struct.pack("<f", score)
        out += _field(1, piece if kind == NORMAL else piece + _whole(3, kind))
    has_bytes = BYTE in pieces.types
    # 3 model_type, 4 vocab_size, 35 byte_fallback, 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id (none: -1)
    trainer = [(3, BPE), (4, len(pieces.texts)), (35, int(has_bytes)), (40, unknown), (41, bos), (42, eos), (43, -1)]
    out += _field(2, b"".join(_whole(*each) for each in trainer))
    # 1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    normalizer = [(3, int(pieces.adds_space)), (4, 0), (5, 1)]
    out += _field(3, _field(1, b"identity") + b"".join(_whole(*each) for each in normalizer))
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message. Raises ValueError or IndexError if it is malformed."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            length, position = _varint(data, position)
        if length is None or position + length > len(data):
            raise ValueError("a field ends after the message")
        yield tag >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number has no end")


def _data(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where bytes should")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes stand where a number should")
    return value


def _tag(number: int, kind: int) -> bytes:
    return _written(number << 3 | kind)


def _field(number: int, data: bytes) -> bytes:
    return _tag(number, _BYTES) + _written(len(data)) + data


def _whole(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _written(value & (2**64 - 1))


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
