"""What the caches that keep every token are, whatever their numbers are stored in."""

from __future__ import annotations

from typing import Generic, TypeVar

import mlx.core as mx

from .attention import Mask, causal_mask, visible_keys
from .buffers import Snapshot

# What keys and values are stored in: an array, or packed ones.
Stored = TypeVar("Stored")


class Trimmable:
    """mlx-lm's words for a cache that can be rewound."""

    offset: int
    meta_state = ""

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens. Raises ValueError when there are fewer."""
        raise NotImplementedError

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = min(n, self.offset)
        self.rewind(n)
        return n

    def size(self) -> int:
        return self.offset


class GrowingCache(Trimmable, Generic[Stored]):
    """Keys and values of every token, in buffers that grow as `kv_capacity` says; the first `offset` tokens count.

    left_padding: how many tokens of padding stand before each row of a batch, (B,). context_length: beyond so many tokens no
    places are kept ready. spare_places: how many more a buffer has.
    """

    def __init__(
        self, left_padding: mx.array | None = None, context_length: int | None = None, spare_places: int = 0
    ) -> None:
        self.context_length, self.spare_places = context_length, spare_places
        self.keys: Stored | None = None
        self.values: Stored | None = None
        self.offset = 0
        self.left_padding = left_padding

    @property
    def buffers(self) -> list[mx.array]:
        """The whole buffers, for `mx.eval`: evaluating a slice would allocate it again."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes allocated, empty places included."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.keys = self.values = None
        self.offset = 0

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for the next N tokens, asked for before they are appended."""
        if return_array:
            positions = mx.arange(self.offset + N)
            return visible_keys(positions[self.offset :], positions, window_size, self.left_padding)
        return causal_mask(N, self.offset, window_size, self.left_padding)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens. Raises ValueError when there are fewer."""
        if not 0 <= num_tokens <= self.offset:
            raise ValueError(f"cannot take back {num_tokens} of {self.offset} tokens")
        self.offset -= num_tokens

    def snapshot(self) -> Snapshot:
        """What `restore` and `fork` need to come back here: the offset alone, since more tokens overwrite nothing."""
        return Snapshot(self.offset, self.offset)

    def can_reach(self, snapshot: Snapshot, offset: int) -> bool:
        """Whether a cache brought back to `snapshot` can be rewound to `offset`."""
        return 0 <= offset <= snapshot.offset

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what this cache was at an earlier `snapshot`."""
        self.rewind(self.offset - snapshot.offset)

    def empty(self) -> bool:
        return self.keys is None
