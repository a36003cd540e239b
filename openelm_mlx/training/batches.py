"""Rows of different lengths as one flat array of tokens, in few shapes; no MLX here.

Everything in a layer but attention works token by token, so tokens of many rows stand side by side there and nothing is
padded but the end of the whole. For attention alone they are laid out in rows again (`Batch.rows`), each from position 0 on.
That a row has neighbours changes nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# What a token's target says when nothing is to be learned there.
NOT_LEARNED = -1
# Sizes are rounded up to so many steps an octave: few shapes, of which a GPU compiles each once, and few empty places.
STEPS_OF_AN_OCTAVE = 4
LEAST_PLACES = 16
# A batch of so many tokens keeps any device busy, so shorter rows can go apart where there are as
# many on both sides: attention lays every row out in as many places as the longest one has, and
# scores grow with their square.
ENOUGH_PLACES = 8192


@dataclass(frozen=True)
class Row:
    """A sequence to learn from.

    tokens (L,): int32. targets (L,): what is to be predicted after each of them, `NOT_LEARNED` where nothing is. The last
    token of a sequence is only ever a target, so it is not among `tokens`.
    """

    tokens: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[int] | np.ndarray, learned: Sequence[bool] | np.ndarray) -> Row:
        """The row of a whole sequence, of which the tokens marked `learned` are targets (the first one cannot be)."""
        sequence = np.asarray(tokens, np.int32)
        targets = np.where(np.asarray(learned, bool)[1:], sequence[1:], NOT_LEARNED).astype(np.int32)
        return cls(sequence[:-1], targets)

    @classmethod
    def of_targets(cls, tokens: Sequence[int], written: Sequence[int]) -> Row:
        """The row of a whole sequence with what is to be predicted at each of its tokens, `NOT_LEARNED` for nothing.

        The two differ where a token stands in another's place, as in a history.
        """
        return cls(np.asarray(tokens[:-1], np.int32), np.asarray(written[1:], np.int32))

    @property
    def num_targets(self) -> int:
        """How many tokens are learned."""
        return int((self.targets != NOT_LEARNED).sum())

    def __len__(self) -> int:
        return len(self.tokens)


class Batch(NamedTuple):
    """Rows that go through the model together. N places of tokens, R rows of at most L, M targets; all but `is_rows` arrays.

    tokens, positions (N,): each place's token, and its position in its own row. rows (R, L): the place that each token of a
    row has. places (N,): where in `rows`, flattened, a place is found. learned (M,): the places after which something is
    learned; targets, weights (M,): what, and how much it counts (0: it fills the shape). owners (M,): the number of its row.
    length (): how many of the N places have a token of a row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    learned: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    owners: np.ndarray
    length: np.ndarray

    @property
    def num_tokens(self) -> int:
        """How many places have a token of a row."""
        return int(self.length)

    @property
    def is_rows(self) -> bool:
        """Whether the flat order is that of the rows, every row as long as the longest."""
        return self.rows.size == self.tokens.size and bool((self.places == np.arange(self.tokens.size)).all())


def make_batch(rows: Sequence[Row], weights: Sequence[float] | None = None) -> Batch:
    """The batch of `rows`. weights: how much each row's targets count; 1 each when it is None."""
    weights = [1.0] * len(rows) if weights is None else weights
    lengths = [len(row) for row in rows]
    longest, count = rounded_up(max(lengths)), rounded_up(sum(lengths))
    num_rows = len(rows) if len(rows) <= LEAST_PLACES else rounded_up(len(rows))
    # Hardly anything is empty: rows as they are.
    if len(rows) == 1 or num_rows * longest <= max(1.1 * sum(lengths), count):
        return _in_rows(rows, weights, num_rows, longest)
    tokens, positions = np.zeros(count, np.int32), np.zeros(count, np.int32)
    laid_out, found = np.zeros((rounded_up(len(rows), 1), longest), np.int32), np.zeros(count, np.int32)
    start = 0
    for i, row in enumerate(rows):
        span = np.arange(len(row), dtype=np.int32)
        tokens[start : start + len(row)] = row.tokens
        positions[start : start + len(row)] = span
        laid_out[i, : len(row)] = start + span
        found[start : start + len(row)] = i * longest + span
        start += len(row)
    starts = np.cumsum([0, *lengths[:-1]])
    return Batch(tokens, positions, laid_out, found, *_targets(rows, weights, starts), np.int32(sum(lengths)))


