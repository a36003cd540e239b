"""A repository's checkpoint, known from its headers: what it holds is read from the Hub without downloading it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from . import hub
from .reader import MAX_HEADER_BYTES, TensorEntry, parse_header

# One request brings the header of most files: OpenELM-3B's has 34 kB, a shard of gpt-oss 10 kB.
_FIRST_BYTES = 1 << 16


class RemoteCheckpoint:
    """The tensors of safetensors files in a repository; they can be listed and not read.

    files: paths in the repository. Raises HubError, and CheckpointError for a file whose header is damaged.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, repo: str, files: Sequence[hub.RepoFile], revision: str | None = None) -> None:
        self.files = tuple(Path(file.name) for file in files)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            entries |= parse_header(_header(repo, file, revision), Path(file.name), file.size)
        self.entries = entries

    def read(self, name: str) -> mx.array:
        raise AssertionError(f"{name} is known by its header only: download the repository to read it")


def _header(repo: str, file: hub.RepoFile, revision: str | None) -> bytes:
    start = hub.read_range(repo, file.name, 0, min(_FIRST_BYTES, file.size), revision)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(file.size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file.name} of {repo} is damaged or not a safetensors file: its repository has to mend it."
        )
    missing = 8 + length - len(start)
    if missing > 0:
        start += hub.read_range(repo, file.name, len(start), missing, revision)
    return start[8 : 8 + length]


def indexed_files(index: str, files: Sequence[hub.RepoFile]) -> list[hub.RepoFile]:
    """Those of `files` that a model.safetensors.index.json (its text) names."""
    try:
        named = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "The repository's model.safetensors.index.json names no shards: it is damaged."
        ) from error
    return [file for file in files if file.name in named]
