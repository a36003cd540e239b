"""The report and the progress of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import hub
from .gguf_verify import GgufVerification
from .merge import MergeReport
from .planned_weight import PlannedTensor
from .verify import Verification

# Stage ("download", "convert" or "verify"), what is done, and of how much.
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or after a dry run what it would do.

    destination: None after a dry run. tensors, nbytes: the output's, without headers. dtype: the floating type, of what
    is not packed when some is; of a GGUF file the type of most matrices. quantization: as config.json has it. files: name
    -> bytes of all that was written; checksums: SHA-256 of the files of weights. tokenizer: the files that were stored, ()
    when none was found. num_resumed: tensors that an interrupted conversion had already written. gguf_types: type -> number
    of a GGUF file's tensors. notes: what a user of the result should know. merge: what an adapter that was merged has kept.
    """

    source: str
    destination: Path | None
    layout: str
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    source_nbytes: int
    dtype: str
    quantization: Mapping[str, Any] | None
    chat_template: str | None = None
    tokenizer: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    num_resumed: int = 0
    verification: Verification | GgufVerification | None = None
    upload_url: str | None = None
    gguf_types: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    merge: MergeReport | None = None


class ByteCount:
    """Counts what goes to the disk."""

    def __init__(self, total: int, done: int, progress: StageProgress | None) -> None:
        self._total, self._done, self._progress = total, done, progress

    def add(self, piece: memoryview | bytes) -> memoryview | bytes:
        self._done += len(piece)
        if self._progress is not None:
            self._progress("convert", self._done, self._total)
        return piece


def bytes_of(array: mx.array) -> memoryview:
    """The array's own memory, as it goes to the file."""
    return np.array(mx.contiguous(array).view(mx.uint8), copy=False).reshape(-1).data


@contextmanager
def no_buffer_cache() -> Iterator[None]:
    """MLX caches freed buffers by size, and here nearly every tensor has a size of its own."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


def stage(name: str, progress: StageProgress | None) -> hub.Progress | None:
    """The progress callback of one stage."""
    return None if progress is None else partial(progress, name)