def _in_rows(rows: Sequence[Row], weights: Sequence[float], num_rows: int, longest: int) -> Batch:
    """The batch with rows padded to `longest`, and empty ones: flat and in rows it is the same."""
    tokens = np.zeros((num_rows, longest), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row.tokens
    order = np.arange(tokens.size, dtype=np.int32)
    positions = np.tile(np.arange(longest, dtype=np.int32), num_rows)
    starts = longest * np.arange(len(rows))
    length = np.int32(sum(map(len, rows)))
    return Batch(
        tokens.ravel(), positions, order.reshape(tokens.shape), order, *_targets(rows, weights, starts), length
    )


def _targets(
    rows: Sequence[Row], weights: Sequence[float], starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    found = [np.flatnonzero(row.targets != NOT_LEARNED) for row in rows]
    count = sum(map(len, found))
    size = rounded_up(count)
    learned, targets, owners = (np.zeros(size, np.int32) for _ in range(3))
    counted = np.zeros(size, np.float32)
    learned[:count] = np.concatenate([start + each for start, each in zip(starts, found, strict=True)])
    targets[:count] = np.concatenate([row.targets[each] for row, each in zip(rows, found, strict=True)])
    counted[:count] = np.concatenate([np.full(len(each), w) for w, each in zip(weights, found, strict=True)])
    owners[:count] = np.concatenate([np.full(len(each), i) for i, each in enumerate(found)])
    return learned, targets, counted, owners


def rounded_up(count: int, least: int = LEAST_PLACES) -> int:
    """`count` or a little more: one of `STEPS_OF_AN_OCTAVE` sizes between two powers of two."""
    if count <= least:
        return least
    step = max(1, 2 ** (count - 1).bit_length() // 2 // STEPS_OF_AN_OCTAVE)
    return -(-count // step) * step


def divided(lengths: Sequence[int], most_places: int, together: int = 1) -> list[list[int]]:
    """Which rows go through the model together: lists of their numbers, each of `most_places` tokens at most.

    Sorted by length, so that rows laid out side by side are alike; where there are `ENOUGH_PLACES`,
    rows of half the length go apart. A row that is longer than `most_places` goes alone. together:
    so many rows in a row belong together (a preference's two answers).
    """
    groups = [range(i, i + together) for i in range(0, len(lengths), together)]
    groups.sort(key=lambda group: -max(lengths[i] for i in group))
    parts: list[list[int]] = []
    room = longest = 0
    left = sum(lengths)
    for group in groups:
        size, own = sum(lengths[i] for i in group), max(lengths[i] for i in group)
        is_shorter = 2 * own <= longest and min(most_places - room, left) >= ENOUGH_PLACES
        if size > room or is_shorter or not parts:
            parts.append([])
            room, longest = most_places, own
        parts[-1] += group
        room -= size
        left -= size
    return parts


def order_of(count: int, epoch: int, seed: int) -> np.ndarray:
    """The order in which `count` rows are seen in an epoch: (count,), the same for the same seed."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of_step(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The rows of a step: epochs follow each other without a gap, so that every row is seen once before any is again."""
    first, stop, found = step * batch_size, (step + 1) * batch_size, []
    for epoch in range(first // count, -(-stop // count)):
        start = max(0, first - epoch * count)
        found += order_of(count, epoch, seed)[start : stop - epoch * count].tolist()
    return found
