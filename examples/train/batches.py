"""Batches for training, out of the arrays that prepare.py wrote: conversations, packed into rows, and prose.

A batch has two shapes. Short rows hold conversations of one to four turns, as a user begins them. Long rows, as long as
the model's context, hold longer stretches of conversation and prose. Every row begins with BOS; where one text ends and
another begins in a row, BOS stands again. Loss is taken on answers and on prose, not on questions.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BOS = 1


class Rows(NamedTuple):
    """Rows of tokens, (R, length + 1), and for each token whether the model is to learn it, the same shape."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """How many rows of which kind a batch has."""

    short_length: int = 128
    short_rows: int = 384
    long_length: int = 512
    long_conversation_rows: int = 18
    prose_rows: int = 12
    sentence_rows: int = 2
    unknown_share: float = 0.06  # of the turns, questions for unknown words and small talk
    new_conversation: float = 0.6  # probability that a turn in a short row begins a conversation

    @property
    def tokens(self) -> int:
        """Tokens a batch is made of."""
        long_rows = self.long_conversation_rows + self.prose_rows + self.sentence_rows
        return self.short_rows * self.short_length + long_rows * self.long_length


class Conversations:
    """All turns of conversations.npz. Every head word is asked for once before any is asked for again."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self._tokens, self._starts, self._answers = data["turn_tokens"], data["turn_starts"], data["answers"]
        self._questions_per_word, self._num_known = int(data["questions_per_word"]), int(data["num_known"])
        self._opening, self._line_break = data["opening"], data["line_break"]
        self._lengths = np.diff(self._starts)

    @property
    def num_words(self) -> int:
        return self._num_known // self._questions_per_word

    def draw(self, rng: np.random.Generator, unknown_share: float) -> np.ndarray:
        """The numbers of an epoch's turns in random order: one question for each head word, others between them."""
        words = rng.permutation(self.num_words)
        known = words * self._questions_per_word + rng.integers(self._questions_per_word, size=len(words))
        num_others = round(len(words) * unknown_share / (1 - unknown_share))
        others = rng.integers(self._num_known, len(self._lengths), size=num_others)
        return rng.permutation(np.concatenate([known, others]))

    def sizes(self, turns: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """How many tokens each turn takes in a row; one that begins a conversation has BOS before it."""
        return self._lengths[turns] + np.where(begins, len(self._opening), len(self._line_break))

    def row(self, turns: np.ndarray, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The turns as a row of `length + 1` tokens, zeros after them, and which of the tokens are answers."""
        tokens, learned = np.zeros(length + 1, np.uint16), np.zeros(length + 1, bool)
        position = 0
        for turn, begin in zip(turns.tolist(), begins.tolist(), strict=True):
            before = self._opening if begin else self._line_break
            start, size = position + len(before), self._lengths[turn]
            tokens[position:start] = before
            tokens[start : start + size] = self._tokens[self._starts[turn] : self._starts[turn + 1]]
            learned[start + self._answers[turn] : start + size] = True
            position = start + size
        return tokens, learned


class Prose:
    """All paragraphs and sentences of prose.npz."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self._opening, self._opening_starts = data["opening_tokens"], data["opening_starts"]
        self._running, self._running_starts = data["running_tokens"], data["running_starts"]
        self._sentences, self._sentence_starts = data["sentence_tokens"], data["sentence_starts"]
        self._validation = data["validation_tokens"]
        weights = data["weights"] * np.diff(self._opening_starts)  # long paragraphs as often as they are long
        self._probabilities = weights / weights.sum()

    def paragraph_rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        """Rows that begin with a paragraph and go on with those that follow it."""
        tokens = np.zeros((count, length + 1), np.uint16)
        tokens[:, 0] = BOS
        for row, i in zip(tokens, rng.choice(len(self._probabilities), count, p=self._probabilities), strict=True):
            opening = self._opening[self._opening_starts[i] : self._opening_starts[i + 1]]
            following = self._running[self._running_starts[i + 1] : self._running_starts[i + 1] + length]
            text = np.concatenate([opening, following])[:length]
            row[1 : len(text) + 1] = text
        return Rows(tokens, (tokens != 0) & (np.arange(length + 1) > 0))

    def sentence_rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        """Rows of single sentences, each after a BOS of its own."""
        tokens = np.zeros((count, length + 1), np.uint16)
        for row in tokens:
            position = 0
            while position < length:
                i = rng.integers(len(self._sentence_starts) - 1)
                sentence = self._sentences[self._sentence_starts[i] : self._sentence_starts[i + 1]]
                sentence = sentence[: length - position]
                row[position] = BOS
                row[position + 1 : position + 1 + len(sentence)] = sentence
                position += len(sentence) + 1
        return Rows(tokens, tokens > BOS)

    def validation_rows(self, length: int, most: int) -> Rows:
        """The validation paragraphs, cut into rows of `length` after a BOS, `most` of them at most."""
        count = min(most, len(self._validation) // length)
        tokens = np.full((count, length + 1), BOS, np.uint16)
        tokens[:, 1:] = self._validation[: count * length].reshape(count, length)
        return Rows(tokens, np.arange(length + 1) > np.zeros((count, 1)))


class Packer:
    """Endless rows of one length, each with as many whole turns as fit; every row begins a conversation."""

    def __init__(
        self, conversations: Conversations, length: int, new_conversation: float, unknown_share: float
    ) -> None:
        self._conversations, self._length = conversations, length
        self._new_conversation, self._unknown_share = new_conversation, unknown_share
        self.state: PackerState = PackerState(np.empty(0, np.int64), np.empty(0, bool))

    def next_row(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The next row: tokens and which of them are learned, each of `length + 1`."""
        turns, begins = self.state
        if len(turns) <= self._length:  # more than fit in a row, however short they are
            turns, begins = self._with_another_epoch(rng)
        begins[0] = True
        ends = np.cumsum(self._conversations.sizes(turns[: self._length], begins[: self._length]))
        count = int(np.searchsorted(ends, self._length, side="right"))
        self.state = PackerState(turns[count:], begins[count:])
        return self._conversations.row(turns[:count], begins[:count], self._length)

    def _with_another_epoch(self, rng: np.random.Generator) -> PackerState:
        turns = self._conversations.draw(rng, self._unknown_share)
        turns = turns[self._conversations.sizes(turns, np.ones(len(turns), bool)) <= self._length]
        begins = rng.random(len(turns)) < self._new_conversation
        return PackerState(np.concatenate([self.state.turns, turns]), np.concatenate([self.state.begins, begins]))


class PackerState(NamedTuple):
    """The turns that are still to come in this epoch, and which of them begin a conversation."""

    turns: np.ndarray
    begins: np.ndarray


class StreamState(NamedTuple):
    """Where a stream of batches stands: all that is needed to go on with the very next batch."""

    rng: dict[str, Any]
    short: PackerState
    long: PackerState


class Batch(NamedTuple):
    """One step's rows, and the state of the stream after them."""

    short: Rows
    long: Rows
    state: StreamState


def batches(
    conversations: Conversations, prose: Prose, recipe: Recipe, seed: int, state: StreamState | None = None
) -> Iterator[Batch]:
    """Endless batches after `recipe`; the same seed gives the same ones, and `state` goes on where it was taken."""
    rng = np.random.default_rng(seed)
    short = Packer(conversations, recipe.short_length, recipe.new_conversation, recipe.unknown_share)
    long = Packer(conversations, recipe.long_length, recipe.new_conversation / 4, recipe.unknown_share)
    if state is not None:
        rng.bit_generator.state, short.state, long.state = state
    while True:
        short_rows = _stack(short.next_row(rng) for _ in range(recipe.short_rows))
        long_rows = _concatenate(
            _stack(long.next_row(rng) for _ in range(recipe.long_conversation_rows)),
            prose.paragraph_rows(rng, recipe.prose_rows, recipe.long_length),
            prose.sentence_rows(rng, recipe.sentence_rows, recipe.long_length),
        )
        yield Batch(short_rows, long_rows, StreamState(rng.bit_generator.state, short.state, long.state))


def prefetched(data: Path, recipe: Recipe, seed: int, state: StreamState | None = None) -> Iterator[Batch]:
    """The same batches from the folder `data`, made in another process while the device works on the ones before."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(16)
    context.Process(target=_fill, args=(queue, data, recipe, seed, state), daemon=True).start()
    while True:
        yield queue.get()


def _fill(queue: Any, data: Path, recipe: Recipe, seed: int, state: StreamState | None) -> None:
    conversations, prose = Conversations(data / "conversations.npz"), Prose(data / "prose.npz")
    for batch in batches(conversations, prose, recipe, seed, state):
        queue.put(batch)


def _stack(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Rows:
    tokens, learned = zip(*rows, strict=True)
    return Rows(np.stack(tokens), np.stack(learned))


def _concatenate(*parts: Rows) -> Rows:
    return Rows(np.concatenate([part.tokens for part in parts]), np.concatenate([part.learned for part in parts]))
