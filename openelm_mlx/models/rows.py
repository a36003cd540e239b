"""One flat pass for several requests: every product over all their tokens, attention for each over its own cache.

Decoding requests bring one token each, a draft several, a prompt a chunk. A product over N rows gives each row what it
would get alone (bit for bit on the CPU backend), so that only attention has to know who is who. This form, with the
caches apart, fits every kind of cache and is the reference for any other one (models/slots.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from .attention import Mask, attend_by_products, visible_keys
from .base import LanguageModel, WalkInParts
from .block import LayerThrottle
from .cache import Cache, KVCache, LayerCache, seen_by_last
from .prompt_products import num_padding, queries_in_a_block, uses_products
from .quantized_cache import QuantizedKVCache
from .slot_step import slot_logits
from .slots import SlotBank


@dataclass
class Rows:
    """The new tokens of one request in a flat pass.

    cache: the request's own, extended by `length` tokens. is_prompt: a chunk of a prompt, of which nothing but keys and
    values is wanted, and with `wants_logits` the logits of its last token. Of other tokens all logits are wanted.
    """

    cache: Cache
    length: int = 1
    is_prompt: bool = False
    wants_logits: bool = True

    @property
    def num_logits(self) -> int:
        """How many rows of logits come of it."""
        if self.is_prompt and self.length > 1:
            return 1 if self.wants_logits else 0
        return self.length


def flat_logits(
    model: LanguageModel,
    tokens: mx.array,
    rows: Sequence[Rows],
    throttle: LayerThrottle | None = None,
    bank: SlotBank | None = None,
    padding: int = 0,
) -> mx.array | None:
    """The logits (R, V) of those of the flat `tokens` (M,) that want any, in their order; None where none does.

    tokens: one for each row of `bank`, whose step has begun, and then of each of `rows` its own. Of the bank all slots have
    logits, those of the last of their rows. throttle: see `LanguageModel.run_layers`. padding: so many rows that are nobody's
    go with them through all layers but the last (`KernelChoices.pads_rows`). Lazy, but for what the throttle waits for.
    """
    if bank is not None and bank.has_kernel and not rows and not model.is_followed:
        return slot_logits(model, tokens, bank, throttle)
    if padding:
        tokens = mx.pad(tokens, (0, padding))
    walk = RowsWalk(model, rows, model.embed(tokens), throttle, bank, padding)
    if not model.is_followed:
        return walk.logits()
    walk.run(0, len(walk.layers))
    return walk.h if model.remote is None else walk.head_of(model.remote.rows(walk.h, rows))


def positions_of(rows: Sequence[Rows], bank: SlotBank | None = None, padding: int = 0) -> mx.array:
    """The position of every flat row, (M,), and 0 for so many rows that are nobody's."""
    starts = [each.cache[0].offset for each in rows]
    in_slots = np.zeros(0, np.int64) if bank is None else bank.row_positions
    spans = [np.arange(start, start + each.length) for start, each in zip(starts, rows, strict=True)]
    return mx.array(np.concatenate([in_slots, *spans, np.zeros(padding, np.int64)]))


