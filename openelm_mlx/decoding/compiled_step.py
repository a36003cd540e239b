"""The decode step as one compiled graph: traced once, run for token after token.

Tracing needs shapes and Python numbers that stay the same, so positions are arrays here, keys and values lie in buffers
of fixed size, and attention reads a whole bucket of places, those past the position masked. A step is traced anew only
when the position enters another bucket, or a ring fills up for the first time. Buffers are those of the ordinary caches
and go back into them after every step, so that whoever rewinds, copies or measures a cache finds nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..models.attention import Mask, visible_keys
from ..models.cache import Cache, KVCache, SlidingKVCache
from ..models.precision import runs_on_cpu
from .sampling import Sampler
from .step import PlainStep, Step

if TYPE_CHECKING:
    from ..models import Model

# Attention reads whole buckets: larger ones read more for nothing, smaller ones are traced more often.
BUCKET = 256

# Graphs kept for a model; each holds its own nodes, some thousand, and no weights.
MOST_GRAPHS = 32

# (token, position, buffers, a sampler's arrays) -> (logits, next position, buffers, its choice and state)
Traced = Callable[..., Any]


class CompiledStep:
    """`PlainStep` as one `mx.compile`d graph. The same arithmetic, but for attention over masked places.

    model: its parameters are part of the graph; changing them afterwards needs a new model. compile: False runs the
    same graph untraced, which is what the tests compare. Only for caches that `can_compile` accepts.
    """

    runs_ahead = True

    def __init__(self, model: Model, cache: Cache, compile: bool = True) -> None:
        self.model, self.cache, self._compile = model, cache, compile
        self._position: mx.array | None = None
        self._expected = -1  # the offset that `_position` stands for
        self._traced = _traced_steps(model)

    def __call__(self, token: mx.array) -> mx.array:
        return self._run(token, None)[0]

    def choose(self, token: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
        """As every step's; the choice is part of the graph."""
        logits, (chosen, key, in_answer) = self._run(token, sampler)
        sampler.state = key, in_answer
        return logits, chosen

    def _run(self, token: mx.array, sampler: Sampler | None) -> tuple[mx.array, Any]:
        """The logits, and what `sampler` makes of them: its choice and its next state."""
        offset = self.cache[0].offset
        for layer in self.cache:
            if isinstance(layer, KVCache):
                layer.reserve(offset + 1)
        if self._position is None or self._expected != offset:
            self._position = mx.array(offset, mx.int32)
        buffers = [(layer.keys, layer.values) for layer in self.cache]
        arrays = () if sampler is None else sampler.arrays
        function = self._function(offset, sampler)
        logits, self._position, buffers, chosen = function(token, self._position, buffers, arrays)
        self._expected = offset + 1
        for layer, (keys, values) in zip(self.cache, buffers, strict=True):
            layer.keys, layer.values = keys, values
            layer.offset = offset + 1
            if isinstance(layer, SlidingKVCache):
                layer.end = max(layer.end, offset + 1)
        return logits, chosen

    def _function(self, offset: int, sampler: Sampler | None) -> Traced:
        """The graph for a token at `offset`."""
        bucket = -(-(offset + 1) // BUCKET) * BUCKET
        rings = tuple((layer.window, layer.capacity) for layer in self.cache if isinstance(layer, SlidingKVCache))
        full_rings = all(_needs_no_mask(layer, offset) for layer in self.cache if isinstance(layer, SlidingKVCache))
        places = tuple(
            layer.keys.shape[2] for layer in self.cache if isinstance(layer, KVCache) and layer.keys is not None
        )
        form = None if sampler is None else sampler.form
        key = (bucket, full_rings, rings, places, form, self._compile)
        if key not in self._traced:
            caches = [_like(layer, bucket, full_rings) for layer in self.cache]
            function = _step_function(self.model, caches, sampler)
            self._traced[key] = mx.compile(function) if self._compile else function
            if len(self._traced) > MOST_GRAPHS:
                del self._traced[next(iter(self._traced))]  # the oldest
        return self._traced[key]


def can_compile(cache: Cache) -> bool:
    """Whether `CompiledStep` knows every layer of a cache, and each has tokens already: it makes no buffers."""
    return all(
        type(layer) in (KVCache, SlidingKVCache) and layer.left_padding is None and layer.keys is not None
        for layer in cache
    )


def make_step(model: Model, cache: Cache) -> Step:
    """The fastest step for a model whose experts are all in memory and whose cache holds a prompt already.

    On the CPU backend that is the plain one: there `mx.compile` calls the machine's C++ compiler and saves nothing.
    """
    if runs_on_cpu() or not can_compile(cache):
        return PlainStep(model, cache)
    return CompiledStep(model, cache)


class _FixedCache:
    """A `KVCache` inside a traced graph: its position is an array, and all of a bucket's places are attended to."""

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        self.offset: Any = None
        self.keys: Any = None
        self.values: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start = self.offset[None]
        self.keys = mx.slice_update(self.keys, keys, start, [2])
        self.values = mx.slice_update(self.values, values, start, [2])
        return self.keys[..., : self.bucket, :], self.values[..., : self.bucket, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return mx.arange(self.bucket)[None] <= self.offset


class _FixedRing:
    """A `SlidingKVCache` inside a traced graph. is_full: every slot is visible, so that no mask is needed."""

    def __init__(self, window: int, capacity: int, is_full: bool) -> None:
        self.window, self.capacity, self.is_full = window, capacity, is_full
        self.offset: Any = None
        self.keys: Any = None
        self.values: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        slot = (self.offset % self.capacity)[None]
        self.keys = mx.slice_update(self.keys, keys, slot, [2])
        self.values = mx.slice_update(self.values, values, slot, [2])
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        if self.is_full:
            return None
        slots = mx.arange(self.capacity)
        # The newest position that each slot can hold; negative where it holds none yet.
        positions = self.offset - (self.offset - slots) % self.capacity
        return visible_keys(self.offset[None], positions, self.window) & (positions >= 0)


def _step_function(model: Model, caches: list[_FixedCache | _FixedRing], sampler: Sampler | None) -> Traced:
    # Only the form of this sampler stays with the graph: its arrays are as large as the vocabulary.
    form = None if sampler is None else sampler.with_arrays([mx.array(0)] * len(sampler.arrays))

    def step(
        token: mx.array, position: mx.array, buffers: list[tuple[mx.array, mx.array]], arrays: Sequence[mx.array]
    ) -> Any:
        for cache, (keys, values) in zip(caches, buffers, strict=True):
            cache.offset, cache.keys, cache.values = position, keys, values
        logits = model(token[None, None], cache=cast(Cache, caches))[0, -1]
        after = [(cache.keys, cache.values) for cache in caches]
        if form is None:
            return logits, position + 1, after, None
        chooser = form.with_arrays(arrays)
        chosen = chooser(logits)
        return logits, position + 1, after, (chosen, *chooser.state)

    return step


def _like(layer: object, bucket: int, full_rings: bool) -> _FixedCache | _FixedRing:
    if isinstance(layer, SlidingKVCache):
        return _FixedRing(layer.window, layer.capacity, full_rings)
    return _FixedCache(bucket)


def _needs_no_mask(layer: SlidingKVCache, offset: int) -> bool:
    """Whether a token at `offset` sees every slot: the ring is no larger than the window, full, and holds nothing rejected."""
    return layer.window == layer.capacity and layer.capacity <= offset + 1 and layer.end <= offset + 1


def _traced_steps(model: Model) -> dict[Any, Traced]:
    """The graphs that were traced for a model already, whichever request it was for."""
    traced = model.__dict__.get("_traced_steps")
    if traced is None:
        traced = {}
        object.__setattr__(model, "_traced_steps", traced)
    return traced
