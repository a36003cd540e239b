"""An adapter: beside some matrices a product of two thin ones. What it is, whatever file it was read from.

LoRA (arXiv 2106.09685): y = W x + s B A x. rsLoRA (arXiv 2312.03732) has another factor s, and nothing else. DoRA (arXiv
2402.09353): y = m / |W + s B A| (W + s B A) x, |.| being the norm of each row and m a learned vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from .adapter_targets import Target


@dataclass(frozen=True)
class Pair:
    """The two factors beside one matrix.

    a (columns, r), b (r, rows): the change of W^T is scale * a @ b. With experts (E, columns, r) and (E, r, rows). Of an
    embedding a is (vocab_size, r), a row a token, and b (r, hidden_size). magnitude (rows,): DoRA's, else None.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)


@dataclass(frozen=True)
class Adapter:
    """All pairs of an adapter, by the name of their target (adapter_targets.py).

    use_rslora: how a file spells the factors: alpha / sqrt(r), not alpha / r. dropout: of its training.
    ties_head: a tied head uses the embedding's pair too, as in mlx-lm; elsewhere it goes on with the embedding alone.
    base: what the file says about the model it belongs to: "name", "hash", "family".
    """

    pairs: Mapping[str, Pair]
    use_rslora: bool = False
    dropout: float = 0.0
    ties_head: bool = False
    base: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def nbytes(self) -> int:
        return sum(pair.nbytes for pair in self.pairs.values())

    @property
    def num_parameters(self) -> int:
        """How many numbers it has."""
        return sum(
            pair.a.size + pair.b.size + (0 if pair.magnitude is None else pair.magnitude.size)
            for pair in self.pairs.values()
        )


def factor(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """What B A is multiplied by."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def new_pair(target: Target, rank: int, scale: float, key: mx.array) -> Pair:
    """A pair that changes nothing yet, in float32: one factor random as PEFT draws it, the other one zero."""
    a_shape, b_shape = target.shapes(rank)
    if target.is_embedding:
        return Pair(mx.zeros(a_shape), mx.random.normal(b_shape, key=key), scale)
    bound = 1.0 / math.sqrt(target.columns)
    return Pair(mx.random.uniform(-bound, bound, a_shape, key=key), mx.zeros(b_shape), scale)
