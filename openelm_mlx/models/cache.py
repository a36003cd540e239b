"""Keys and values of the tokens seen so far: one cache a layer.

`KVCache` keeps all of them, `QuantizedKVCache` (quantized_cache.py) all in 8 bits; `SlidingKVCache` keeps the last
`window` in a ring. They answer the same calls, and positions are absolute: `offset` is that of the next token.
`rewind(n)` takes back exactly n tokens or raises. The words of mlx-lm's protocol (`is_trimmable`, `trim`, `state`,
`meta_state`, `make_mask`) are there so that mlx-lm's own loops accept these caches as they are.
"""

from __future__ import annotations

from typing import Union

import mlx.core as mx

from ..specs import LayerSpec, ModelSpec, checked_kv_bits, kv_capacity
from .attention import Mask, causal_mask, visible_keys
from .buffers import Snapshot, appended, grown, ring_reaches, seen_before, write
from .growing_cache import GrowingCache
from .quantized_cache import QuantizedKVCache
from .remote_cache import RemoteCache

LayerCache = Union["KVCache", "SlidingKVCache", QuantizedKVCache, RemoteCache]
Cache = list[LayerCache]


def make_cache(
    spec: ModelSpec,
    window: int | None = None,
    left_padding: list[int] | None = None,
    room: int = 0,
    context_length: int | None = None,
    kv_bits: int | None = None,
    spare_places: int = 0,
) -> Cache:
    """A cache for each layer of `spec`. `window` puts a ring of that many tokens where a layer would keep everything.

    left_padding: how many tokens of padding stand before each row of a batch, (B,). room: how many tokens a ring keeps
    beyond its window, so that a speculative decoder can take them back. context_length: beyond so many tokens no places
    are kept ready; the model's own when it is None. kv_bits: 8 quantizes what would keep everything; None and 16 do not.
    spare_places: how many more a growing buffer has (`KernelChoices`).
    """
    kind = KVCache if checked_kv_bits(spec, kv_bits, window) is None else QuantizedKVCache
    limit = spec.context_length if context_length is None else context_length
    padding = None if left_padding is None or not any(left_padding) else mx.array(left_padding)
    windows = [layer.window or window for layer in spec.layers]
    return [
        kind(padding, limit, spare_places) if each is None else SlidingKVCache(each, room, padding) for each in windows
    ]


