"""Keys that say themselves who may see them: a few more numbers behind those of each head (models/slots.py).

MLX's CUDA kernel for one query has no masks; it takes heads of 64, 96 and 128 numbers. Where heads have 64, the first
number behind a key's own is its mark: 0, or `UNSEEN` where its request may not see it. Every query has a 1 there, so that
a key with `UNSEEN` gets a score whose exponential is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .precision import one_kernel

# Numbers of a head -> how many more stand behind them.
SPARE_DIMS = {64: 32}
UNSEEN = -30_000.0


class Tails(NamedTuple):
    """What stands behind queries (size + spare,): is_own says which numbers are a query's own, behind has the others."""

    is_own: mx.array
    behind: mx.array


def make_tails(size: int, spare: int, dtype: mx.Dtype) -> Tails:
    """For heads of `size` numbers with `spare` ones behind."""
    behind = np.zeros((size + spare,), np.float32)
    behind[size] = 1.0
    return Tails(mx.array(np.arange(size + spare) < size), mx.array(behind).astype(dtype))


def with_tails(heads: mx.array, num_queries: int, tails: Tails, scale: float) -> mx.array:
    """The first of all heads (S, n, 1, D), times scale and with their tails: (S, num_queries, 1, D + spare).

    One elementwise kernel: it is given more numbers of each head than there are, which are the next head's, and takes none
    of those. So there have to be heads behind: the keys'.
    """
    S, n, _, size = heads.shape
    width = tails.behind.size
    assert n > num_queries, f"{num_queries} queries are all of {n} heads"
    assert width <= 2 * size, f"a head of {size} numbers has {width - size} behind them"
    spread = mx.as_strided(heads, (S, num_queries, 1, width), (n * size, size, size, 1))
    return _with_tails(spread, *tails, scale)


def split_scale(scale: float) -> tuple[float, float]:
    """What of attention's scale the queries themselves are multiplied by, and what is left: powers of two lose no bit."""
    return (scale, 1.0) if math.frexp(scale)[0] == 0.5 else (1.0, scale)


@one_kernel
def _with_tails(spread: mx.array, is_own: mx.array, behind: mx.array, scale: float) -> mx.array:
    return mx.where(is_own, spread * scale, behind)
