"""What differs between MLX's CPU backend and its GPU ones: half precision, compiling, and how a matrix should lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import mlx.core as mx


def runs_on_cpu() -> bool:
    """Whether MLX's CPU backend computes."""
    return mx.default_device() == mx.Device(mx.cpu)


def widen(x: mx.array) -> mx.array:
    """x in float32 on the CPU, x itself on a GPU: for an operation whose result is then cast back to x's own type.

    The GPU kernels of rotary embedding, attention and gathered products accumulate in float32 whatever they are given.
    The CPU backend computes them in the type of their input, which costs half precision a digit, or not at all in half
    precision; `gather_qmm` is also eight times as fast there in float32.
    """
    return x.astype(mx.float32) if runs_on_cpu() else x


def by_columns(matrix: mx.array) -> mx.array:
    """The same matrix (..., rows, columns), whose columns lie together in memory instead of its rows.

    `x @ matrix.T` in float32 is 2.3 times as fast then on the CPU backend, however many rows x has (docs/LOG.md).
    """
    return mx.contiguous(matrix.swapaxes(-1, -2)).swapaxes(-1, -2)


def one_kernel(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function` compiled to one kernel on a GPU. On the CPU it stays as it is.

    There MLX would call the machine's C++ compiler, which may not be installed and takes a second where it is.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arguments: mx.array | float) -> mx.array:
        return function(*arguments) if runs_on_cpu() else compiled(*arguments)

    return call