class KVCache(GrowingCache[mx.array]):
    """Keys and values of every token, (B, K, T, D) each."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L new keys and values (B, K, L, D); all cached ones come back, (B, K, offset + L, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        limits = start, self.context_length, self.spare_places
        self.keys, self.values = appended((self.keys, self.values), (keys, values), *limits)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def reserve(self, num_tokens: int) -> list[mx.array]:
        """Make places for `num_tokens` in all; what has to be evaluated for it, nothing when they are there.

        A loop that reserves and evaluates layer by layer holds one old buffer beside its copy; left to the next tokens,
        the copies of many layers may be in flight at once.
        """
        if self.keys is None or self.values is None or num_tokens <= self.keys.shape[2]:
            return []
        self.keys, self.values = (
            grown(buffer, self.offset, num_tokens, self.context_length, self.spare_places)
            for buffer in (self.keys, self.values)
        )
        return self.buffers

    def capacity_for(self, num_new: int) -> int:
        """How many places there are once so many more tokens have been appended."""
        needed = self.offset + num_new
        if self.keys is not None and needed <= self.keys.shape[2]:
            return self.keys.shape[2]
        return kv_capacity(needed, self.context_length) + self.spare_places

    def places(self, count: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the first so many places, those behind the last token too: finite numbers that mean nothing."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., :count, :], self.values[..., :count, :]

    def nbytes_for(self, num_tokens: int, layer: LayerSpec, itemsize: int) -> int:
        """Bytes allocated once it holds `num_tokens` in all, of one row with numbers of `itemsize` bytes."""
        if self.keys is not None and num_tokens <= self.keys.shape[2]:
            return self.nbytes
        return self.capacity_for(num_tokens - self.offset) * layer.kv_bytes_per_token(itemsize)

    def fork(self, snapshot: Snapshot) -> KVCache:
        """Another cache, as this one was at an earlier `snapshot`; what is written to one is not seen by the other."""
        new = KVCache(self.left_padding, self.context_length, self.spare_places)
        if self.keys is not None and self.values is not None:
            # Cut to what is used, so the first token written makes a buffer of its own.
            new.state = self.keys[..., : snapshot.offset, :], self.values[..., : snapshot.offset, :]
        return new

    def in_order(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all tokens, in the order of positions."""
        return self.places(self.offset)

    def put_in_order(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Hold copies of these of all `offset` tokens, where nothing was held: a part would keep in memory what it is of."""
        assert keys.shape[2] == offset
        self.update_and_fetch(keys, values)

    @property
    def state(self) -> tuple[mx.array, mx.array] | tuple[()]:
        """The arrays that hold it, cut to what is used; what `mx.eval` and mlx-lm's prompt files take."""
        if self.keys is None or self.values is None:
            return ()
        if self.offset == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @state.setter
    def state(self, arrays: tuple[mx.array, mx.array]) -> None:
        self.keys, self.values = arrays
        self.offset = self.keys.shape[2]

    @property
    def buffers(self) -> list[mx.array]:
        """The whole buffers, for `mx.eval`: evaluating a slice would allocate it again."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]


class SlidingKVCache:
    """Keys and values of the last `window` tokens, in a ring of window + room slots; slot = position mod capacity.

    `room` is how many tokens beyond the window stay in memory, so that `rewind` can take back up to room + 1 of them: a
    query needs the window - 1 tokens before it, which must not have been overwritten.
    """

    def __init__(self, window: int, room: int = 0, left_padding: mx.array | None = None) -> None:
        self.window = window
        self.capacity = window + room
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        # One past the newest position in the ring. A rewind leaves it: the rejected tokens are still in their slots.
        self.end = 0
        self.left_padding = left_padding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L new keys and values (B, K, L, D) and return those that the L queries may need.

        One token: the ring itself, in slot order, (B, K, capacity, D). Several: up to window - 1 tokens before them in
        the order of positions, then the new ones. `make_mask`, asked before, fits what comes back.
        """
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = mx.zeros(shape, keys.dtype), mx.zeros(shape, values.dtype)
        if keys.shape[2] == 1:
            self._write(keys, values)
            return self.keys, self.values
        before = self._positions_before(self.offset)
        all_keys = mx.concatenate([*self._read(self.keys, before), keys], axis=2)
        all_values = mx.concatenate([*self._read(self.values, before), values], axis=2)
        self._write(keys, values)
        return all_keys, all_values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for the next N tokens, asked for before they are appended."""
        window = self.window if window_size is None else min(window_size, self.window)
        if N == 1:
            return self._ring_mask(window, return_array)
        first = self._positions_before(self.offset).start
        if return_array:
            positions = mx.arange(first, self.offset + N)
            return visible_keys(positions[self.offset - first :], positions, window, self.left_padding)
        return causal_mask(N, self.offset, window, self.left_padding, first)

    def reserve(self, num_tokens: int) -> list[mx.array]:
        """Nothing: a ring has its size from the first token on."""
        return []

    def nbytes_for(self, num_tokens: int, layer: LayerSpec, itemsize: int) -> int:
        """Bytes of the ring, of one row with numbers of `itemsize` bytes."""
        return self.nbytes or self.capacity * layer.kv_bytes_per_token(itemsize)

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.keys = self.values = None
        self.offset = self.end = 0

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens, exactly. Raises ValueError when the ring has lost what stood before."""
        offset = self.offset - num_tokens
        if not self.can_reach(Snapshot(self.offset, self.end), offset):
            raise ValueError(
                f"cannot take back {num_tokens} of {self.offset} tokens: a ring of {self.capacity} slots for a window "
                f"of {self.window} holds the tokens from {max(0, self.end - self.capacity)} on"
            )
        self.offset = offset
        if not self._positions_before(offset):
            self.end = offset

    def snapshot(self) -> Snapshot:
        """The ring as it is: MLX copies its buffers when the next token is written. Evaluate it before you keep it."""
        return Snapshot(self.offset, self.end, tuple(buffer[...] for buffer in self.buffers))

    def can_reach(self, snapshot: Snapshot, offset: int) -> bool:
        """Whether a ring brought back to `snapshot` can be rewound to `offset`: nothing it needs was overwritten."""
        return ring_reaches(self.window, self.capacity, snapshot, offset)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what this ring was at an earlier `snapshot`, which stays as it is."""
        self.keys, self.values = (buffer[...] for buffer in snapshot.arrays) if snapshot.arrays else (None, None)
        self.offset, self.end = snapshot.offset, snapshot.end

    def fork(self, snapshot: Snapshot) -> SlidingKVCache:
        """Another ring, as this one was at an earlier `snapshot`; what is written to one is not seen by the other."""
        new = SlidingKVCache(self.window, self.capacity - self.window, self.left_padding)
        new.restore(snapshot)
        return new

    def in_order(self) -> tuple[mx.array, mx.array]:
        """Keys and values of the last `window` tokens, in the order of positions."""
        assert self.keys is not None
        assert self.values is not None
        positions = range(max(0, self.offset - self.window), self.offset)
        keys, values = (mx.concatenate(self._read(each, positions), axis=2) for each in (self.keys, self.values))
        return keys, values

    def put_in_order(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Hold these of the last of `offset` tokens, where nothing was held."""
        shape = (*keys.shape[:2], self.capacity, keys.shape[3])
        self.keys, self.values = mx.zeros(shape, keys.dtype), mx.zeros(shape, values.dtype)
        self.offset = self.end = offset - keys.shape[2]
        self._write(keys, values)

    @property
    def state(self) -> tuple[mx.array, mx.array] | tuple[()]:
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    @state.setter
    def state(self, arrays: tuple[mx.array, mx.array]) -> None:
        self.keys, self.values = arrays

    @property
    def buffers(self) -> list[mx.array]:
        """The whole buffers, for `mx.eval`."""
        return list(self.state)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def _write(self, keys: mx.array, values: mx.array) -> None:
        """Put the new tokens, the last `capacity` of them, into their slots."""
        assert self.keys is not None
        assert self.values is not None
        stop = self.offset + keys.shape[2]
        positions = range(max(self.offset, stop - self.capacity), stop)
        new = positions.start - self.offset
        for slots in self._slots(positions):
            count = slots.stop - slots.start
            write(self.keys, slots, keys[..., new : new + count, :])
            write(self.values, slots, values[..., new : new + count, :])
            new += count
        self.offset = stop
        self.end = max(self.end, stop)

    def _read(self, buffer: mx.array, positions: range) -> list[mx.array]:
        """The tokens at those positions, in their order, in pieces."""
        return [buffer[..., slots, :] for slots in self._slots(positions)]

    def _slots(self, positions: range) -> list[slice]:
        """Where at most `capacity` successive positions lie: in one run of slots, or in two around the ring's end."""
        first, stop = positions.start % self.capacity, positions.start % self.capacity + len(positions)
        runs = [slice(first, min(stop, self.capacity)), slice(0, stop - self.capacity)]
        return [run for run in runs if run.start < run.stop]

    def _positions_before(self, offset: int) -> range:
        """The positions before `offset` that a token there sees: window - 1 at most."""
        return seen_before(self.window, offset)

    def _ring_mask(self, window: int, return_array: bool) -> Mask:
        """Which slots the next token sees once it is in its own: (1, capacity), or (B, 1, 1, capacity)."""
        newest = max(self.end, self.offset + 1) - 1
        is_full = self.capacity <= self.offset + 1 and newest == self.offset  # with nothing rejected in it
        if window == self.capacity and is_full and self.left_padding is None and not return_array:
            return None  # every slot is visible, and their order does not matter
        slots = mx.arange(self.capacity)
        # The newest position that each slot can hold; negative where it holds none yet.
        positions = newest - (newest - slots) % self.capacity
        mask = visible_keys(mx.array([self.offset]), positions, window, self.left_padding)
        return mask & (positions >= 0)

    # --- mlx-lm's words ---

    @property
    def meta_state(self) -> tuple[str, ...]:
        return tuple(str(n) for n in (self.window, self.capacity, self.offset, self.end))

    @meta_state.setter
    def meta_state(self, numbers: tuple[str, ...]) -> None:
        self.window, self.capacity, self.offset, self.end = (int(n) for n in numbers)

    def is_trimmable(self) -> bool:
        # mlx-lm asks once, without saying how many tokens; a ring cannot promise any number.
        return False

    def size(self) -> int:
        return min(self.offset, self.window)

    def empty(self) -> bool:
        return self.keys is None


def cache_bytes(cache: Cache) -> int:
    """Bytes allocated for all layers. They are written together: where the first one has none, no other has."""
    return sum(layer.nbytes for layer in cache) if cache and cache[0].buffers else 0


def seen_by_last(cache: LayerCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Of the keys and values that `cache` gave for several new tokens those that the last token sees."""
    if isinstance(cache, SlidingKVCache):  # they are in the order of positions
        return keys[..., -cache.window :, :], values[..., -cache.window :, :]
    return keys, values
