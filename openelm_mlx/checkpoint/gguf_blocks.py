"""GGUF's block formats that MLX has an equivalent of, converted both ways by moving codes and scales, without rounding.

A block holds 32 numbers of a row. A byte of 4-bit codes holds number i of the first half (low) and of the second half
(high) in ggml, and two neighbours in MLX and in OpenAI's files. The numbers stay the same to the bit:

    type        bytes  layout                              number                MLX
    MXFP4          17  scale (E8M0), 16 x two codes        E2M1 * 2^(e - 127)    mxfp4, groups of 32
    Q4_1, Q5_1  20 24  scale, min (float16), codes         code * d + m          affine, 4 and 5 bits
    Q4_0, Q5_0  18 22  scale (float16), codes              (code - 8 or 16) * d  affine, bias = -8 d, -16 d
    Q8_0           34  scale (float16), 32 signed bytes    code * d              affine, 8 bits, bias = -128 d

Only NumPy is used here, on a slice of a tensor at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .quantize import Quantization

BLOCK = 32
Bytes = np.ndarray[Any, Any]  # of uint8


@dataclass(frozen=True)
class GgmlType:
    """A tensor type of GGUF. number: its id in files. block_bytes: the size of `block` numbers.

    bits: of a code; None for a floating type. centre: the code of 0, for types without a minimum. safetensors: the
    name of the same floating type in safetensors.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    safetensors: str | None = None
    bits: int | None = None
    centre: int | None = None

    @property
    def packing(self) -> Quantization | None:
        """MLX's packing of the same numbers; None for a floating type."""
        if self.bits is None:
            return None
        return Quantization(4, BLOCK, "mxfp4") if self.name == "MXFP4" else Quantization(self.bits, BLOCK)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape, whose rows are whole blocks."""
        count = 1
        for length in shape:
            count *= length
        return count // self.block * self.block_bytes

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the rows of that shape are whole blocks."""
        return bool(shape) and shape[-1] % self.block == 0


TYPES = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 0, 1, 4, "F32"),
        GgmlType("F16", 1, 1, 2, "F16"),
        GgmlType("BF16", 30, 1, 2, "BF16"),
        GgmlType("Q4_0", 2, BLOCK, 18, bits=4, centre=8),
        GgmlType("Q4_1", 3, BLOCK, 20, bits=4),
        GgmlType("Q5_0", 6, BLOCK, 22, bits=5, centre=16),
        GgmlType("Q5_1", 7, BLOCK, 24, bits=5),
        GgmlType("Q8_0", 8, BLOCK, 34, bits=8, centre=128),
        GgmlType("MXFP4", 39, BLOCK, 17, bits=4),
    )
}
TYPE_OF_NUMBER = {kind.number: kind for kind in TYPES.values()}
# Types without an equivalent in MLX, for error messages.
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


# --- MLX's words and codes --------------------------------------------------------------------------------------------


