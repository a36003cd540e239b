"""Bytes of keys and values as caches allocate them (models/cache.py): of one request, and what growing takes. No arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ..specs import KV_STEP, LayerSpec, ModelSpec, kv_capacity


class Growth(NamedTuple):
    """Bytes that caches grow by. copied: the largest layer that is there twice meanwhile, since layers grow one at a time."""

    more: int
    copied: int


def growth_of(layers: Iterable[tuple[int, int]]) -> Growth:
    """The growth of layers, each with its bytes now and then; one that has enough stays as it is."""
    more, copied = 0, 0
    for there, wanted in layers:
        if wanted > there:
            more, copied = more + wanted - there, max(copied, there)
    return Growth(more, copied)


def most_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 when none does. fits: true up to some number, and false beyond."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class CacheBytes:
    """The caches of one request, as `make_cache` makes them with the same arguments.

    itemsize: bytes of a number. kv_bits: of the layers that keep everything. window: a ring in their place. room: places of a
    ring beyond its window. context_length: beyond so many tokens no places are kept ready; the model's own when it is None.
    """

    spec: ModelSpec
    itemsize: int
    kv_bits: int | None = None
    window: int | None = None
    room: int = 0
    context_length: int | None = None
    spare_places: int = 0

    def places(self, num_tokens: int) -> int:
        """How many places a layer that keeps everything has once it has grown to `num_tokens`."""
        if num_tokens == 0:
            return 0
        limit = self.spec.context_length if self.context_length is None else self.context_length
        return kv_capacity(num_tokens, limit) + self.spare_places

    def total(self, num_tokens: int) -> int:
        """Bytes allocated for `num_tokens` in all; rings are there whole from the first token on."""
        return self.bytes_of(self.places(num_tokens))

    def bytes_of(self, places: int) -> int:
        """Bytes of caches of which the layers that keep everything have so many places; 0: nothing is allocated yet."""
        return self.rings + self._per_place * places if places else 0

    def growth(self, places: int, num_tokens: int) -> Growth:
        """What caches with so many places (0: nothing allocated yet) grow by until they hold `num_tokens`."""
        if num_tokens <= places:
            return Growth(0, 0)
        if places == 0:
            return Growth(self.total(num_tokens), 0)
        if not self._full:  # rings are there
            return Growth(0, 0)
        more = self.places(num_tokens) - places
        return Growth(self._per_place * more, max(self._full) * places)

    def copied_while_growing(self, num_tokens: int) -> int:
        """Bytes of the largest layer before its last growth, where caches grow up to `num_tokens` by steps."""
        return max(self._full, default=0) * max(0, self.places(num_tokens) - KV_STEP)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The model's layers, with the windows that these caches give them."""
        if self.window is None:  # as it mostly is, and a plan asks some hundred times
            return self.spec.layers
        return tuple(replace(layer, window=layer.window or self.window) for layer in self.spec.layers)

    @cached_property
    def rings(self) -> int:
        """Bytes of all rings: of a snapshot of them, too."""
        return sum(
            layer.kv_bytes_per_token(self.itemsize) * (layer.window + self.room)
            for layer in self.layers
            if layer.window is not None
        )

    @cached_property
    def _full(self) -> list[int]:
        """Bytes of a place in each layer that keeps everything."""
        return [layer.kv_bytes_per_token(self.itemsize, self.kv_bits) for layer in self.layers if layer.window is None]

    @cached_property
    def _per_place(self) -> int:
        return sum(self._full)


def kv_cache_bytes(
    spec: ModelSpec, num_tokens: int, itemsize: int, batch_size: int = 1, kv_bits: int | None = None
) -> int:
    """Bytes allocated for keys and values once `num_tokens` are cached: places in steps, rings whole."""
    caches = CacheBytes(spec, itemsize, kv_bits)
    return batch_size * max(caches.rings, caches.total(num_tokens))
