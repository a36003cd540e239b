"""A prefix cache on disk: one safetensors file with a version, the model's fingerprint and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..files import one_line, open_regular, parse_json, unreadable
from ..models.buffers import Snapshot
from ..outputs import checked_output, output_file, safetensors_of
from ..runtime import runtime_of
from .prefix_cache import Entry, TurnCheckpoint

if TYPE_CHECKING:
    from ..models import Model

FORMAT = "openelm_mlx prefix cache"
VERSION = 1
_WHAT, _is_prompt_cache = "The prompt cache", safetensors_of(FORMAT)
# Numbers of each tensor in the fingerprint: any training changes some, and reading them takes milliseconds.
_SAMPLES = 64
# The format's own limit for the header, which has the tokens of all entries.
_LARGEST_HEADER = 100_000_000


def fingerprint(model: Model) -> str:
    """A hash that tells whether keys and values belong to this model: of its spec, tensors' types and shapes, some weights."""
    digest = hashlib.sha256(repr((VERSION, model.spec, model.context_length)).encode())
    # Modules that stand in a matrix's place for adapters are not seen.
    parameters = sorted((name.replace(".base.", "."), array) for name, array in tree_flatten(model.parameters()))
    if runtime_of(model).residency is not None:  # the experts in the slots change all the time
        parameters = [each for each in parameters if ".experts." not in each[0]]
    samples = [_sample(array) for _, array in parameters]
    mx.eval(samples)
    for (name, array), sample in zip(parameters, samples, strict=True):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()


def save_entries(path: Path, entries: Sequence[Entry], model: Model | None, overwrite: bool = False) -> None:
    """Write the entries into a file, completely or not at all. Raises DestinationError."""
    path = check_writable(path, overwrite)  # before everything is made into one checksum
    arrays: dict[str, mx.array] = {}
    described = [_described(entry, f"{i}", arrays) for i, entry in enumerate(entries)]
    header = {
        "fingerprint": "" if model is None else fingerprint(model),
        "entries": described,
        "checksum": _checksum(described, arrays),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "contents": json.dumps(header)}
    # A prompt is private.
    with output_file(path, _WHAT, _is_prompt_cache, overwrite, mode=0o600) as stream:
        mx.save_safetensors(stream, arrays or {"empty": mx.zeros((1,))}, metadata)


def check_writable(path: str | Path, overwrite: bool = False) -> Path:
    """Check that a prompt cache may be written to the file now, and return its path. Raises DestinationError."""
    return checked_output(path, _WHAT, _is_prompt_cache, overwrite)


def check_readable(path: Path) -> None:
    """Raise CheckpointError if the header shows that the file is damaged, truncated or of another version."""
    _, metadata = _read(path, only_header=True)
    _check_version(path, metadata)
    try:
        header = parse_json(metadata["contents"], "its description", CheckpointError)
        if not (isinstance(header["checksum"], int) and isinstance(header["fingerprint"], str)):
            raise ValueError("its description is incomplete")
        for entry in header["entries"]:
            _ = (len(entry["tokens"]), entry["num_prompt_tokens"], entry["kind"], entry["checkpoints"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, one_line(error).partition(": download")[0]) from None


def load_entries(path: Path, model: Model) -> Iterator[Entry]:
    """The entries of a file for `model`. Raises CheckpointError."""
    arrays, metadata = _read(path)
    _check_version(path, metadata)
    try:
        header = parse_json(metadata["contents"], "its description", CheckpointError)
        if header["checksum"] != _checksum(header["entries"], arrays if header["entries"] else {}):
            raise ValueError("its checksum is wrong")
        if not header["entries"]:
            return
        if header["fingerprint"] != fingerprint(model):
            raise CheckpointError(
                f"The prompt cache {path} was made with another model, other weights or another dtype: give another file, "
                "or delete it, and it will be made again."
            )
        entries = [_entry(each, f"{i}", arrays, model) for i, each in enumerate(header["entries"])]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, one_line(error)) from None
    yield from entries


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a prompt cache of this library: give another file.")
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"The prompt cache {path} has version {metadata.get('version')}, and this library reads version {VERSION}: "
            "delete it, and it will be made again."
        )


def _read(path: Path, only_header: bool = False) -> tuple[dict[str, mx.array], dict[str, str]]:
    with open_regular(path, CheckpointError) as stream:
        try:
            return _unpacked(stream, only_header)
        except OSError as error:
            raise unreadable(path, error, CheckpointError) from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(path, one_line(error).partition(": download")[0]) from None


