"""Which keys a query may see, and the attention over them."""

from __future__ import annotations

import mlx.core as mx

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


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """softmax(q k^T / sqrt(D) + mask) v, each kv head serving H/K query heads.

    queries (B, H, L, D), keys and values (B, K, T, D) -> (B, H, L, D).
    """
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask)
