"""Means with their standard errors, and the figures of a text's log-likelihood. No arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; the error is 0 for one value, which says nothing of a spread."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value, with its standard error: the sample's deviation over the root of n."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Mean(mean, 0.0, n)
    variance = math.fsum((each - mean) ** 2 for each in values) / (n - 1)
    return Mean(mean, math.sqrt(variance / n), n)


def exp_of(mean: Mean) -> Mean:
    """The exponential of a mean; its error follows from the derivative."""
    value = safe_exp(mean.value)
    return Mean(value, value * mean.error, mean.n)


def safe_exp(value: float) -> float:
    """Infinity where it would overflow."""
    return math.exp(value) if value < 709 else math.inf