def _unpacked(stream: BinaryIO, only_header: bool) -> tuple[dict[str, mx.array], dict[str, str]]:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size - 8, _LARGEST_HEADER):
        raise ValueError("it has been cut short")
    header = parse_json(stream.read(length), "its header", CheckpointError)
    metadata = header.pop("__metadata__")
    # Before anything is read, because a file may have any size.
    if size != 8 + length + max(each["data_offsets"][1] for each in header.values()):
        raise ValueError("it has been cut short")
    if any(each["dtype"] not in _TYPES for each in header.values()):
        raise ValueError("it has numbers of an unknown type")
    if only_header:
        return {}, metadata
    data = stream.read()
    return {name: _array(each, data) for name, each in header.items()}, metadata


_TYPES = {
    "F32": (np.float32, mx.float32), "F16": (np.float16, mx.float16), "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, mx.uint32), "I64": (np.int64, mx.int64),
}  # fmt: skip


def _array(entry: dict[str, Any], data: bytes) -> mx.array:
    start, stop = entry["data_offsets"]
    stored, wanted = _TYPES[entry["dtype"]]
    array = mx.array(np.frombuffer(data[start:stop], stored).reshape(entry["shape"]))
    return array if array.dtype == wanted else array.view(wanted)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The prompt cache {path} is damaged ({why}): delete it, and it will be made again.")


def _described(entry: Entry, name: str, arrays: dict[str, mx.array]) -> dict[str, Any]:
    """An entry's data apart from arrays, which are added to `arrays`."""
    for i, layer in enumerate(entry.cache):
        arrays |= {f"{name}.layer.{i}.{j}": array for j, array in enumerate(layer.state)}
    for c, checkpoint in enumerate(entry.checkpoints[:-1]):
        for i, snapshot in enumerate(checkpoint.layers):
            arrays |= {f"{name}.checkpoint.{c}.{i}.{j}": array for j, array in enumerate(snapshot.arrays)}
    return {
        "tokens": entry.tokens.tolist(),
        "num_prompt_tokens": entry.num_prompt_tokens,
        "kind": list(entry.kind),
        "checkpoints": [[[layer.offset, layer.end] for layer in each.layers] for each in entry.checkpoints],
    }


def _entry(described: dict[str, Any], name: str, arrays: dict[str, mx.array], model: Model) -> Entry:
    window, kv_bits, room, *adapter = described["kind"]
    cache = model.make_cache(window=window, kv_bits=kv_bits, room=room)
    places = described["checkpoints"]
    checkpoints = [
        _checkpoint(layers, [_numbered(arrays, f"{name}.checkpoint.{c}.{i}") for i in range(len(layers))])
        for c, layers in enumerate(places[:-1])
    ]
    for i, (layer, (offset, end)) in enumerate(zip(cache, places[-1], strict=True)):
        if state := _numbered(arrays, f"{name}.layer.{i}"):
            layer.state = state
            layer.restore(Snapshot(offset, end, state))
    end_checkpoint = TurnCheckpoint(tuple(layer.snapshot() for layer in cache))
    mx.eval(end_checkpoint.arrays)
    tokens = np.array(described["tokens"], np.int64)
    if len(tokens) != end_checkpoint.offset:
        raise ValueError("its tokens are not as many as its keys")
    return Entry(
        tokens, described["num_prompt_tokens"], (window, kv_bits, room, *adapter), cache, (*checkpoints, end_checkpoint)
    )


def _checkpoint(places: list[list[int]], arrays: list[tuple[mx.array, ...]]) -> TurnCheckpoint:
    return TurnCheckpoint(
        tuple(Snapshot(offset, end, each) for (offset, end), each in zip(places, arrays, strict=True))
    )


def _numbered(arrays: dict[str, mx.array], name: str) -> tuple[mx.array, ...]:
    """The arrays `name`.0, `name`.1 and so on, as many as there are."""
    found: list[mx.array] = []
    while f"{name}.{len(found)}" in arrays:
        found.append(arrays[f"{name}.{len(found)}"])
    return tuple(found)


def _sample(array: mx.array) -> mx.array:
    flat = array.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLES)][:_SAMPLES]
    return sample.astype(mx.float32) if mx.issubdtype(sample.dtype, mx.floating) else sample


def _checksum(described: list[dict[str, Any]], arrays: dict[str, mx.array]) -> int:
    total = zlib.crc32(json.dumps(described).encode())
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.shape}".encode(), total)
        total = zlib.crc32(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes(), total)
    return total
