"""Which tokens are computed together: sorted texts as a trie, cut into passes of a limited number of tokens. No arrays.

What many texts have in common is a trunk, computed once and kept in a cache. What fewer have in common is shared within a
pass, where texts are trees of tokens (models/trees.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np


@dataclass(frozen=True)
class Extend:
    """Compute tokens `trunk` ... `stop` - 1, which texts first ... last - 1 have in common, into the cache."""

    first: int
    last: int
    trunk: int
    stop: int


@dataclass(frozen=True)
class Branch:
    """Compute what texts first ... last - 1 have after their first `trunk` tokens, which are in the cache, in one pass."""

    first: int
    last: int
    trunk: int


class Prefixes:
    """Texts of tokens in lexicographic order, and how many of its first tokens each has in common with the one before.

    texts: sorted, each once.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        arrays = [np.asarray(text, np.int64) for text in texts]
        self.lengths = [len(text) for text in arrays]
        pairs = pairwise(arrays)
        self.shared = [0, *(_num_shared(a, b) for a, b in pairs)][: len(arrays)]
        # How many tokens the texts up to each one add to what the texts before them have.
        added = (length - shared for length, shared in zip(self.lengths, self.shared, strict=True))
        self._added = [0, *accumulate(added)]

    def size(self, first: int, last: int, trunk: int) -> int:
        """How many tokens texts first ... last - 1 have beyond their first `trunk` ones, each counted once."""
        return self.lengths[first] - trunk + self._added[last] - self._added[first + 1]

    def passes(self, most: int, first: int = 0, last: int | None = None, trunk: int = 0) -> Iterator[Extend | Branch]:
        """What to compute, in its order, at most `most` tokens in each pass of branches.

        The trunk of a step is the one that an `Extend` before it reached, or a part of it.
        """
        todo = [(first, len(self.lengths) if last is None else last, trunk)]
        while todo:
            first, last, trunk = todo.pop()
            while first < last and self.lengths[first] <= trunk:
                first += 1  # all of it is in the trunk
            if first == last:
                continue
            size = self.size(first, last, trunk)
            if size <= most:
                yield Branch(first, last, trunk)
                continue
            common = min(self.shared[first + 1 : last], default=self.lengths[first])
            # As a trunk it is computed once; otherwise once in every pass.
            if last - first == 1 or (common - trunk) * (size // most) >= max(1, most // 2):
                yield Extend(first, last, trunk, common)
                todo.append((first, last, common))
                continue
            todo += reversed(list(self._parts(first, last, trunk, common, most)))

    def _parts(self, first: int, last: int, trunk: int, common: int, most: int) -> Iterator[tuple[int, int, int]]:
        """The texts in parts that fit into a pass, and those apart that are too many although they have more in common."""
        borders = [first, *(i for i in range(first + 1, last) if self.shared[i] == common), last]
        start = first
        for at, stop in pairwise(borders):
            if self.size(start, stop, trunk) <= most:
                continue
            if start < at:
                yield start, at, trunk
            start = at
            if self.size(at, stop, trunk) > most:
                yield at, stop, trunk
                start = stop
        if start < last:
            yield start, last, trunk


def _num_shared(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
