"""What is in a checkpoint's files, known from headers alone, and one tensor at a time when it is wanted.

Two formats are read: safetensors (one file, or shards with an index) and CoreNet's PyTorch files, through PyTorch's own
weights-only loader. A pickle is never executed. `read` gives a lazy array: no byte of a tensor is touched before it is
evaluated, and then exactly that tensor's bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..errors import CheckpointError, ConfigError
from ..finder import disk_trouble

# safetensors' names of the types that weights come in, with bytes an element (huggingface/safetensors, format section).
ITEM_SIZES = {
    "F64": 8,
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
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file's header describes it: `nbytes` bytes from byte `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


class Checkpoint(Protocol):
    """A set of named tensors on disk."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def read(self, name: str) -> mx.array:
        """The tensor of that name, not evaluated yet; each call reads anew, so that nothing is kept alive here."""


class SafetensorsCheckpoint:
    """Tensors of one or several safetensors files, every header checked before any tensor is read.

    To be read by one thread. A file is open once, however many of its arrays are not evaluated yet: on macOS a program
    that was started in a Terminal may have no more than 256 files open, and a model has hundreds of tensors.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        # Lazy arrays that nobody has asked for yet. They share their file's descriptor and hold no bytes.
        self._unread: dict[Path, dict[str, mx.array]] = {}
        entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for entry in read_header(file).values():
                if entry.name in entries:
                    other = entries[entry.name].file.name
                    raise CheckpointError(f"Tensor {entry.name} stands both in {other} and in {file.name}: keep one.")
                entries[entry.name] = entry
        self.entries = entries

    def read(self, name: str) -> mx.array:
        file = self.entries[name].file
        if name not in self._unread.get(file, {}):  # the first of its file, or one that was read before
            self._unread[file] = _lazy_arrays(file)
        return self._unread[file].pop(name)  # given away: what is evaluated does not stay here


class TorchCheckpoint:
    """Tensors of a PyTorch file: CoreNet's training checkpoints. Mapped, so that only what is read is in memory."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, file: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{file.name} is a PyTorch file, and reading it needs PyTorch: pip install 'openelm_mlx[torch]'"
            ) from error
        try:
            # weights_only refuses everything but tensors and plain containers: no code in the file runs.
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (
            Exception
        ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, BadZipFile, ... by what is wrong
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{file} is no PyTorch checkpoint that can be read safely ({reason[:200]}): use a state_dict saved by "
                "torch.save, or a safetensors file."
            ) from error
        self.files = (file,)
        self._tensors = _state_dict(loaded, file)
        dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
        self.entries = {
            name: TensorEntry(name, dtypes[t.dtype], tuple(t.shape), file, 0, t.numel() * t.element_size())
            for name, t in self._tensors.items()
            if t.dtype in dtypes
        }

    def read(self, name: str) -> mx.array:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in one file of it. Raises CheckpointError when there is none that can be read."""
    files = [path] if path.is_file() else weight_files(path)
    if files[0].suffix in (".pt", ".pth"):
        return TorchCheckpoint(files[0])
    return SafetensorsCheckpoint(files)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights: an index's shards, or one safetensors file, or one PyTorch file."""
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}: check the path, or give a Hugging Face repository as owner/name."
        )
    indexes = _files_like(folder, "*.safetensors.index.json")
    if indexes:
        return _indexed_files(indexes[0])
    for pattern in ("model.safetensors", "weights.safetensors", "model*.safetensors", "*.safetensors", "*.pt", "*.pth"):
        files = _files_like(folder, pattern)
        if len(files) > 1 and pattern != "model*.safetensors":
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{folder} holds several checkpoints ({names}): give the path of the one to read.")
        if files:
            _check_numbering(folder, files)
            return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pkl", "*.npz") for file in _files_like(folder, pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as {pickles[0]}, which is not read because a pickle can run any code: "
            "look for the model's safetensors files."
        )
    raise CheckpointError(f"{folder} holds no weights: there is no safetensors or PyTorch file in it.")


