"""A batch of rows through the layers of a model, for training: flat but for attention, and recomputed where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from ..models.attention import attend, causal_mask
from ..models.base import LanguageModel
from ..models.block import Block, BlockAttention

# Where layers are computed again, so many queries attend at once: of long rows, scores are the largest arrays of all.
QUERIES_AT_ONCE = 512


class Places(NamedTuple):
    """Where tokens stand, on the device: the arrays of a `Batch` that attention needs. rows is None where flat is rows.

    positions (N,), rows (R, L) or None, places (N,) or None; shape: (R, L).
    """

    positions: mx.array
    rows: mx.array | None
    places: mx.array | None
    shape: tuple[int, int]


def hidden_states(model: LanguageModel, tokens: mx.array, places: Places, checkpointing: bool = False) -> mx.array:
    """The residual stream after the last layer for tokens (N,), (N, hidden_size).

    Each token is a row of its own for the models (one token at its position), so rows of any lengths stand side by side;
    attention lays them out. checkpointing: of a layer only its input is kept, and the rest computed again for the gradient.
    """
    masks = {window: causal_mask(places.shape[1], 0, window) for window in {each.window for each in model.spec.layers}}
    if places.rows is None:  # rows as they are: one table of positions serves all of them, and all layers
        tokens = tokens.reshape(places.shape)
    h = model.embed(tokens)
    for layer, spec in zip(model.layers, model.spec.layers, strict=True):
        run = _layer(layer, masks[spec.window], places, checkpointing)
        h = _checkpointed(layer, run)(h) if checkpointing else run(h)
    return h.reshape(-1, h.shape[-1])


def _layer(layer: Block, mask: Any, places: Places, checkpointing: bool) -> Callable[[mx.array], mx.array]:
    def attended(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        if checkpointing and isinstance(mask, str) and queries.shape[2] > QUERIES_AT_ONCE:
            return _in_pieces(layer.attention, queries, keys, values)
        return layer.attention.attend(queries, keys, values, mask, None)

    def run(h: mx.array) -> mx.array:
        if places.rows is None:
            return layer.after_attention(h, attended(*layer.before_attention(h, 0)))
        queries, keys, values = (_in_rows(x, places) for x in layer.before_attention(h, places.positions))
        return layer.after_attention(h, _flat(attended(queries, keys, values), places))

    return run


def _in_pieces(attention: BlockAttention, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Causal attention, some queries at a time, each time over the keys up to them; scores are computed again."""
    sinks = attention.get("sinks")

    def piece(*arrays: mx.array) -> mx.array:
        q, k, v, *rest = arrays
        return attend(q, k, v, "causal", attention.scale, rest[0] if rest else None)

    checkpointed = mx.checkpoint(piece)
    pieces: list[mx.array] = []
    for start in range(0, queries.shape[2], QUERIES_AT_ONCE):
        stop = start + QUERIES_AT_ONCE
        arrays = [queries[:, :, start:stop], keys[:, :, :stop], values[:, :, :stop]]
        pieces.append(checkpointed(*arrays, *([] if sinks is None else [sinks])))
    return mx.concatenate(pieces, axis=2)


def _checkpointed(layer: Block, run: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`run` of this layer object alone; MLX has to be handed everything that gets a gradient."""

    def inner(parameters: dict[str, Any], h: mx.array) -> mx.array:
        layer.update(parameters)
        return run(h)

    checkpointed = mx.checkpoint(inner)

    def call(h: mx.array) -> mx.array:
        parameters = layer.trainable_parameters()
        result: mx.array = checkpointed(parameters, h)
        layer.update(parameters)
        return result

    return call


def _in_rows(x: mx.array, places: Places) -> mx.array:
    """(N, H, 1, D) -> (R, H, L, D)"""
    assert places.rows is not None
    flat = x.squeeze(2)[places.rows.flatten()]
    return flat.reshape(*places.shape, *flat.shape[1:]).swapaxes(1, 2)


def _flat(out: mx.array, places: Places) -> mx.array:
    """(R, H, L, D) -> (N, H, 1, D)"""
    assert places.places is not None
    return out.swapaxes(1, 2).flatten(0, 1)[places.places][:, :, None]
