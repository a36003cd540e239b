"""Keys and values in 8 bits, and the attention of a few queries over them without unpacking."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..specs import KV_SCORES_BYTES, KV_UNPACK_FROM, kv_group_size

BITS = 8

UNPACK_FROM = KV_UNPACK_FROM

# With fewer queries, scores are computed for as many queries at a time as take about this many bytes.
SCORES_BYTES = KV_SCORES_BYTES


class Packed(NamedTuple):
    """Numbers (B, K, T, D), each group of a head's as whole numbers of 8 bits: q * scale + bias.

    weight (B, K, T, D / 4) uint32; scales and biases (B, K, T, D / group) in float32: in bfloat16 they would cost 6 % less
    and make half again as large an error (docs/LOG.md).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array

    @property
    def group_size(self) -> int:
        return self.weight.shape[-1] * 32 // BITS // self.scales.shape[-1]

    def unpack(self, dtype: mx.Dtype) -> mx.array:
        """The numbers themselves, (B, K, T, D)."""
        return mx.dequantize(*self, group_size=self.group_size, bits=BITS, dtype=dtype)

    def first(self, num_tokens: int) -> Packed:
        """The first tokens, (B, K, num_tokens, D)."""
        return Packed(*(part[..., :num_tokens, :] for part in self))

    def dot(self, x: mx.array, transpose: bool) -> mx.array:
        """x times the numbers as a matrix of (T, D), or (D, T) with `transpose`, in float32."""
        return mx.quantized_matmul(x, *self, transpose=transpose, group_size=self.group_size, bits=BITS)


def pack(x: mx.array) -> Packed:
    """x (B, K, T, D) in 8 bits."""
    return Packed(*mx.quantize(x.astype(mx.float32), kv_group_size(x.shape[-1]), BITS))


def attend_packed(
    queries: mx.array,
    keys: Packed,
    values: Packed,
    mask: mx.array | str | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """`attention.attend` over packed keys and values, in float32: queries (B, H, L, D), keys and values (B, K, T, D).

    Scores are computed for a few queries at a time, since they are kept in memory: H * T numbers for each query.
    """
    B, H, L, _ = queries.shape
    T = keys.weight.shape[2]
    step = max(1, SCORES_BYTES // (4 * B * H * T))
    outs: list[mx.array] = []
    for start in range(0, L, step):
        block = queries[:, :, start : start + step]
        if outs:  # frees one block's scores before the next one's are computed
            block = mx.depends([block], [outs[-1]])[0]
        visible = mask[..., start : start + step, :] if isinstance(mask, mx.array) else None
        if mask == "causal" and L > 1:
            positions = mx.arange(T)
            visible = positions <= positions[T - L + start : T - L + start + block.shape[2], None]
        outs.append(_attend_block(block, keys, values, visible, scale, sinks))
    return (mx.concatenate(outs, axis=2) if len(outs) > 1 else outs[0]).astype(queries.dtype)


def _attend_block(
    queries: mx.array,
    keys: Packed,
    values: Packed,
    visible: mx.array | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """queries (B, H, L, D) -> (B, H, L, D). The sink is one more score, whose share of the softmax has no value."""
    B, H, L, D = queries.shape
    K, T = keys.weight.shape[1:3]
    # The queries of all heads that share keys are rows of one matrix.
    rows = (scale * queries.astype(mx.float32)).reshape(B, K, H // K * L, D)
    scores = keys.dot(rows, transpose=True).reshape(B, K, H // K, L, T)
    if visible is not None:  # (L, T), or (B, 1, L, T)
        scores = mx.where(visible if visible.ndim == 2 else visible[:, :, None], scores, -mx.inf)
    total = mx.logsumexp(scores, axis=-1, keepdims=True)
    if sinks is not None:
        total = mx.logaddexp(total, sinks.astype(mx.float32).reshape(K, H // K, 1, 1))
    probs = mx.exp(scores - total)
    return values.dot(probs.reshape(B, K, H // K * L, T), transpose=False).reshape(B, H, L, D)
