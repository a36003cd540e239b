"""A pass of nobody but those who have slots (models/slots.py): one token of each, or several, as of prompts."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..specs import ModelSpec
from .base import LanguageModel
from .block import BlockAttention, LayerThrottle
from .cache import Cache, KVCache, SlidingKVCache
from .slot_attention import attend_in_slots
from .slot_sizes import LONGEST_IN_SLOTS


class SlotStep(Protocol):
    """What the layers are told of a step. rows (M, 2), positions (M,): see `SlotBank`.

    last (S,): of each slot the row of its last token, of which alone something is wanted; None where those are all rows.
    """

    rows: mx.array
    positions: mx.array
    last: mx.array | None

    def write(self, i: int, new: mx.array) -> tuple[mx.array, mx.array | None]:
        """Put the new keys and values (M, 2 K, D) into layer `i`.

        Its buffer (2, S, K, T, D), and what attention has to wait for (`write_in_slots`), for `attend_in_slots`.
        """


def fits_in_slots(cache: Cache, spec: ModelSpec) -> bool:
    """Whether a request with this cache can be in a bank: it keeps what every layer asks for, unquantized, one row."""
    return cache[0].offset <= LONGEST_IN_SLOTS and all(
        (isinstance(layer, KVCache) and each.window is None)
        or (isinstance(layer, SlidingKVCache) and layer.window == layer.capacity == each.window)
        for layer, each in zip(cache, spec.layers, strict=True)
    )


def slot_logits(
    model: LanguageModel, tokens: mx.array, step: SlotStep, throttle: LayerThrottle | None = None
) -> mx.array:
    """The logits (S, V) after each slot's last token, of the tokens (M,) of the step's rows.

    The same operations, however many tokens each slot brings. throttle: see `LanguageModel.run_layers`.
    """
    return through_layers(model, tokens, step, 0, len(model.layers), throttle)


def through_layers(
    model: LanguageModel, x: mx.array, step: SlotStep, start: int, stop: int, throttle: LayerThrottle | None = None
) -> mx.array:
    """A part of `slot_logits`: the layers start ... stop - 1, from the residual stream (M, hidden_size) to the same after them.

    Before the first layer `x` are the tokens (M,); after the last one come the logits (S, V).
    """
    adapters, last = model.adapters, None
    selection = adapters.selection
    if start == 0:
        x = model.embed(x)
    for i in range(start, stop):
        layer = model.layers[i]
        queries, new = layer.before_slots(x, step.positions)
        buffer, written = step.write(i, new)
        if i == len(model.layers) - 1 and step.last is not None:
            last = step.last
            x, selection = x[last], selection.taking(last)
        out = attend_to_last(layer.attention, queries, buffer, step.rows, last, model.spec.layers[i].window, written)
        with adapters.using(selection):
            x = layer.after_attention(x, out)
        if throttle is not None:
            throttle([x], True)
    if stop < len(model.layers):
        return x
    with adapters.using(selection):
        return model.head(x)


def attend_to_last(
    attention: BlockAttention,
    queries: mx.array,
    buffer: mx.array,
    rows: mx.array,
    last: mx.array | None,
    window: int | None,
    written: mx.array | None,
) -> mx.array:
    """`attend_in_slots` for a layer; of the rows `last` alone where that is given."""
    if last is not None:
        queries, rows = queries[last], rows[last]
    return attend_in_slots(queries, buffer, rows, attention.full_scale, attention.sinks, window, written)
