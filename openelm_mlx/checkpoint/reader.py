"""Reading a checkpoint: its tensors are known from the headers alone, and read one at a time when needed.

Two formats are read: safetensors (one file, or shards with an index) and CoreNet's PyTorch files (torch_file.py).
`read` gives a lazy array: no byte of a tensor is touched before it is evaluated, and then exactly that tensor's bytes.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ConfigError
from ..files import files_in, open_regular, parse_json, read_object, read_yaml, refuse_pointer, shown, unreadable
from ..finder import disk_trouble, is_named, is_same_name, same_file

# safetensors' names of the types that weights come in, with bytes an element (huggingface/safetensors, format section).
ITEM_SIZES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
}
# The format's other types, with bits an element: no weight of a model read here has them, so MLX need not either.
OTHER_BITS = {"F64": 64, "U64": 64, "C64": 64, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_MLX_TYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I64": mx.int64, "I32": mx.int32, "U32": mx.uint32,
    "I16": mx.int16, "U16": mx.uint16, "I8": mx.int8, "U8": mx.uint8,
}  # fmt: skip
# The format allows 100 MB; the largest header of a model read here has about 100 kB.
MAX_HEADER_BYTES = 2**24
_MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file's header describes it: `nbytes` bytes from byte `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def is_usable(self) -> bool:
        """Whether the tensor has a type that weights come in."""
        return self.dtype in ITEM_SIZES


class Checkpoint(Protocol):
    """A set of named tensors on disk."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def read(self, name: str) -> mx.array:
        """The tensor of that name, not evaluated yet. Each call makes a new array, so nothing is kept alive here."""


