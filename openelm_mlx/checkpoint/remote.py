"""A repository's checkpoint, known from its headers, which are read from the Hub without downloading the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import hub
from ..errors import CheckpointError
from ..files import refuse_pointer
from ..hub import RepoFile
from .reader import MAX_HEADER_BYTES, TensorEntry, indexed_names, parse_header

# One request brings the header of most files: OpenELM-3B's has 34 kB, a shard of gpt-oss 10 kB.
_FIRST_BYTES = 1 << 16


class RemoteCheckpoint:
    """The tensors of safetensors files in a repository; they can be listed but not read.

    files: paths in the repository. Raises HubError, and CheckpointError for a file whose header is damaged.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def __init__(self, repo: str, files: Sequence[RepoFile], revision: str | None = None) -> None:
        self.files = tuple(Path(file.name) for file in files)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            entries |= parse_header(_header(repo, file, revision), Path(file.name), file.size)
        self.entries = entries

    def read(self, name: str) -> mx.array:
        raise AssertionError(f"{name} is known by its header only: download the repository to read it")


def _header(repo: str, file: RepoFile, revision: str | None) -> bytes:
    start = hub.read_range(repo, file.name, 0, min(_FIRST_BYTES, file.size), revision)
    length = int.from_bytes(start[:8], "little")
    refuse_pointer(f"{repo}/{file.name}", start, CheckpointError)
    if len(start) < 8 or length > min(file.size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file.name} of {repo} is damaged or not a safetensors file: its owner has to replace it."
        )
    missing = 8 + length - len(start)
    if missing > 0:
        start += hub.read_range(repo, file.name, len(start), missing, revision)
    return start[8 : 8 + length]


def indexed_files(index: Mapping[str, Any], origin: str, files: Sequence[RepoFile]) -> list[RepoFile]:
    """Those of `files` that hold a model's weights, by its model.safetensors.index.json; all in the same folder.

    If the index names missing files, the whole model in one file is taken instead. Raises CheckpointError.
    """
    there = {Path(file.name).name: file for file in files}
    try:
        return [there[name] for name in indexed_names(index, origin, there)]
    except CheckpointError:
        if "model.safetensors" in there:
            return [there["model.safetensors"]]
        raise
