"""Verifying a GGUF file: read back with the `gguf` package, every tensor is compared with the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.gguf_writer import gguf_package
from ..checkpoint.quantize import PARTS, unpacked
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import file_checksum
from ..errors import ConversionError
from .gguf_plan import GgufPlan, GgufWeight
from .planned_weight import rows_in_a_slice

# The largest relative rms error that rounding to a type may cause.
_MOST_ERROR = {
    "F16": 1e-3,
    "BF16": 5e-3,
    "Q8_0": 0.02,
    "Q5_0": 0.1,
    "Q5_1": 0.1,
    "Q4_0": 0.2,
    "Q4_1": 0.2,
    "MXFP4": 0.35,
}
# code * scale + bias in float32 may differ in the last bit, depending on the order of operations.
_LAST_DIGIT = 2.0**-21


@dataclass(frozen=True)
class GgufVerification:
    """The result of verifying a GGUF file.

    checksums: SHA-256 of the file, the same as when it was written. num_exact: how many of the num_tensors equal the
    source. errors: type -> the largest relative rms error of a tensor that was rounded to it.
    """

    checksums: Mapping[str, str]
    num_tensors: int
    num_exact: int
    errors: Mapping[str, float]


def verify_gguf(
    path: Path,
    checksum: str,
    plan: GgufPlan,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
) -> GgufVerification:
    """Compare every tensor of the file with the source's.

    Raises ConversionError when the checksum, a name, a shape or a type is wrong, or a number differs by more than its
    type explains.
    """
    if file_checksum(path) != checksum:
        raise ConversionError(
            f"{path.name} does not read back as it was written, and was removed: the disk may be failing; convert again, to "
            "another disk if you have one."
        )
    gguf = gguf_package()
    reader = gguf.GGUFReader(path)
    # The reader says where the tensors are; their bytes are read in slices, so that the file is never in memory as a whole.
    places = {
        tensor.name: (tensor.data_offset, tensor.tensor_type.name, _rows_first(tensor)) for tensor in reader.tensors
    }
    del reader
    wanted = {weight.tensor.name: weight for weight in plan.weights}
    if places.keys() != wanted.keys():
        raise ConversionError(f"{path.name} does not have the tensors that were written: convert again.")
    errors: dict[str, float] = {}
    num_exact = 0
    for number, (name, weight) in enumerate(wanted.items()):
        if progress is not None:
            progress(number, len(wanted))
        start, kind, shape = places[name]
        if (kind, shape) != (weight.kind.name, weight.tensor.shape):
            raise ConversionError(f"{name} in {path.name} reads back as {kind} {list(shape)}: convert again.")
        error = _error(path, start, weight, checkpoint, gguf)
        if weight.is_exact:
            num_exact += 1
        else:
            errors[kind] = max(errors.get(kind, 0.0), error)
    if progress is not None:
        progress(len(wanted), len(wanted))
    return GgufVerification({path.name: checksum}, len(wanted), num_exact, errors)


def _error(path: Path, start: int, weight: GgufWeight, checkpoint: Checkpoint, gguf: Any) -> float:
    """The relative rms error of a tensor. Raises ConversionError if it is too large."""
    kind, shape = weight.kind, weight.tensor.shape
    ggml = gguf.GGMLQuantizationType[kind.name]
    arrays = weight.weight.read(checkpoint)
    packing = weight.packing or weight.weight.unpack
    row_bytes = kind.nbytes(shape) // shape[0]
    step, difference, size, most, largest = rows_in_a_slice(shape), 0.0, 0.0, 0.0, 0.0
    with path.open("rb") as stream:
        stream.seek(start)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            data = np.frombuffer(stream.read(count * row_bytes), np.uint8)
            data = data if len(shape) == 1 else data.reshape(count, *shape[1:-1], -1)
            found = gguf.quants.dequantize(data, ggml).astype(np.float32)
            rows = [array[first : first + count] for array in arrays]
            plain = rows[0] if packing is None else unpacked(packing, dict(zip(PARTS, rows, strict=False)))
            original = np.array(plain.astype(mx.float32)).reshape(found.shape)
            gap = np.abs(found - original)
            most, largest = max(most, float(gap.max())), max(largest, float(np.abs(original).max()))
            difference += float(np.square(gap, dtype=np.float64).sum())
            size += float(np.square(original, dtype=np.float64).sum())
    error = (difference / size) ** 0.5 if size else float(difference > 0)
    is_affine = packing is not None and packing.mode == "affine"
    allowed = largest * _LAST_DIGIT if is_affine else 0.0
    if (weight.is_exact and most > allowed) or error > _MOST_ERROR.get(kind.name, 0.0) + _LAST_DIGIT:
        raise ConversionError(
            f"{weight.tensor.name} in {path.name} differs from the source (relative error {error:.1e} as {kind.name}): "
            "convert again, and open an issue if that does not help."
        )
    return error


def _rows_first(tensor: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in reversed(tensor.shape.tolist()))
