"""Rows for training demo-gpt-oss: whole conversations side by side, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

LOOKAHEAD = 48  # among so many of the next turns one is sought that still fits into a row


class Batch(NamedTuple):
    """Three arrays of (rows, length + 1): tokens, whether each is learned, and the number of its conversation."""

    tokens: np.ndarray
    learned: np.ndarray
    conversations: np.ndarray


class Turns:
    """All turns of turns.npz."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.tokens, self.lengths = data["tokens"], data["lengths"].astype(np.int64)
        self.learned = np.unpackbits(data["learned"])[: len(self.tokens)].astype(bool)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def batches(self, seed: int, num_rows: int, length: int) -> Iterator[Batch]:
        """Endless batches; every turn that is no longer than a row comes once before any comes again."""
        rng = np.random.default_rng(seed)
        queue: list[int] = []
        while True:
            batch = _empty(num_rows, length + 1)
            for row in range(num_rows):
                if len(queue) < LOOKAHEAD + length:
                    fitting = np.flatnonzero(self.lengths <= length + 1)
                    queue[:0] = rng.permutation(fitting).tolist()  # turns are taken from the end: the old ones first
                self._fill_row(batch, row, queue)
            yield batch

    def _fill_row(self, batch: Batch, row: int, queue: list[int]) -> None:
        position, count = 0, 0
        while (turn := _pop_fitting(queue, self.lengths, batch.tokens.shape[1] - position)) is not None:
            size = int(self.lengths[turn])
            there, here = slice(self.starts[turn], self.starts[turn] + size), slice(position, position + size)
            batch.tokens[row, here] = self.tokens[there]
            batch.learned[row, here] = self.learned[there]
            batch.conversations[row, here] = count
            position, count = position + size, count + 1


def _pop_fitting(queue: list[int], lengths: np.ndarray, room: int) -> int | None:
    for back in range(1, LOOKAHEAD + 1):
        if lengths[queue[-back]] <= room:
            return queue.pop(-back)
    return None


def _empty(num_rows: int, width: int) -> Batch:
    shape = (num_rows, width)
    return Batch(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(shape, -1, np.int32))
