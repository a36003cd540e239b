"""The norm of gpt-oss. OpenELM uses MLX's own, which rounds in another place."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn


class RMSNorm(nn.Module):
    """x / rms(x) * gain, all of it in float32, rounded once at the end (gpt_oss/torch/model.py, RMSNorm).

    `mx.fast.rms_norm` with a gain of x's own type rounds before the gain as well: one result in four then differs from
    OpenAI's in bf16. With a float32 gain it returns float32. A gain that is kept in float32 saves a cast for each call.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((hidden_size,))
        self.eps = eps

    def __call__(self, x: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """x of any type -> `dtype`, or x's own."""
        return self.in_float32(x).astype(dtype or x.dtype)

    def in_float32(self, x: mx.array) -> mx.array:
        """The same without the final rounding: x of any type -> float32."""
        return mx.fast.rms_norm(x, self.weight.astype(mx.float32), self.eps)
