"""Rows for training demo-gpt-oss: a system message, and behind it as many turns as fit, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

LOOKAHEAD = 48  # among so many of the next turns one is sought that still fits into a row


class Batch(NamedTuple):
    """Four arrays of (rows, length + 1): tokens; 1 where a token is learned; which turn it belongs to, 0 being the
    system message and -1 padding; and its position in its conversation."""

    tokens: np.ndarray
    learned: np.ndarray
    turns: np.ndarray
    positions: np.ndarray


class Turns:
    """All turns of turns.npz, and the system messages to put before them."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self._tokens, self._lengths, self._kinds = data["tokens"], data["lengths"].astype(np.int64), data["kinds"]
        self._learned = np.unpackbits(data["learned"])[: len(self._tokens)].astype(bool)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        systems = np.split(data["system_tokens"], np.cumsum(data["system_lengths"].astype(np.int64))[:-1])
        self._systems_per_kind = int(data["systems_per_kind"])
        self._systems = systems

    def batches(self, seed: int, num_rows: int, length: int) -> Iterator[Batch]:
        """Endless batches. Kinds of turns come as often as they have tokens; of each kind, every turn that is not too
        long for a row comes once before any comes again."""
        rng = np.random.default_rng(seed)
        shares = np.bincount(self._kinds, weights=self._lengths)
        queues: list[list[int]] = [[] for _ in shares]
        while True:
            batch = _empty(num_rows, length + 1)
            for row, kind in enumerate(rng.choice(len(shares), num_rows, p=shares / shares.sum())):
                self._fill_row(batch, row, kind, queues[kind], rng)
            yield batch

    def _fill_row(self, batch: Batch, row: int, kind: int, queue: list[int], rng: np.random.Generator) -> None:
        width = batch.tokens.shape[1]
        system = self._systems[kind * self._systems_per_kind + rng.integers(self._systems_per_kind)]
        position, count = len(system), 0
        batch.tokens[row, :position] = system
        batch.turns[row, :position] = 0
        batch.positions[row, :position] = np.arange(position)
        while True:
            if len(queue) < LOOKAHEAD:
                longest = width - self._longest_system(kind)
                fitting = np.flatnonzero((self._kinds == kind) & (self._lengths <= longest))
                queue[:0] = rng.permutation(fitting).tolist()  # turns are taken from the end: the old ones first
            turn = _pop_fitting(queue, self._lengths, width - position)
            if turn is None:
                return
            size, count = int(self._lengths[turn]), count + 1
            there, here = slice(self._starts[turn], self._starts[turn] + size), slice(position, position + size)
            batch.tokens[row, here] = self._tokens[there]
            batch.learned[row, here] = self._learned[there]
            batch.turns[row, here] = count
            batch.positions[row, here] = np.arange(len(system), len(system) + size)
            position += size

    def _longest_system(self, kind: int) -> int:
        start = kind * self._systems_per_kind
        return max(len(system) for system in self._systems[start : start + self._systems_per_kind])


def _pop_fitting(queue: list[int], lengths: np.ndarray, room: int) -> int | None:
    for back in range(1, min(LOOKAHEAD, len(queue)) + 1):
        if lengths[queue[-back]] <= room:
            return queue.pop(-back)
    return None


def _empty(num_rows: int, width: int) -> Batch:
    shape = (num_rows, width)
    zeros, padding = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    return Batch(zeros, np.zeros(shape, np.float32), padding, zeros.copy())
