"""The machine's limits, measured in the same run: memory bandwidth, and operations a second.

A model's rate is a share of these: decode reads every active weight once a token, prefill multiplies by each once. On a
GPU both are measured with MLX itself. MLX's CPU backend has reference kernels, so there NumPy's are measured instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.precision import runs_on_cpu

_TRIES = 5


@dataclass(frozen=True)
class Limits:
    """Bytes a second between memory and arithmetic, and operations a second in a product of matrices (two a number)."""

    bandwidth: float
    flops: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def of_bandwidth(self, bytes_per_token: float, tokens_per_second: float) -> float:
        """The share of the bandwidth that decoding at this rate uses."""
        return bytes_per_token * tokens_per_second / self.bandwidth

    def of_flops(self, operations_per_token: float, tokens_per_second: float) -> float:
        """The share of the arithmetic that prefill at this rate uses."""
        return operations_per_token * tokens_per_second / self.flops


def measured_limits(num_bytes: int | None = None, size: int | None = None) -> Limits:
    """The best of a few tries. num_bytes: of an array that is copied; size: rows and columns of a product.

    A gigabyte and 8,192 on a GPU; 256 MB and 1,024 on a CPU.
    """
    if runs_on_cpu():
        return _with_numpy(num_bytes or 2**28, size or 1024)
    return _with_mlx(num_bytes or 2**30, size or 8192)


def _with_mlx(num_bytes: int, size: int) -> Limits:
    array, matrix = mx.zeros((num_bytes // 4,), mx.uint32), mx.ones((size, size), mx.bfloat16)
    mx.eval(array, matrix)
    copy = _best_seconds(lambda: mx.eval(array + 1))
    return Limits(2 * array.nbytes / copy, 2 * size**3 / _best_seconds(lambda: mx.eval(matrix @ matrix)))


def _with_numpy(num_bytes: int, size: int) -> Limits:
    source, target = np.ones(num_bytes // 8), np.zeros(num_bytes // 8)
    matrix = np.ones((size, size), np.float32)
    copy = _best_seconds(lambda: np.copyto(target, source))
    return Limits(2 * source.nbytes / copy, 2 * size**3 / _best_seconds(lambda: matrix @ matrix))


def _best_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(_TRIES + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
