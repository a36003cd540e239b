"""What stands in for layers that other machines have, as a model sees it; link/chain.py is the one that there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .cache import Cache


class RequestRows(Protocol):
    """The rows of one request in a flat pass (`rows.Rows`)."""

    @property
    def cache(self) -> Cache: ...

    @property
    def length(self) -> int: ...

    @property
    def is_prompt(self) -> bool: ...

    @property
    def wants_logits(self) -> bool: ...

    @property
    def num_logits(self) -> int: ...


class RemoteLayers(Protocol):
    """The layers after a model's own: the residual stream goes there, and comes back after the last of them.

    A cache list has the model's own caches first and then one for each machine (`caches`). Everything here blocks until the
    others have answered, but for a prompt of which nothing is wanted.
    """

    def caches(self, window: int | None, left_padding: list[int] | None, kv_bits: int | None, room: int) -> Cache:
        """Empty caches, one for each machine; the arguments are those of `LanguageModel.make_cache`."""

    def whole(self, h: mx.array, cache: Cache | None, left_padding: mx.array | None = None) -> mx.array:
        """Of new tokens h (B, L, hidden_size) or (B, hidden_size), all of them; the same shape."""

    def step(self, h: mx.array, cache: Cache) -> mx.array:
        """Of one more token, (hidden_size,)."""

    def many(self, h: mx.array, cache: Cache) -> mx.array:
        """Of a few more tokens (L, hidden_size), all of them."""

    def prompt(self, h: mx.array | None, cache: Cache, wants_last: bool) -> mx.array | None:
        """Of a chunk of a prompt (1, L, hidden_size) the last token, (1, hidden_size); nothing where it is not wanted."""

    def chunk(self, h: mx.array, cache: Cache) -> mx.array:
        """Of a chunk of a prompt (1, L, hidden_size) every token, the same shape."""

    def rows(self, h: mx.array, rows: Sequence[RequestRows]) -> mx.array | None:
        """Of flat rows (M, hidden_size) those whose logits are wanted, (R, hidden_size); None where none are."""