class RowsWalk(WalkInParts):
    """The walk of M flat rows through the layers. h (M, hidden_size): the residual stream as far as it has come."""

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Rows],
        h: mx.array | None,
        throttle: LayerThrottle | None = None,
        bank: SlotBank | None = None,
        padding: int = 0,
    ) -> None:
        super().__init__(model, cast(mx.array, h), None, 1, throttle=throttle)
        self._model = model
        self.positions = positions_of(rows, bank, padding)
        self._rows, self._bank, self._padding = rows, bank, padding
        self._num_bank_rows = 0 if bank is None else bank.num_rows
        self._masks_of: list[dict[int | None, Mask]] = [{} for _ in rows]
        self._masks_of_products: list[dict[int | None, mx.array]] = [{} for _ in rows]
        self._products_to, self._pads = model.choices.prompt_products_to, model.choices.pads_rows

    def logits(self) -> mx.array | None:
        """Through all layers and the head: the logits (R, V) of the rows that want them."""
        last = len(self.layers) - 1
        self.run(0, last)
        x, queries, keys, values = self.enter(last)
        wanted: list[int] = []
        outs: list[mx.array] = []
        start = self._num_bank_rows
        if start:
            assert self._bank is not None
            wanted += self._bank.last_rows
            outs.append(self._attend_slots(last, queries, keys, values, self._bank.last))
        for at, rows in enumerate(self._rows):
            stop = start + rows.length
            if rows.is_prompt and rows.length > 1:
                end = self._end_of_prompt(last, rows, queries[start:stop], keys[start:stop], values[start:stop])
                if end is not None:
                    wanted.append(stop - 1)
                    outs.append(end)
            else:
                wanted += range(start, stop)
                outs.append(self._attend_rows(last, at, start, queries, keys, values))
            start = stop
        if not wanted:
            return None
        adapters = self._model.adapters
        selection = adapters.selection
        if len(wanted) < x.shape[0]:
            x = x[mx.array(wanted)]
            selection = selection.taking(wanted)
        with adapters.using(selection):
            return self._model.head(self.layers[last].after_attention(x, _joined(outs)))

    def head_of(self, h: mx.array | None) -> mx.array | None:
        """The logits of what other machines gave for the rows that want any, (R, hidden_size)."""
        if h is None:
            return None
        taken, start = [], 0
        for rows in self._rows:
            stop = start + rows.length
            taken += list(range(stop - rows.num_logits, stop))
            start = stop
        adapters = self._model.adapters
        with adapters.using(adapters.selection.taking(taken)):
            return self._model.head(h)

    def attend(self, i: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        outs, start = [], self._num_bank_rows
        if start:
            outs.append(self._attend_slots(i, queries, keys, values))
        for at, rows in enumerate(self._rows):
            stop = start + rows.length
            outs.append(self._attend_rows(i, at, start, queries, keys, values))
            start = stop
        if self._padding:
            outs.append(mx.zeros((self._padding, *outs[0].shape[1:]), outs[0].dtype))
        return _joined(outs)

    def _offset_in(self, i: int) -> mx.array:
        return self.positions

    def _written_in(self, i: int) -> list[mx.array]:
        return [buffer for rows in self._rows if rows.is_prompt for buffer in rows.cache[i].buffers]

    def _attend_slots(
        self, i: int, queries: mx.array, keys: mx.array, values: mx.array, last: mx.array | None = None
    ) -> mx.array:
        """The attention of all rows that are in slots, (M, H, 1, D), which stand first; of those the `last` alone."""
        assert self._bank is not None
        count = self._num_bank_rows
        if queries.shape[0] > count:
            queries, keys, values = queries[:count], keys[:count], values[:count]
        return self._bank.attend(i, self.layers[i].attention, queries, keys, values, last)

    def _attend_rows(
        self, i: int, at: int, start: int, queries: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array:
        """The attention of one request's tokens, (n, H, 1, D), over its own cache: the flat rows from `start` on."""
        rows = self._rows[at]
        stop, cache, attention = start + rows.length, rows.cache[i], self.layers[i].attention
        own = queries[start:stop], keys[start:stop], values[start:stop]
        if self._uses_products(rows, i):
            return self._by_products(i, at, queries[start:], *own[1:])
        window = self._specs[i].window
        if window not in self._masks_of[at]:
            self._masks_of[at][window] = cache.make_mask(rows.length, False, window)
        mask = self._masks_of[at][window]
        if rows.length == 1:
            return attention.attend(*own, mask, cache)
        queries, keys, values = (each.swapaxes(0, 2) for each in own)
        return attention.attend(queries, keys, values, mask, cache).swapaxes(0, 2)

    def _uses_products(self, rows: Rows, i: int) -> bool:
        """Whether layer `i` attends to a chunk of a prompt by products: see `KernelChoices.prompt_products_to`."""
        if not rows.is_prompt or rows.length == 1 or isinstance(rows.cache[i], QuantizedKVCache):
            return False
        length, num_keys = self._rounded(rows.length), self._rounded(rows.cache[i].offset + rows.length)
        return uses_products(self._specs[i].num_heads, length, num_keys, self._products_to)

    def _by_products(self, i: int, at: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """The attention of a chunk of a prompt, (n, H, 1, D); a block of its queries at a time.

        queries: the chunk's and those of all rows after it; keys, values (n, K, 1, D): its own.
        """
        rows, window = self._rows[at], self._specs[i].window
        cache, attention = rows.cache[i], self.layers[i].attention
        offset = cache.offset
        if window not in self._masks_of_products[at]:
            self._masks_of_products[at][window] = self._mask_of_products(rows, cache, window, queries.shape[0])
        mask = self._masks_of_products[at][window]
        seen_keys, seen_values = cast(
            "tuple[mx.array, mx.array]", cache.update_and_fetch(keys.swapaxes(0, 2), values.swapaxes(0, 2))
        )
        length, num_keys = mask.shape
        if num_keys > seen_keys.shape[2]:
            seen_keys, seen_values = cast(KVCache, cache).places(num_keys)
        queries = queries[:length].swapaxes(0, 2)
        block = queries_in_a_block(queries.shape[1], num_keys, self._products_to)
        outs = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            # Without a window, nobody in the block sees what comes after its last token.
            end = min(num_keys, self._rounded(offset + stop)) if window is None else num_keys
            some = queries[:, :, start:stop], seen_keys[:, :, :end], seen_values[:, :, :end], mask[start:stop, :end]
            outs.append(attend_by_products(*some, attention.scale, attention.sinks))
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)
        return out.swapaxes(0, 2)[: rows.length]

    def _mask_of_products(self, rows: Rows, cache: LayerCache, window: int | None, most: int) -> mx.array:
        """Which keys a chunk's queries see, (L, T).

        Where shapes are to be few (`KernelChoices.pads_rows`), with queries of the rows that come next, of which there are
        `most` with the chunk's own, and keys of places that nobody has written into.
        """
        num_keys = self._rounded(cache.offset + rows.length)
        if not self._pads or not isinstance(cache, KVCache) or num_keys > cache.capacity_for(rows.length):
            return cast(mx.array, cache.make_mask(rows.length, True, window))
        length = min(self._rounded(rows.length), most)
        return visible_keys(mx.arange(cache.offset, cache.offset + length), mx.arange(num_keys))

    def _rounded(self, count: int) -> int:
        """Up to one of few numbers, where shapes are to be few."""
        return count + num_padding(count) if self._pads else count

    def _end_of_prompt(
        self, i: int, rows: Rows, queries: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array | None:
        """The last layer of a chunk of a prompt: keys and values, and the attention (1, H, 1, D) of its last token."""
        cache = rows.cache[i]
        seen_keys, seen_values = cast(
            "tuple[mx.array, mx.array]", cache.update_and_fetch(keys.swapaxes(0, 2), values.swapaxes(0, 2))
        )
        if not rows.wants_logits:
            return None
        seen = seen_by_last(cache, seen_keys, seen_values)
        return self.layers[i].attention.attend_over(queries[-1:], *seen, None)


def _joined(outs: Sequence[mx.array]) -> mx.array:
    return outs[0] if len(outs) == 1 else mx.concatenate(list(outs))
