"""One weight on its way from the source to the output: unpacked, merged with an adapter, cast and packed.

It goes some rows at a time, so that only the source's tensor is in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..checkpoint.layouts import Parameter
from ..checkpoint.quantize import NOT_A_SCALE, PARTS, Quantization, unpacked
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, ConversionError
from ..finder import disk_trouble
from ..placement import DTYPES
from .merge import DeltaSums, Merge

Shape = tuple[int, ...]

# A weight is cast and packed this many numbers at a time.
SLICE_ELEMENTS = 4 * 2**20
# MLX's type -> the name that users write.
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output and what it is made of. Types are safetensors' names, `nbytes` the new size."""

    name: str
    shape: Shape
    dtype: str
    nbytes: int
    sources: tuple[str, ...]
    source_shape: Shape
    source_dtype: str


@dataclass(frozen=True)
class PlannedWeight:
    """One parameter on its way from the source to one tensor, or to the parts of a packed one.

    sources: a plain parameter, or the parts of a packed one, which `unpack` makes plain. dtype: what it is cast to.
    pack: how it is packed then. shape: of the parameter, in the rows that are written; of a part, where the parts stay apart.
    merge: what is added to it while it is plain.
    """

    sources: tuple[Parameter, ...]
    tensors: tuple[PlannedTensor, ...]
    shape: Shape
    dtype: mx.Dtype | None = None
    unpack: Quantization | None = None
    pack: Quantization | None = None
    merge: Merge | None = None

    def slices(self, checkpoint: Checkpoint) -> Iterator[list[mx.array]]:
        """The output tensors' arrays, some rows at a time, evaluated: in each item one array a tensor.

        Raises CheckpointError for NaN or infinity, in scales of one byte too, ConversionError for numbers too large for
        the new type.
        """
        for start, plain in self._plain_slices(checkpoint):
            plain = plain if self.merge is None else self.merge.rows(plain, start)
            cast = plain if self.dtype is None else plain.astype(self.dtype)
            arrays = [cast] if self.pack is None else list(self.pack.quantize(cast).values())
            finite = mx.all(cast != NOT_A_SCALE if self._is_byte_scales else mx.isfinite(cast))
            mx.eval(finite, arrays)  # slice by slice: each one's memory is freed before the next
            if not finite.item():
                raise self._not_finite(plain, checkpoint)
            yield arrays

    def kept_delta(self, checkpoint: Checkpoint) -> DeltaSums:
        """What is left of what is merged into it, in the arrays that `slices` gives. Raises CheckpointError."""
        assert self.merge is not None
        sums = DeltaSums()
        for start, plain in self._plain_slices(checkpoint):
            merged = self.merge.rows(plain, start)
            written = merged if self.dtype is None else merged.astype(self.dtype)
            if self.pack is not None:
                written = unpacked(self.pack, self.pack.quantize(written))
            sums.add(plain.astype(mx.float32), merged, written.astype(mx.float32))
        return sums

    def _plain_slices(self, checkpoint: Checkpoint) -> Iterator[tuple[int, mx.array]]:
        """Some rows at a time, unpacked, with the number of the first one. Lazy, but for the sources."""
        sources = self.read(checkpoint)
        num_rows = self.shape[0]
        step = rows_in_a_slice(self.shape)
        for start in range(0, num_rows, step):
            rows = [source[start : min(start + step, num_rows)] for source in sources]
            yield start, rows[0] if self.unpack is None else unpacked(self.unpack, dict(zip(PARTS, rows, strict=False)))

    def read(self, checkpoint: Checkpoint) -> list[mx.array]:
        """The parts, whole and evaluated. Raises CheckpointError where the file cannot be read to its end."""
        arrays = [source.read(checkpoint) for source in self.sources]
        try:
            mx.eval(arrays)
        except RuntimeError as error:  # MLX reads the file here
            file = checkpoint.entries[self.sources[0].sources[0]].file
            raise CheckpointError(
                disk_trouble([file]) or f"{file} could not be read to its end ({error}): download or copy it again."
            ) from error
        return arrays

    @property
    def _is_byte_scales(self) -> bool:
        return self.sources[0].name.endswith(".scales") and self.sources[0].dtype == "U8"

    def _not_finite(self, plain: mx.array, checkpoint: Checkpoint) -> CheckpointError | ConversionError:
        source = self.sources[0].sources[0]
        if self._is_byte_scales:
            return CheckpointError(
                f"Tensor {source} in {checkpoint.entries[source].file} has a byte of 255, which stands for no number (NaN): "
                "the file is damaged; download or copy it again."
            )
        if not mx.all(mx.isfinite(plain)).item():
            return CheckpointError(
                f"Tensor {source} in {checkpoint.entries[source].file} holds NaN or infinity: the weights are damaged or "
                "their training diverged; download or copy them again."
            )
        largest = mx.max(mx.abs(plain.astype(mx.float32))).item()
        return ConversionError(
            f"Tensor {source} holds {largest:.3g}, which is more than {DTYPE_WORDS[self.dtype or plain.dtype]} has: "
            "use bfloat16."
        )


def rows_in_a_slice(shape: Shape) -> int:
    """How many rows of an array of `shape` are worked on at a time."""
    return max(1, SLICE_ELEMENTS // math.prod(shape[1:]))
