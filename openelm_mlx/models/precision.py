"""Half precision on the CPU, where MLX is not as careful with it as on a GPU."""

from __future__ import annotations

import mlx.core as mx


def widen(x: mx.array) -> mx.array:
    """x in float32 on the CPU, x itself on a GPU: for an operation whose result is then cast back to x's own type.

    The GPU kernels of rotary embedding, attention and gathered products accumulate in float32 whatever they are given.
    The CPU backend computes them in the type of their input, which costs half precision a digit, or not at all in half
    precision; `gather_qmm` is also eight times as fast there in float32.
    """
    return x.astype(mx.float32) if mx.default_device() == mx.Device(mx.cpu) else x
