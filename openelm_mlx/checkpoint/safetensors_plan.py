"""Which safetensors files a checkpoint consists of: tensors divided into files, headers, and the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .destination import check_destination
from .reader import ITEM_SIZES

# 5 GB is the usual size of shards, and the largest file that the Hub sends in one piece.
MAX_FILE_BYTES = 5_000_000_000
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: `dtype` is safetensors' name of its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        nbytes = ITEM_SIZES[self.dtype]
        for length in self.shape:
            nbytes *= length
        return nbytes


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written: its tensors in the order of their bytes."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the tensors: the length of the JSON (8 bytes), and the JSON, padded with spaces."""
        table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        position = 0
        for tensor in self.tensors:
            offsets = [position, position + tensor.nbytes]
            table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_files(tensors: Iterable[OutputTensor], max_file_bytes: int = MAX_FILE_BYTES) -> tuple[OutputFile, ...]:
    """Divide tensors, in their order, into files of at most `max_file_bytes` (a larger tensor gets a file of its own).

    The names are those of Hugging Face: model.safetensors, or model-00001-of-00003.safetensors and so on.
    """
    files: list[list[OutputTensor]] = [[]]
    room = max_file_bytes
    for tensor in tensors:
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = max_file_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    count = len(files)
    return tuple(
        OutputFile(
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", _aligned(file)
        )
        for number, file in enumerate(files, start=1)
    )


def index_of(files: Sequence[OutputFile]) -> bytes:
    """The model.safetensors.index.json of several files: which file each tensor is in."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _aligned(tensors: Sequence[OutputTensor]) -> tuple[OutputTensor, ...]:
    """The tensors in an order in which each begins at a multiple of its item's size, as PyTorch's loader needs it.

    The format has no room for padding. So the few tensors that do not end at a multiple of 8 bytes come last, those
    with the widest items first.
    """
    even = [tensor for tensor in tensors if tensor.nbytes % _ALIGNMENT == 0]
    odd = [tensor for tensor in tensors if tensor.nbytes % _ALIGNMENT]
    return (*even, *sorted(odd, key=lambda tensor: -ITEM_SIZES[tensor.dtype]))


def write_sparse(destination: Path, files: Sequence[OutputFile], others: Mapping[str, bytes]) -> Path:
    """Write sparse files with real headers: the tensors read as zeros and take no space on most file systems."""
    check_destination(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for file in files:
        with (destination / file.name).open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    for name, content in others.items():
        (destination / name).write_bytes(content)
    return destination
