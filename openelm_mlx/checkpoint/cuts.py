"""A part of a tensor: some ranges of one of its axes, read alone where they are long runs of bytes in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .gpt_oss_layouts import interleaved_rows, packed_words, transposed
from .reader import Checkpoint, SafetensorsCheckpoint

# Shorter runs of bytes are read with what lies between them: a disk reads whole pages anyway.
LEAST_RUN_BYTES = 2**16

Range = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """What is kept of an array: these ranges (start, stop) of one axis, in this order."""

    axis: int
    ranges: tuple[Range, ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is kept of an array of shape `whole`."""
        kept = sum(stop - start for start, stop in self.ranges)
        return (*whole[: self.axis], kept, *whole[self.axis + 1 :])

    def of(self, array: mx.array) -> mx.array:
        """What is kept, in memory of its own once it is evaluated: the rest of the array is not kept with it."""
        pieces = []
        for start, stop in self.ranges:
            index = (*[slice(None)] * self.axis, slice(start, stop))
            pieces.append(array[index])
        return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces, axis=self.axis)


def read_cut(
    checkpoint: Checkpoint, sources: Sequence[str], make: Callable[..., mx.array] | None, cut: Cut
) -> mx.array:
    """The parameter that `make` gives of the checkpoint's tensors `sources`, cut.

    Where `make` leaves it at that, the tensors are cut as they are read; else each of them is read whole and let go.
    """
    of_sources = _before(make, cut)
    if of_sources is None:
        arrays = [checkpoint.read(source) for source in sources]
        assert make is not None
        return cut.of(make(*arrays))
    arrays = [_read_part(checkpoint, source, of_sources) for source in sources]
    return arrays[0] if make is None else make(*arrays)


def _before(make: Callable[..., Any] | None, cut: Cut) -> Cut | None:
    """The cut of each source that has the same effect; None where there is none."""
    if make is None or (make is packed_words and cut.axis < 2):
        return cut
    if make in (interleaved_rows, transposed) and cut.axis == 0:  # whole experts
        return cut
    if make is interleaved_rows and cut.axis == 1 and not any(each % 2 for pair in cut.ranges for each in pair):
        return Cut(1, tuple((start // 2, stop // 2) for start, stop in cut.ranges))
    return None


def _read_part(checkpoint: Checkpoint, name: str, cut: Cut) -> mx.array:
    shape, nbytes = checkpoint.entries[name].shape, checkpoint.entries[name].nbytes
    each = nbytes
    for length in shape[: cut.axis + 1]:
        each //= length
    shortest = min(stop - start for start, stop in cut.ranges) * each
    if isinstance(checkpoint, SafetensorsCheckpoint) and shortest >= LEAST_RUN_BYTES:
        return checkpoint.read_ranges(name, cut.axis, cut.ranges)
    return cut.of(checkpoint.read(name))