def _files_like(folder: Path, pattern: str) -> list[Path]:
    """The files of such names; none that is hidden, as those that macOS writes beside others on some disks."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor in a safetensors file, in the order of their bytes; no tensor is read.

    Raises CheckpointError when the file is truncated, over-long, or its header contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, f"it has {size:,} bytes and its header should have {length:,}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return parse_header(text, file, size)


def parse_header(text: bytes, file: Path, file_size: int) -> dict[str, TensorEntry]:
    """The entries of a safetensors header (its JSON, without the 8 bytes of its length) of a file of `file_size` bytes."""
    try:
        header = json.loads(text)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        entries = [_entry(name, value, file, 8 + len(text)) for name, value in tensors.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(file, f"its header is not in the format ({error})") from error
    entries.sort(key=lambda entry: entry.start)
    position = 8 + len(text)
    for entry in entries:
        if entry.start != position:
            raise _damaged(file, f"its header places {entry.name} at byte {entry.start:,} instead of {position:,}")
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
    for file in (folder / "config.json", folder / "corenet.json", *_files_like(folder, "*.y*ml")):
        if file.is_file():
            return _read_object(file)
    raise ConfigError(
        f"{folder} has no config.json (nor CoreNet's YAML file): a model's folder holds one beside its weights."
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            value = json.loads(text)
        else:
            import yaml

            value = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"{file} is not valid {file.suffix[1:].upper()} ({error}): download or copy it again."
        ) from error
    except Exception as error:  # yaml's errors share no builtin base class
        raise ConfigError(
            f"{file} is not valid YAML ({str(error).splitlines()[0]}): download or copy it again."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, not an object with named fields.")
    return value


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" that names the shards: download or copy it again.')
    names = sorted({str(name) for name in weight_map.values()})
    if any(os.path.basename(name) != name for name in names):
        raise CheckpointError(f"{index} names shards outside its own folder: {', '.join(names)}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} shards its index names ({', '.join(missing)}): "
            "download or copy them."
        )
    return [index.parent / name for name in names]


def _check_numbering(folder: Path, files: list[Path]) -> None:
    """Raise CheckpointError when shards without an index are numbered and one is missing.

    They are counted from 1 to the number behind "of", or from 0 to it, as OpenAI does.
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
    except (RuntimeError, OSError) as error:
        trouble = disk_trouble([file]) or f"{file} cannot be read: {error}. Download or copy it again."
        raise CheckpointError(trouble) from error
    assert isinstance(arrays, dict)
    return arrays


def _entry(name: str, value: dict[str, Any], file: Path, data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), value["dtype"]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name} has shape {list(shape)} and offsets {[begin, end]}")
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name} has the type {dtype}")
    nbytes = ITEM_SIZES[dtype]
    for length in shape:
        nbytes *= length
    if end - begin != nbytes:
        raise ValueError(f"{name} is {dtype} {list(shape)}, {nbytes:,} bytes, but its offsets span {end - begin:,}")
    return TensorEntry(name, dtype, shape, file, data_start + begin, nbytes)


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or not a safetensors file: {reason}. Download or copy it again.")


def _state_dict(loaded: Any, file: Path) -> dict[str, Any]:
    """The name -> tensor part of what torch.load gave: itself, or what a training checkpoint keeps as its model."""
    import torch

    nested = (
        [loaded.get(key) for key in ("model_state_dict", "state_dict", "model")] if isinstance(loaded, dict) else []
    )
    for candidate in (loaded, *nested):
        if isinstance(candidate, dict) and candidate:
            tensors = {name: t for name, t in candidate.items() if isinstance(t, torch.Tensor)}
            if len(tensors) == len(candidate):
                return {name.removeprefix("module."): t for name, t in tensors.items()}
    raise CheckpointError(f"{file} holds no model's state_dict: expected tensors by name, as CoreNet saves them.")
