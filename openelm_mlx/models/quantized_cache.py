"""Keys and values of every token in 8 bits: half the memory of `KVCache`, and the same calls."""

from __future__ import annotations

import mlx.core as mx

from ..specs import LayerSpec, kv_capacity
from .buffers import Snapshot, appended, grown
from .growing_cache import GrowingCache
from .packed import BITS, Packed, pack


class QuantizedKVCache(GrowingCache[Packed]):
    """`KVCache` with its numbers packed: it returns `Packed`, which `attention.attend` accepts."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Packed, Packed]:
        """Append L new keys and values (B, K, L, D); all cached ones come back, (B, K, offset + L, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._appended(self.keys, pack(keys), start)
        self.values = self._appended(self.values, pack(values), start)
        return self.keys.first(self.offset), self.values.first(self.offset)

    def reserve(self, num_tokens: int) -> list[mx.array]:
        """Make room for `num_tokens` in total; return the arrays that have to be evaluated for it, if any."""
        if self.keys is None or self.values is None or num_tokens <= self.keys.weight.shape[2]:
            return []
        self.keys, self.values = (
            Packed(*(grown(part, self.offset, num_tokens, self.context_length, self.spare_places) for part in packed))
            for packed in (self.keys, self.values)
        )
        return self.buffers

    def nbytes_for(self, num_tokens: int, layer: LayerSpec, itemsize: int) -> int:
        """Bytes allocated once it holds `num_tokens` in all, of one row."""
        if self.keys is not None and num_tokens <= self.keys.weight.shape[2]:
            return self.nbytes
        places = kv_capacity(num_tokens, self.context_length) + self.spare_places
        return places * layer.kv_bytes_per_token(itemsize, BITS)

    def fork(self, snapshot: Snapshot) -> QuantizedKVCache:
        """Another cache in the state of an earlier `snapshot`; later writes to one do not affect the other."""
        new = QuantizedKVCache(self.left_padding, self.context_length, self.spare_places)
        if self.keys is not None and self.values is not None:
            # Cut to what is used, so the first token written makes buffers of its own.
            new.state = *self.keys.first(snapshot.offset), *self.values.first(snapshot.offset)
        return new

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays that hold it, cut to what is used: weight, scales, biases of the keys, then of the values."""
        if self.keys is None or self.values is None:
            return ()
        return *self.keys.first(self.offset), *self.values.first(self.offset)

    @state.setter
    def state(self, arrays: tuple[mx.array, ...]) -> None:
        self.keys, self.values = Packed(*arrays[:3]), Packed(*arrays[3:])
        self.offset = self.keys.weight.shape[2]

    @property
    def buffers(self) -> list[mx.array]:
        """The whole buffers, for `mx.eval`."""
        return [] if self.keys is None or self.values is None else [*self.keys, *self.values]

    def _appended(self, packed: Packed | None, new: Packed, used: int) -> Packed:
        parts = (None, None, None) if packed is None else packed
        limits = used, self.context_length, self.spare_places
        return Packed(*appended(parts, new, *limits))
