"""Rotary position embedding."""

from __future__ import annotations

import mlx.core as mx


def rotate(x: mx.array, theta: float, offset: int | mx.array) -> mx.array:
    """Rotate the pairs (i, i + D/2) of each head by angle position * theta^(-2i/D). x: (B, H, L, D), same shape out.

    `offset` is the position of the first of the L tokens, an int or one a row (B,). Angles, sines and products are
    float32 whatever x is, and the result is rounded once (corenet/modeling/layers/rotary_embeddings.py).
    """
    # The GPU kernels compute in float32 by themselves. The CPU backend builds RoPE from primitives in x's own type,
    # which costs half precision a digit, so there x is widened first.
    widen = x.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu)
    y = mx.fast.rope(
        x.astype(mx.float32) if widen else x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=offset
    )
    return y.astype(x.dtype)