class SafetensorsCheckpoint:
    """Tensors of one or several safetensors files, every header checked before any tensor is read.

    Only one thread may read. A file is opened once, however many of its arrays are not evaluated yet: on macOS a program
    started in a Terminal may have at most 256 files open, and a model has hundreds of tensors.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        # Lazy arrays that were not read yet. They share their file's descriptor and hold no bytes.
        self._unread: dict[Path, dict[str, mx.array]] = {}
        entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for entry in read_header(file).values():
                if entry.name in entries:
                    other = entries[entry.name].file.name
                    raise CheckpointError(f"Tensor {entry.name} is in both {other} and {file.name}: keep one.")
                entries[entry.name] = entry
        self.entries = entries
        self._odd_files = {entry.file for entry in entries.values() if not entry.is_usable}

    def read(self, name: str) -> mx.array:
        entry = self.entries[name]
        if entry.file in self._odd_files:
            return _read_now(entry)
        if name not in self._unread.get(entry.file, {}):  # the first of its file, or one that was read before
            self._unread[entry.file] = _lazy_arrays(entry.file)
        array = self._unread[entry.file].pop(name, None)  # handed over: an evaluated array is not kept here
        if array is None or array.shape != entry.shape or array.dtype != _MLX_TYPES[entry.dtype]:
            raise CheckpointError(f"{entry.file} has changed since its header was read: restore it, or load it again.")
        return array

    def read_ranges(self, name: str, axis: int, ranges: Sequence[tuple[int, int]]) -> mx.array:
        """Of the tensor of that name only these ranges (start, stop) of an axis, side by side; nothing else is read.

        Evaluated at once. For long runs of bytes: each range of each outer row is read by itself.
        """
        entry = self.entries[name]
        *outer, length = entry.shape[: axis + 1]
        rows = math.prod(outer)
        each = entry.nbytes // max(1, rows * length)
        data = np.empty((rows, sum(stop - start for start, stop in ranges) * each), np.uint8)
        try:
            with open_regular(entry.file, CheckpointError) as stream:
                for row in range(rows):
                    done = 0
                    for start, stop in ranges:
                        stream.seek(entry.start + (row * length + start) * each)
                        part = stream.read((stop - start) * each)
                        if len(part) != (stop - start) * each:
                            raise _ends_within(entry)
                        data[row, done : done + len(part)] = np.frombuffer(part, np.uint8)
                        done += len(part)
        except OSError as error:
            raise unreadable(entry.file, error, CheckpointError) from error
        kept = data.nbytes // max(1, rows * each)
        return mx.array(data).view(_MLX_TYPES[entry.dtype]).reshape(*outer, kept, *entry.shape[axis + 1 :])


def _ends_within(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(f"{entry.file} ends within {entry.name}: download or copy it again.")


def _read_now(entry: TensorEntry) -> mx.array:
    """One tensor from a file that MLX refuses, because other tensors in it have types that MLX does not know."""
    try:
        with open_regular(entry.file, CheckpointError) as stream:
            stream.seek(entry.start)
            data = np.frombuffer(stream.read(entry.nbytes), np.uint8)
    except OSError as error:
        raise unreadable(entry.file, error, CheckpointError) from error
    if len(data) != entry.nbytes:
        raise _ends_within(entry)
    return mx.array(data).view(_MLX_TYPES[entry.dtype]).reshape(entry.shape)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in one file. Raises CheckpointError when there is none that can be read."""
    files = weight_files(path) if path.is_dir() or not os.path.lexists(path) else [path]
    if files[0].suffix in (".pt", ".pth"):
        from .torch_file import TorchCheckpoint  # few have one

        return TorchCheckpoint(files[0])
    return SafetensorsCheckpoint(files)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights: an index's shards, or one safetensors file, or one PyTorch file.

    An index that names missing files is ignored if the whole model is beside it in one file.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}: check the path, or give a Hugging Face repository as owner/name."
        )
    indexes = files_in(folder, "*.safetensors.index.json", CheckpointError)
    if indexes:
        return _indexed_files(indexes[0])
    for pattern in ("model.safetensors", "weights.safetensors", "model*.safetensors", "*.safetensors", "*.pt", "*.pth"):
        files = files_in(folder, pattern, CheckpointError)
        if len(files) > 1 and pattern != "model*.safetensors":
            names = ", ".join(file.name for file in files[:8])
            raise CheckpointError(f"{folder} holds several checkpoints ({names}): give the path of the one to read.")
        if files:
            _check_numbering(folder, files)
            return files
    pickles = sorted(
        file.name for each in ("*.bin", "*.pkl", "*.npz") for file in files_in(folder, each, CheckpointError)
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as {pickles[0]}, which is not read because a pickle can run any code: "
            "look for the model's safetensors files."
        )
    others = files_in(folder, "*.gguf", CheckpointError)
    advice = ""
    if others:
        advice = f"; `openelm_mlx convert {shlex.quote(str(others[0]))} FOLDER` makes a folder of its GGUF file"
    raise CheckpointError(f"{folder} holds no weights: there is no safetensors or PyTorch file in it{advice}.")


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor in a safetensors file, in the order of their bytes; no tensor is read.

    Raises CheckpointError when it is not a file, truncated, over-long, or its header contradicts itself.
    """
    try:
        with open_regular(file, CheckpointError) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                refuse_pointer(file, prefix + stream.read(32), CheckpointError)
                raise _damaged(file, f"it has {size:,} bytes and its header should have {length:,}")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error, CheckpointError) from error
    return parse_header(text, file, size)


def parse_header(text: bytes, file: Path, file_size: int) -> dict[str, TensorEntry]:
    """The entries of a safetensors header (its JSON, without the 8 bytes of its length) of a file of `file_size` bytes."""
    try:
        header = parse_json(text, "it", CheckpointError)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        entries = [_entry(name, value, file, 8 + len(text)) for name, value in tensors.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition(": download")[0]
        raise _damaged(file, f"its header is not in the format ({reason})") from error
    entries.sort(key=lambda entry: entry.start)
    position = 8 + len(text)
    for entry in entries:
        if entry.start != position:
            raise _damaged(
                file, f"its header places {shown(entry.name)} at byte {entry.start:,} instead of {position:,}"
            )
        position += entry.nbytes
    if position != file_size:
        raise _damaged(file, f"its header describes {position:,} bytes and the file has {file_size:,}")
    return {entry.name: entry for entry in entries}


def read_config(path: Path) -> dict[str, Any]:
    """The model's config as a dictionary: config.json, corenet.json, or CoreNet's YAML, beside the weights at `path`."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}: check the path, or give a Hugging Face repository as owner/name."
        )
    named = [file for name in ("config.json", "corenet.json") if os.path.lexists(file := folder / name)]
    for file in named or files_in(folder, "*.y*ml", ConfigError):
        return _read_object(file)
    if others := files_in(folder, "*.gguf", ConfigError):
        raise ConfigError(
            f"{folder} has no config.json, and a GGUF file: `openelm_mlx convert {shlex.quote(str(others[0]))} FOLDER` makes a "
            "folder of it."
        )
    if os.path.lexists(folder / "adapter_config.json"):
        raise ConfigError(
            f"{folder} is an adapter and no model: load the model that it was trained beside, with adapter= (--adapter) for it."
        )
    raise ConfigError(
        f"{folder} has no config.json (nor CoreNet's YAML file): a model's folder holds one beside its weights."
    )


