"""Rotary position embedding, plain and stretched by YaRN."""

from __future__ import annotations

import math

import mlx.core as mx

from ..specs import YarnSpec
from .precision import widen


def rotate(x: mx.array, theta: float, offset: int | mx.array, periods: mx.array | None = None) -> mx.array:
    """Rotate the pairs (i, i + D/2) of each head by angle position * theta^(-2i/D). x: (B, H, L, D), same shape out.

    `offset` is the position of the first of the L tokens, an int or one a row (B,). `periods` (D/2,), positions per
    radian, take the place of theta's. Angles, sines and products are float32 whatever x is, and the result is rounded
    once (corenet/modeling/layers/rotary_embeddings.py).
    """
    y = mx.fast.rope(
        widen(x),
        x.shape[-1],
        traditional=False,
        base=theta if periods is None else None,
        scale=1.0,
        offset=offset,
        freqs=periods,  # MLX's "freqs" are divided by, not multiplied with
    )
    return y.astype(x.dtype)


def yarn_inverse_frequencies(head_dim: int, theta: float, yarn: YarnSpec) -> list[float]:
    """Radians per position of each of the D/2 pairs (arXiv 2309.00071, eq. 23; gpt_oss/torch/model.py).

    The ramp between the two bounds is 0 where the plain frequency stays and 1 where it is divided by the factor.
    """
    low = _pair_turning(head_dim, theta, yarn, yarn.beta_fast)
    high = _pair_turning(head_dim, theta, yarn, yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # as transformers does where the bounds meet: a step, no division by 0
    frequencies = []
    for i in range(head_dim // 2):
        plain = theta ** (-2 * i / head_dim)
        ramp = min(max((i - low) / width, 0.0), 1.0)
        frequencies.append(ramp * plain / yarn.factor + (1.0 - ramp) * plain)
    return frequencies


def rotary_periods(head_dim: int, theta: float, yarn: YarnSpec | None) -> mx.array | None:
    """What `rotate` wants as `periods`, (D/2,) float32; None where theta alone says it."""
    if yarn is None:
        return None
    return mx.array([1.0 / f for f in yarn_inverse_frequencies(head_dim, theta, yarn)], mx.float32)


def _pair_turning(head_dim: int, theta: float, yarn: YarnSpec, turns: float) -> float:
    """Which pair, as a fractional index, makes that many turns within the original context."""
    return head_dim * math.log(yarn.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
