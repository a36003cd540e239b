"""Which keys a query may see, and the attention over them."""

from __future__ import annotations

import mlx.core as mx

from .precision import widen

Mask = mx.array | str | None


def visible_keys(
    query_positions: mx.array, key_positions: mx.array, window: int | None = None, left_padding: mx.array | None = None
) -> mx.array:
    """Which keys each query sees: a boolean (L, T), or (B, 1, L, T) when rows are padded on the left.

    query_positions (L,), key_positions (T,): absolute positions. A query sees keys up to its own position, the last
    `window` of them (its own included), and none of its row's `left_padding` (B,) first positions. Queries that are
    padding themselves see plain causal keys: what they compute is never read, but a row that sees nothing would be
    NaN, and NaN times a zero probability is NaN.
    """
    queries, keys = query_positions[:, None], key_positions[None, :]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    if left_padding is None:
        return visible
    padding = left_padding[:, None, None, None]
    return visible & ((keys >= padding) | (queries < padding))


def causal_mask(L: int, offset: int, window: int | None = None, left_padding: mx.array | None = None) -> Mask:
    """The mask of L new tokens that follow `offset` cached ones, in the cheapest form that says it.

    None when everything is visible (one token), "causal" when MLX's own causal form does, else a boolean array.
    """
    if left_padding is None and (window is None or offset + L <= window):
        return None if L == 1 else "causal"
    return visible_keys(mx.arange(offset, offset + L), mx.arange(offset + L), window, left_padding)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    scale: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale * q k^T + mask) v, each kv head serving H/K query heads; scale is 1 / sqrt(D) when not given.

    queries (B, H, L, D), keys and values (B, K, T, D) -> (B, H, L, D). sinks (H,): one more logit a head, neither
    scaled nor masked, that takes its share of the softmax and adds no value.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = widen(queries), widen(keys), widen(values)
    sinks = None if sinks is None else widen(sinks)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks).astype(queries.dtype)
