"""Reading the header of a GGUF file: its metadata, and where each tensor is. No tensor is read.

Counts, lengths, types and offsets are checked against the size of the file before they are used. Versions 2 and 3,
little-endian, are supported, which is what every program writes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..files import open_regular, refuse_pointer, shown, unreadable
from .gguf_blocks import OTHER_TYPES, TYPE_OF_NUMBER, GgmlType

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSIONS = (2, 3)
# The vocabulary of gpt-oss with its merges takes about 10 MB; a model has hundreds of tensors.
_MOST_HEADER_BYTES = 2**28
_MOST_TENSORS = 2**16
_MOST_FIELDS = 2**16
_MOST_NUMBERS = 2**60
_LONGEST_NAME = 200  # llama.cpp's own limit is 64

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `nbytes` bytes from byte `start` of the file. shape: rows first, as everywhere else."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, read and checked."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufFile:
    """The header of the GGUF file at `path`.

    Raises CheckpointError when it is not a GGUF file, truncated or inconsistent, and when a tensor has a type that MLX
    has no equivalent of.
    """
    try:
        with open_regular(path, CheckpointError) as stream:
            return _Reader(path, stream).read()
    except OSError as error:
        raise unreadable(path, error, CheckpointError) from error


class _Reader:
    """Reads a header from beginning to end; every length is checked against the rest of the file."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._size = os.fstat(stream.fileno()).st_size
        self._position = 0

    def read(self) -> GgufFile:
        start = self._stream.read(len(MAGIC))
        if start != MAGIC:
            refuse_pointer(self._path, start + self._stream.read(32), CheckpointError)
            raise self._damaged("it does not begin with GGUF")
        self._position = len(MAGIC)
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._damaged(f"its version is {version:,}; only {' and '.join(map(str, _VERSIONS))} are supported")
        num_tensors, num_fields = self._number("<Q"), self._number("<Q")
        if num_tensors > _MOST_TENSORS or num_fields > _MOST_FIELDS:
            raise self._damaged(f"it claims {num_tensors:,} tensors and {num_fields:,} fields")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the field {shown(key)} occurs twice")
            metadata[key] = self._value(self._number("<I"))
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{self._path} is one of {metadata['split.count']} files of a model: join them with llama.cpp's "
                "`llama-gguf-split --merge` first."
            )
        found = [self._tensor() for _ in range(num_tensors)]
        return GgufFile(self._path, metadata, self._placed(found, self._alignment(metadata)))

    # --- tensors ---

    def _tensor(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        """Name, type, shape and offset of the next tensor."""
        name, num_dimensions = self._string(), self._number("<I")
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise self._damaged(f"a tensor is called {shown(name)}")
        if not 1 <= num_dimensions <= 4:
            raise self._damaged(f"tensor {shown(name)} has {num_dimensions:,} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(num_dimensions)]))
        count = 1
        for length in shape:
            count *= length
        if not 0 < count < _MOST_NUMBERS:
            raise self._damaged(f"tensor {shown(name)} has the shape {shown(list(shape))}")
        number, offset = self._number("<I"), self._number("<Q")
        kind = TYPE_OF_NUMBER.get(number)
        if kind is None:
            known = OTHER_TYPES.get(number, f"number {number}")
            raise CheckpointError(
                f"Tensor {shown(name)} in {self._path} has the type {known}, which MLX has no equivalent of: get the model in "
                f"{', '.join(each.name for each in TYPE_OF_NUMBER.values())}, or as safetensors."
            )
        if not kind.fits(shape):
            raise self._damaged(
                f"tensor {shown(name)} has {shape[-1]:,} columns, and {kind.name} has {kind.block} in a block"
            )
        return name, kind, shape, offset

    def _placed(self, found: list[tuple[str, GgmlType, tuple[int, ...], int]], alignment: int) -> dict[str, GgufTensor]:
        """The tensors with their positions, which must be inside the file and must not overlap."""
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in found:
            if name in tensors:
                raise self._damaged(f"tensor {shown(name)} occurs twice")
            if offset % alignment:
                raise self._damaged(
                    f"tensor {shown(name)} begins at {offset:,}, which is not a multiple of {alignment:,}"
                )
            tensors[name] = GgufTensor(name, kind, shape, data_start + offset, kind.nbytes(shape))
        end = data_start
        for tensor in sorted(tensors.values(), key=lambda each: each.start):
            if tensor.start < end:
                raise self._damaged(f"tensor {shown(tensor.name)} overlaps the one before it")
            end = tensor.start + tensor.nbytes
            if end > self._size:
                raise self._damaged(f"tensor {shown(tensor.name)} ends at byte {end:,} and the file has {self._size:,}")
        return tensors

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", ALIGNMENT)
        if type(value) is not int or not 1 <= value <= 2**20 or value & (value - 1):
            raise self._damaged(f"its alignment is {shown(value)}")
        return value

    # --- values ---

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._number(self._scalar(kind))

    def _array(self) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _ARRAY:
            raise self._damaged("it has an array of arrays")
        layout = None if kind == _STRING else self._scalar(kind)
        least = 8 if layout is None else struct.calcsize(layout)
        if count * least > self._left:
            raise self._damaged(f"it claims an array of {count:,} values and has {self._left:,} bytes left")
        if layout is None:
            return [self._string() for _ in range(count)]
        return np.frombuffer(self._take(count * least), layout if layout != "<?" else "?").tolist()

    def _scalar(self, kind: int) -> str:
        layout = _SCALARS.get(kind)
        if layout is None:
            raise self._damaged(f"it has a field of type {kind:,}")
        return layout

    def _string(self) -> str:
        length = self._number("<Q")
        # A token may be an incomplete character.
        return self._take(length).decode("utf-8", errors="surrogateescape")

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise self._damaged(f"its header claims {count:,} bytes where {self._left:,} are left")
        data = self._stream.read(count)
        if len(data) != count:
            raise self._damaged("its header is cut short")
        self._position += count
        return data

    @property
    def _left(self) -> int:
        return min(self._size, _MOST_HEADER_BYTES) - self._position

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged or not a GGUF file: {reason}. Download or copy it again.")