def _read_object(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return read_object(file, ConfigError)
    value = read_yaml(file, ConfigError)
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, not an object with named fields.")
    return value


def _indexed_files(index: Path) -> list[Path]:
    whole = index.parent / "model.safetensors"
    there = {file.name for file in files_in(index.parent, "*.safetensors", CheckpointError)}
    try:
        named = _read_object(index)
        return _apart(index.parent / name for name in indexed_names(named, str(index), _Volume(index.parent, there)))
    except (CheckpointError, ConfigError):
        if whole.name in there:
            return [whole]
        raise


class _Volume(frozenset[str]):
    """The names in a folder, compared as its volume compares them: perhaps ignoring case and the form of accents."""

    folder: Path

    def __new__(cls, folder: Path, names: Collection[str]) -> _Volume:
        self = super().__new__(cls, names)
        self.folder = folder
        return self

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and is_named(self.folder, name, self))


def _apart(files: Iterable[Path]) -> list[Path]:
    """The files, each once: two spellings in an index may be the same file on this volume."""
    found: list[Path] = []
    for file in files:
        if not any(same_file(file, other) for other in found if is_same_name(file.name, other.name)):
            found.append(file)
    return found


def indexed_names(index: Mapping[str, Any], origin: str, there: Collection[str]) -> list[str]:
    """The files that an index names for its tensors; `there` are the names of the files in its folder.

    Raises CheckpointError when the index names no files, names files outside its folder, or some are missing.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{origin} has no "weight_map" that names the shards: download or copy it again.')
    values = list(weight_map.values())
    if not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{origin} does not name its shards as texts: download or copy it again.")
    names = sorted(set(values))
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
        raise CheckpointError(f"{origin} names shards outside its own folder: {shown(names)}.")
    missing = [name for name in names if name not in there]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise CheckpointError(
            f"The folder of {origin} lacks {len(missing)} of the {len(names)} shards its index names "
            f"({', '.join(map(shown, missing[:8]))}{more}): download or copy them."
        )
    return names


def _check_numbering(folder: Path, files: list[Path]) -> None:
    """Raise CheckpointError when shards without an index are numbered and one is missing.

    They are numbered from 1 to the number after "of", or from 0 as OpenAI does.
    """
    found = [re.search(r"-(\d+)-of-(\d+)\.", file.name) for file in files]
    numbers = {int(match[1]) for match in found if match}
    last = max((int(match[2]) for match in found if match), default=0)
    missing = sorted(set(range(1, last + 1)) - numbers)
    if missing:
        raise CheckpointError(
            f"{folder} has {len(numbers)} parts of a checkpoint, and part {', '.join(map(str, missing))} of {last} is "
            "missing: download or copy it."
        )


def _lazy_arrays(file: Path) -> dict[str, mx.array]:
    """All of a file's tensors, none of them read; the file is open until the last of them is evaluated or gone."""
    try:
        arrays = mx.load(str(file), format="safetensors")
    except (RuntimeError, OSError, UnicodeError) as error:
        trouble = disk_trouble([file]) or f"{file} cannot be read: {error}. Download or copy it again."
        raise CheckpointError(trouble) from error
    assert isinstance(arrays, dict)
    return arrays


def _entry(name: str, value: dict[str, Any], file: Path, data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), value["dtype"]
    sizes = (begin, end, *shape)
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**60 for n in sizes):
        raise ValueError(f"{shown(name)} has shape {shown(list(shape))} and offsets {shown([begin, end])}")
    bits = 8 * ITEM_SIZES[dtype] if dtype in ITEM_SIZES else OTHER_BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{shown(name)} has the type {shown(dtype)}")
    for length in shape:
        bits *= length
    nbytes = -(-bits // 8)
    if end - begin != nbytes:
        raise ValueError(
            f"{shown(name)} is {dtype} {shown(list(shape))}, {nbytes:,} bytes, but its offsets span {end - begin:,}"
        )
    return TensorEntry(name, dtype, shape, file, data_start + begin, nbytes)


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or not a safetensors file: {reason}. Download or copy it again.")