def codes_of(words: npt.NDArray[np.uint32], bits: int) -> Bytes:
    """MLX's packed words (..., columns * bits / 32) -> one code a byte, (..., columns)."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 4:
        return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    # A row is one stream of bits, lowest bit first.
    each = np.unpackbits(data, axis=-1, bitorder="little").reshape(*data.shape[:-1], -1, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (each * weights).sum(axis=-1, dtype=np.uint8)


def words_of(codes: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """One code a byte (..., columns) -> MLX's packed words."""
    if bits == 8:
        data = codes
    elif bits == 4:
        data = codes[..., ::2] | (codes[..., 1::2] << 4)
    else:
        each = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        data = np.packbits(each.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(data).view(np.uint32)


# --- blocks -----------------------------------------------------------------------------------------------------------


def to_blocks(
    kind: GgmlType, words: npt.NDArray[np.uint32], scales: npt.NDArray[np.generic], biases: npt.NDArray[np.generic] | None,
    packing: Quantization,
) -> Bytes:  # fmt: skip
    """Rows packed by MLX -> the same numbers in ggml's blocks, (..., columns / 32 * block_bytes).

    scales, biases: E8M0 bytes, or numbers that fit float16 exactly (`carrier` checks that and chooses the type).
    """
    columns: list[Bytes] = []
    if kind.name == "MXFP4":
        columns.append(scales.astype(np.uint8)[..., None])
    else:
        repeats = packing.group_size // BLOCK
        numbers = [scales] if kind.centre is not None else [scales, biases]
        for each in numbers:
            assert each is not None
            repeated = np.repeat(each.astype(np.float16), repeats, axis=-1)
            columns.append(np.ascontiguousarray(repeated[..., None]).view(np.uint8))
    if packing.bits == 4:  # nibbles are moved bytewise, which is much faster than code by code
        return _joined([*columns, _to_halves(np.ascontiguousarray(words).view(np.uint8))])
    codes = codes_of(words, packing.bits)
    codes = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    if kind.bits == 8:
        return _joined([*columns, codes ^ 128])  # 0 to 255 around 128 -> -128 to 127
    if kind.bits == 5:
        columns.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
    low = codes & 15
    return _joined([*columns, low[..., :16] | (low[..., 16:] << 4)])


def from_blocks(kind: GgmlType, blocks: Bytes, part: str) -> npt.NDArray[np.generic]:
    """One part of MLX's packing, "weight", "scales" or "biases", of rows of blocks (..., n * block_bytes).

    Raises ValueError when a scale is too large for MLX's packing.
    """
    each = blocks.reshape(*blocks.shape[:-1], -1, kind.block_bytes)
    if kind.name == "MXFP4":
        return np.ascontiguousarray(each[..., 0]) if part == "scales" else _words(_to_neighbours(each[..., 1:]))
    if part != "weight":
        return _scales(kind, each, part)
    start = 2 if kind.centre is not None else 4
    if kind.bits == 8:
        return _words(each[..., start:] ^ 128)
    if kind.bits == 4:
        return _words(_to_neighbours(each[..., start:]))
    high = np.unpackbits(each[..., start : start + 4], axis=-1, bitorder="little") << 4
    low = each[..., start + 4 :]
    codes = np.concatenate([low & 15, low >> 4], axis=-1) | high
    return words_of(codes.reshape(*blocks.shape[:-1], -1), 5)


def carrier(
    packing: Quantization, scales: npt.NDArray[np.float32], biases: npt.NDArray[np.float32] | None
) -> GgmlType | None:
    """The GGUF type that represents a packing with these scales and biases exactly; None if there is none."""
    if packing.mode == "mxfp4":
        return TYPES["MXFP4"]
    if packing.mode != "affine" or packing.group_size % BLOCK or biases is None:
        return None
    if not (_is_float16(scales) and _is_float16(biases)):
        return None
    for name, largest in (("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8)):
        kind = TYPES[name]
        if packing.bits == largest and np.array_equal(biases, -np.float32(kind.centre or 0) * scales):
            return kind
    if packing.bits <= 4:
        return TYPES["Q4_1"]
    return TYPES["Q5_1"] if packing.bits == 5 else None


def _is_float16(values: npt.NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _scales(kind: GgmlType, each: Bytes, part: str) -> npt.NDArray[np.generic]:
    if part == "biases" and kind.centre is None:
        return np.ascontiguousarray(each[..., 2:4]).view(np.float16)[..., 0]
    scales: npt.NDArray[np.float16] = np.ascontiguousarray(each[..., :2]).view(np.float16)[..., 0]
    if part == "scales":
        return scales
    # Multiplying by a power of two is exact unless it overflows.
    with np.errstate(over="ignore"):
        biases: npt.NDArray[np.float16] = scales * np.float16(-(kind.centre or 0))
    if np.any(np.isinf(biases) & np.isfinite(scales)):
        raise ValueError("a scale is too large for MLX's packing")
    return biases


def _to_halves(data: Bytes) -> Bytes:
    """Neighbouring codes in a byte (..., n * 16) -> blocks' bytes (..., n, 16): the first half low, the second high."""
    pairs = data.reshape(*data.shape[:-1], -1, 2, 8)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    blocks = np.empty((*pairs.shape[:-2], 16), np.uint8)
    blocks[..., ::2] = (first & 15) | (second << 4)
    blocks[..., 1::2] = (first >> 4) | (second & 240)
    return blocks


def _to_neighbours(blocks: Bytes) -> Bytes:
    """The inverse of `_to_halves`, (..., n, 16) -> (..., n, 16)."""
    even, odd = blocks[..., ::2], blocks[..., 1::2]
    return np.concatenate([(even & 15) | (odd << 4), (even >> 4) | (odd & 240)], axis=-1)


def _words(blocks: Bytes) -> npt.NDArray[np.uint32]:
    """Bytes of blocks (..., n, bytes) as MLX's words."""
    return np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1).view(np.uint32)


def _joined(parts: list[Bytes]) -> Bytes:
    """Columns of blocks (..., n, bytes each) -> rows of bytes."""
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)
