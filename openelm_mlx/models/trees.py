"""One pass over trees of tokens: texts that begin alike share their first tokens, and each of those is computed once.

A question with four answers is a tree with four branches. All products are over the flat tokens of all trees, so that no
padding is computed and each token has its own position; attention alone lays the trees out in rows, where a token sees its
ancestors and what all trees have before them, the trunk, which is in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .attention import attend_by_products
from .base import LanguageModel, WalkInParts
from .block import LayerThrottle
from .cache import Cache, LayerCache
from .packed import pack
from .precision import runs_on_cpu
from .quantized_cache import QuantizedKVCache
from .remote_cache import RemoteCache

# In a tree without a token before it.
NO_PARENT = -1


@dataclass(frozen=True)
class Forest:
    """Trees of tokens, flat: a token stands behind its parent, and a tree in one piece.

    tokens, parents, depths (M,): parents are flat indices, NO_PARENT for a tree's first token; a first token's depth is 0.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Layout:
    """Rows of attention: which flat token stands in each place, and in which place each flat token stands.

    sources (R, L): flat indices; a place without a token has some other one's. places (M,): r * L + column.
    visible (R, L, L): whether a place's query sees a place's key. depths (R, L).
    """

    sources: np.ndarray
    places: np.ndarray
    visible: np.ndarray
    depths: np.ndarray


def lay_out(forest: Forest, num_before: int) -> Layout:
    """Rows for the trees of `forest`, with `num_before` keys before each of them.

    A row without a trunk is as long as the longest tree. A long trunk is repeated for every row, so that then several
    trees share one: on a GPU scores between trees that do not see each other cost less than more copies of the trunk. On
    the CPU a copied number costs about as much as a multiplication, of which scores take many.
    """
    starts = np.flatnonzero(forest.parents == NO_PARENT)
    lengths = np.diff([*starts, len(forest)])
    shared = math.isqrt(num_before) if runs_on_cpu() else num_before
    width = max(int(lengths.max()), min(len(forest), shared))
    rows = np.empty(len(starts), np.int64)
    columns = np.empty(len(starts), np.int64)
    used: list[int] = []  # of each row
    # The long ones first: then short ones find the places that they leave.
    for tree in np.argsort(-lengths, kind="stable"):
        length = int(lengths[tree])
        row = next((r for r, n in enumerate(used) if n + length <= width), len(used))
        if row == len(used):
            used.append(0)
        rows[tree], columns[tree] = row, used[row]
        used[row] += length
    shift = np.repeat(rows * width + columns - starts, lengths)
    places = np.arange(len(forest)) + shift
    sources = np.zeros(len(used) * width, np.int64)
    sources[places] = np.arange(len(forest))
    depths = np.zeros(len(used) * width, np.int64)
    depths[places] = forest.depths
    visible = np.zeros((len(used) * width, width), bool)
    column = places % width
    for i, parent in enumerate(forest.parents):
        if parent != NO_PARENT:
            visible[places[i]] = visible[places[parent]]
        visible[places[i], column[i]] = True
    shape = len(used), width
    empty = ~visible.any(axis=-1)
    visible[empty, 0] = True  # a query without keys would be NaN
    return Layout(sources.reshape(shape), places, visible.reshape(*shape, width), depths.reshape(shape))


class TreeWalk(WalkInParts):
    """The walk of a forest through the layers.

    trunk: what every tree has before it; nothing is written to it. h (M, hidden_size): the residual stream so far.
    """

    def __init__(
        self, model: LanguageModel, trunk: Cache, forest: Forest, throttle: LayerThrottle | None = None
    ) -> None:
        super().__init__(model, model.embed(mx.array(forest.tokens)), trunk, 1, throttle=throttle)
        self._products_to = model.choices.prompt_products_to
        self.trunk = trunk
        self.offset = trunk[0].offset
        self.positions = mx.array(self.offset + forest.depths)
        self._visible: dict[int | None, mx.array] = {}  # by window
        self._layout = layout = lay_out(forest, self.offset)
        self._sources, self._places = mx.array(layout.sources.ravel()), mx.array(layout.places)
        # One row with every token in its order needs no rearranging.
        self._is_in_order = bool(layout.sources.size == len(forest) and (layout.places[1:] > layout.places[:-1]).all())

    def through_all(self, wanted: Sequence[int]) -> mx.array:
        """The residual stream (W, hidden_size) of the `wanted` flat tokens after the last layer."""
        last = len(self.layers) - 1
        self.run(0, last)
        x, queries, keys, values = self.enter(last)
        out = self.attend(last, queries, keys, values)
        if len(wanted) < x.shape[0]:
            rows = mx.array(np.asarray(wanted))
            x, out = x[rows], out[rows]
        return self.layers[last].after_attention(x, out)

    def attend(self, i: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        cache, window = self.trunk[i], self._specs[i].window
        if isinstance(cache, QuantizedKVCache):  # as if they had been read from there
            keys, values = pack(keys).unpack(keys.dtype), pack(values).unpack(values.dtype)
        queries, keys, values = (self._in_rows(each) for each in (queries, keys, values))
        if self.offset:
            before = before_trees(cache, keys.dtype)
            rows = keys.shape[0]
            keys, values = (
                mx.concatenate([mx.broadcast_to(old, (rows, *old.shape[1:])), new], axis=2)
                for old, new in zip(before, (keys, values), strict=True)
            )
        mask = self._visible.get(window)
        if mask is None:
            self._visible[window] = mask = self._mask(window)
        attention = self.layers[i].attention
        # Every pass has shapes of its own: see `KernelChoices.prompt_products_to`.
        if math.prod(queries.shape[:3]) * keys.shape[2] <= self._products_to:
            return self._flat(attend_by_products(queries, keys, values, mask, attention.scale, attention.sinks))
        return self._flat(attention.attend_over(queries, keys, values, mask))

    def _offset_in(self, i: int) -> mx.array:
        return self.positions

    def _written_in(self, i: int) -> list[mx.array]:
        return []

    def _in_rows(self, x: mx.array) -> mx.array:
        """(M, H, 1, D) -> (R, H, L, D)"""
        if not self._is_in_order:
            x = x[self._sources]
        rows, length = self._layout.sources.shape
        return x.reshape(rows, length, x.shape[1], x.shape[3]).swapaxes(1, 2)

    def _flat(self, out: mx.array) -> mx.array:
        """(R, H, L, D) -> (M, H, 1, D)"""
        out = out.swapaxes(1, 2).flatten(0, 1)[:, :, None]
        return out if self._is_in_order else out[self._places]

    def _mask(self, window: int | None) -> mx.array:
        """(R, 1, L, T + L): what each place sees of the trunk and of its row."""
        layout = self._layout
        rows, length = layout.depths.shape
        num_before = self.offset if window is None else min(self.offset, window)
        visible, before = layout.visible, np.ones((rows, length, num_before), bool)
        if window is not None and self.offset + layout.depths.max() >= window:
            queries = layout.depths[:, :, None]
            visible = visible & (layout.depths[:, None, :] > queries - window)
            before = np.arange(-num_before, 0) > queries - window
        return mx.array(np.concatenate([before, visible], axis=-1)[:, None])


def before_trees(cache: LayerCache, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Keys and values of a trunk in the order of positions, (1, K, T, D); of a ring those of its last `window` tokens."""
    if isinstance(cache, QuantizedKVCache):
        assert cache.keys is not None
        assert cache.values is not None
        return cache.keys.first(cache.offset).unpack(dtype), cache.values.first(cache.offset).unpack(dtype)
    assert not isinstance(cache, RemoteCache), "its keys are on another machine"
    return cache.in_order()
