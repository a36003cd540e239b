"""Arrays as bytes of a message, and back: no copy on the way out, one on the way in."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from .framing import LostConnectionError

# The types that a residual stream has.
_TYPES = {
    "float32": (mx.float32, np.float32),
    "float16": (mx.float16, np.float16),
    "bfloat16": (mx.bfloat16, np.uint16),
}
_NAMES = {mlx_type: name for name, (mlx_type, _) in _TYPES.items()}
MOST_DIMENSIONS = 3


def packed(array: mx.array) -> tuple[dict[str, Any], memoryview]:
    """What a header says of an array, and its bytes. Evaluates it: the bytes are wanted now."""
    mx.eval(array)
    name = _NAMES[array.dtype]
    numbers = np.asarray(array.view(mx.uint16) if name == "bfloat16" else array)
    flat: Any = np.ascontiguousarray(numbers).reshape(-1)
    return {"dtype": name, "shape": list(array.shape)}, memoryview(flat).cast("B")


def unpacked(header: dict[str, Any], body: memoryview) -> mx.array:
    """The array of a message. Raises LostConnectionError when header and bytes do not agree."""
    name, shape = header.get("dtype"), header.get("shape")
    is_shape = isinstance(shape, list) and 0 < len(shape) <= MOST_DIMENSIONS
    if not isinstance(name, str) or name not in _TYPES or not is_shape:
        raise LostConnectionError(
            f"An array of another machine is not one: its type is {name!r} and its shape {shape!r}."
        )
    assert isinstance(shape, list)
    mlx_type, stored = _TYPES[name]
    if any(type(each) is not int or each < 1 for each in shape) or math.prod(shape) * mlx_type.size != len(body):
        raise LostConnectionError(
            f"An array of another machine has {len(body):,} bytes and the shape {shape!r}: they do not agree."
        )
    array = mx.array(np.frombuffer(body, stored).reshape(shape))
    return array if array.dtype == mlx_type else array.view(mlx_type)
