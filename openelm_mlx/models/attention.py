"""Attention: masks (causal, sliding window, padding) and softmax with sinks."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .packed import UNPACK_FROM, Packed, attend_packed
from .precision import one_kernel, runs_on_cpu

# A score below every other one, and a number all the same.
_UNSEEN = -1e30


@dataclass(frozen=True)
class BlockMask:
    """The mask of many queries with a short window, cut into blocks of `window` queries.

    The queries of a block see nothing outside their own `window` keys and the `window` before them, so only those are
    multiplied: L * 2 * window scores instead of L * T. visible: (n, window, 2 * window), or (B, n, window, 2 * window).
    """

    visible: mx.array
    window: int


Mask = mx.array | BlockMask | str | None


def visible_keys(
    query_positions: mx.array, key_positions: mx.array, window: int | None = None, left_padding: mx.array | None = None
) -> mx.array:
    """Which keys each query sees: a boolean (L, T), or (B, 1, L, T) when rows are padded on the left.

    query_positions (L,), key_positions (T,): absolute positions; with blocks, (n, L) and (n, T), there is an n in place
    of the 1 or before L. A query sees keys up to its own position, the last `window` of them (its own included), and
    none of its row's `left_padding` (B,) first positions. Queries that are padding themselves get a plain causal mask:
    their results are never read, but a row without keys would be NaN, and NaN times a zero probability is NaN.
    """
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    if left_padding is None:
        return visible
    padding = left_padding[:, None, None, None]
    return visible & ((keys >= padding) | (queries < padding))


def causal_mask(
    L: int, offset: int, window: int | None = None, left_padding: mx.array | None = None, first: int = 0
) -> Mask:
    """The mask of L new tokens at positions from `offset` on, over the keys from `first` on, in its cheapest form.

    None when everything is visible (one token), "causal" when MLX's own causal mask is enough, a `BlockMask` for many tokens
    with a short window, else a boolean array.
    """
    T = offset + L - first
    if left_padding is None and (window is None or window >= T):
        return None if L == 1 else "causal"
    if window is not None and 2 * window <= L:
        return block_mask(L, offset, window, left_padding, first)
    return visible_keys(mx.arange(offset, offset + L), mx.arange(first, offset + L), window, left_padding)


def block_mask(L: int, offset: int, window: int, left_padding: mx.array | None = None, first: int = 0) -> BlockMask:
    """The same visibility as an array of (L, T) would have, by blocks of `window` queries."""
    starts = offset + window * mx.arange(-(-L // window))[:, None]
    query_positions, key_positions = starts + mx.arange(window), starts + mx.arange(-window, window)
    visible = visible_keys(query_positions, key_positions, window, left_padding)
    # Before the first key there is only the padding of the first block.
    return BlockMask(visible & (key_positions >= first)[:, None, :], window)


def attend(
    queries: mx.array,
    keys: mx.array | Packed,
    values: mx.array | Packed,
    mask: Mask,
    scale: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale * q k^T + mask) v, each kv head serving H/K query heads; scale is 1 / sqrt(D) when not given.

    queries (B, H, L, D), keys and values (B, K, T, D), both arrays or both packed -> (B, H, L, D). sinks (H,): one more
    logit a head, neither scaled nor masked, that takes its share of the softmax and adds no value.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(keys, Packed) or isinstance(values, Packed):
        assert isinstance(keys, Packed)
        assert isinstance(values, Packed)
        if queries.shape[2] < UNPACK_FROM and not isinstance(mask, BlockMask):
            return attend_packed(queries, keys, values, mask, scale, sinks)
        keys, values = keys.unpack(queries.dtype), values.unpack(queries.dtype)
    if isinstance(mask, BlockMask):
        return _attend_in_blocks(queries, keys, values, mask, scale, sinks)
    if queries.dtype == mx.float32 or not runs_on_cpu():  # the common case, with the least work on the host
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    q, k, v = (each.astype(mx.float32) for each in (queries, keys, values))
    return attend(q, k, v, mask, scale, None if sinks is None else sinks.astype(mx.float32)).astype(queries.dtype)


def attend_by_products(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array,
    scale: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`attend` as two products and a softmax, with a boolean mask (L, T) or (B, 1, L, T).

    For several queries on MLX's CUDA backend, where cuDNN builds a program for every shape.
    """
    B, H, L, D = queries.shape
    K = keys.shape[1]
    scale = D**-0.5 if scale is None else scale
    queries = queries if scale == 1.0 else queries * scale
    scores = (queries.reshape(B, K, -1, D) @ keys.swapaxes(-1, -2)).reshape(B, H, L, -1)
    if sinks is None:
        # The products have rounded the scores already; the softmax is float32 inside.
        seen = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(seen, axis=-1, precise=True)
    else:
        weights = _softmax_with_sinks(_masked(scores, mask), sinks[:, None, None], values.dtype)
    weights = weights.reshape(B, K, -1, keys.shape[2])
    return (weights @ values).reshape(B, H, L, values.shape[-1])


