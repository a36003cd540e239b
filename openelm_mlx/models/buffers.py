"""Buffers (B, K, T, D) of a cache, which grow by `specs.kv_capacity`, and snapshots to return to an earlier state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..specs import kv_capacity


class Snapshot(NamedTuple):
    """An earlier state of a layer's cache. end: one past the newest position in a ring. arrays: a ring's buffers.

    kept: what another machine keeps of it, for as long as this is alive (remote.py).
    """

    offset: int
    end: int
    arrays: tuple[mx.array, ...] = ()
    kept: Any = None


def seen_before(window: int, offset: int) -> range:
    """The positions before `offset` that a token there sees through a window: window - 1 at most."""
    return range(max(0, offset - window + 1), offset)


def ring_reaches(window: int, capacity: int, snapshot: Snapshot, offset: int) -> bool:
    """Whether a ring that is as it was at `snapshot` can be rewound to `offset`: nothing it needs was overwritten."""
    needed = seen_before(window, offset)
    return 0 <= offset <= snapshot.offset and not (needed and needed.start < snapshot.end - capacity)


def appended(
    buffers: Sequence[mx.array | None],
    new: Sequence[mx.array],
    used: int,
    context_length: int | None = None,
    spare_places: int = 0,
) -> list[mx.array]:
    """Each of `buffers` (B, K, T, D), of which `used` tokens count, with its `new` ones (B, K, L, D) after them.

    Where they fit, in place. All at once: it is called in every layer for every token.
    """
    extended, needed = [], used + new[0].shape[2]
    for buffer, tokens in zip(buffers, new, strict=True):
        if buffer is None or needed > buffer.shape[2]:
            empty = mx.zeros((*tokens.shape[:2], 0, tokens.shape[3]), tokens.dtype)
            buffer = grown(empty if buffer is None else buffer, used, needed, context_length, spare_places)
        if tokens.shape[2] == 1 < buffer.shape[2]:  # one more token: the common case, with the least work on the host
            buffer[..., used:needed, :] = tokens
        else:
            write(buffer, slice(used, needed), tokens)
        extended.append(buffer)
    return extended


def write(buffer: mx.array, places: slice, new: mx.array) -> None:
    """Put the tokens `new` (B, K, L, D) into these places of `buffer` (B, K, T, D), in place.

    If a whole array is overwritten, MLX keeps the written array in its place. Here that would be a view, which would keep in
    memory everything that it was cut from, such as a chunk's queries. So a buffer is never written in one piece.
    """
    first = places.start + 1 if places.stop - places.start == buffer.shape[2] else places.start
    if first > places.start:
        buffer[..., places.start : first, :] = new[..., : first - places.start, :]
    if first < places.stop:
        buffer[..., first : places.stop, :] = new[..., first - places.start :, :]


def grown(
    buffer: mx.array, used: int, needed: int, context_length: int | None = None, spare_places: int = 0
) -> mx.array:
    """A copy of the first `used` tokens of `buffer` (B, K, T, D) with at least `needed` places.

    spare_places: additional places (`KernelChoices`).
    """
    batch, heads, _, head_dim = buffer.shape
    places = kv_capacity(needed, context_length) + spare_places
    more = mx.zeros((batch, heads, places - used, head_dim), buffer.dtype)
    return more if used == 0 else mx.concatenate([buffer[..., :used, :], more], axis=2)
