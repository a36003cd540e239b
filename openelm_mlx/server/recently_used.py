"""The latest things of a kind, limited in number and in bytes: the least recently used is forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar, final

K = TypeVar("K")
V = TypeVar("V")


@final
class RecentlyUsed(Generic[K, V]):
    """Values by key, in memory alone. most: how many; most_bytes: of all together, as `put` is told of each."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._found: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Keep a value, in the place of one with the same key. One that is too large by itself is not kept."""
        if num_bytes > self._most_bytes:
            return
        self._forget(key)
        self._found[key] = value, num_bytes
        self.num_bytes += num_bytes
        while len(self._found) > self._most or self.num_bytes > self._most_bytes:
            self._forget(next(iter(self._found)))

    def get(self, key: K) -> V | None:
        """The value of this key; looking at it is no use of it."""
        found = self._found.get(key)
        return None if found is None else found[0]

    def use(self, key: K) -> None:
        """A value was of use: it is forgotten after those that were used before."""
        self._found.move_to_end(key)

    def _forget(self, key: K) -> None:
        if key in self._found:
            self.num_bytes -= self._found.pop(key)[1]