@one_kernel
def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    """In float32, with what is not seen far below everything."""
    return mx.where(mask, scores.astype(mx.float32), _UNSEEN)


def _softmax_with_sinks(scores: mx.array, sinks: mx.array, dtype: mx.Dtype) -> mx.array:
    """Of scores in float32; the weights in `dtype`. Two sums and maxima, and what is elementwise in one kernel each."""
    largest = mx.max(scores, axis=-1, keepdims=True)
    weights = _exponentials(scores, largest, sinks)
    return _over_sum(weights, mx.sum(weights, axis=-1, keepdims=True), largest, sinks).astype(dtype)


@one_kernel
def _exponentials(scores: mx.array, largest: mx.array, sinks: mx.array) -> mx.array:
    return mx.exp(scores - mx.maximum(largest, sinks.astype(mx.float32)))


@one_kernel
def _over_sum(weights: mx.array, total: mx.array, largest: mx.array, sinks: mx.array) -> mx.array:
    """In the type of the sinks, which is the layer's."""
    wide = sinks.astype(mx.float32)
    return (weights / (total + mx.exp(wide - mx.maximum(largest, wide)))).astype(sinks.dtype)


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """(B, L, n * D) -> (B, n, L, D); also (B, n * D), one token a row, -> (B, n, 1, D)."""
    if x.ndim == 2 or x.shape[1] == 1:
        return x.reshape(x.shape[0], -1, 1, head_dim)
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def merge_heads(out: mx.array, like: mx.array) -> mx.array:
    """(B, H, L, D) -> (B, L, H * D), or (B, H * D) where `like`, the layer's input, has one token a row too."""
    if out.shape[2] == 1:
        return out.reshape(*like.shape[:-1], -1)
    return out.swapaxes(1, 2).reshape(*like.shape[:-1], -1)


def _attend_in_blocks(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: BlockMask,
    scale: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """`attend`, each block of queries being a row of a larger batch."""
    B, H, L, D = queries.shape
    window, n = mask.window, mask.visible.shape[-3]
    visible = mx.broadcast_to(mask.visible, (B, n, window, 2 * window)).flatten(0, 1)[:, None]
    queries = _padded(queries, 0, n * window - L).reshape(B, H, n, window, D).swapaxes(1, 2).flatten(0, 1)
    keys, values = _key_blocks(keys, L, window, n), _key_blocks(values, L, window, n)
    out = attend(queries, keys, values, visible, scale, sinks)
    return out.reshape(B, n, H, window, D).swapaxes(1, 2).reshape(B, H, n * window, D)[..., :L, :]


def _key_blocks(keys: mx.array, L: int, window: int, n: int) -> mx.array:
    """The `window` keys of each of n blocks and those before. (B, K, T, D) -> (B * n, K, 2 * window, D)"""
    B, K, T, D = keys.shape
    before = min(T - L, window)
    blocks = _padded(keys[..., T - L - before :, :], window - before, n * window - L).reshape(B, K, n + 1, window, D)
    pairs = mx.concatenate([blocks[:, :, :-1], blocks[:, :, 1:]], axis=3)
    return pairs.swapaxes(1, 2).flatten(0, 1)


def _padded(x: mx.array, front: int, back: int) -> mx.array:
    """x (B, H, T, D) with zeros before and behind its T tokens."""
    return mx.pad(x, [(0, 0), (0, 0), (front, back), (0, 0)]) if front or back else x
