"""AdamW as PyTorch's, the learning rate of each step as CoreNet's, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

# Where CoreNet's warm-up begins.
WARMUP_FROM = 1e-6


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: a linear warm-up, then half a cosine from `peak` to `final`, or `peak` throughout.

    corenet/optims/scheduler/cosine.py: step i of the warm-up has 1e-6 + i * (peak - 1e-6) / warmup.
    """

    peak: float
    steps: int
    warmup: int = 0
    final: float | None = None

    def rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup:
            start = min(WARMUP_FROM, self.peak)
            return start + step * (self.peak - start) / self.warmup
        if self.final is None:
            return self.peak
        period = max(1, self.steps - self.warmup)
        turned = math.pi * min(step - self.warmup, period) / period
        return self.final + (self.peak - self.final) * (1 + math.cos(turned)) / 2


def adamw(
    betas: tuple[float, float], eps: float, weight_decay: float, decayed: Callable[[str, mx.array], bool] | None = None
) -> optim.Optimizer:
    """PyTorch's AdamW: bias-corrected moments, decay apart from the gradient. Its learning rate is set for each step.

    decayed: which parameters (name, array) decay; all of them when it is None.
    """

    def one(decay: float) -> optim.AdamW:
        return optim.AdamW(0.0, betas=list(betas), eps=eps, weight_decay=decay, bias_correction=True)

    if decayed is None or not weight_decay:
        return one(weight_decay)
    return optim.MultiOptimizer([one(weight_decay), one(0.0)], [decayed])


def is_matrix(_: str, parameter: mx.array) -> bool:
    """Whether weight decay is for this parameter: CoreNet leaves gains and biases out."""
    return parameter.ndim > 1


def set_rate(optimizer: optim.Optimizer, rate: float | mx.array) -> None:
    """The learning rate of the next update."""
    for each in getattr(optimizer, "optimizers", [optimizer]):
        each.learning_rate = rate


def global_norm(gradients: Any) -> mx.array:
    """The norm of all gradients as one vector, () in float32."""
    # By name: in what order they are added decides the last bit, and a run that goes on has them in another one.
    named = sorted(tree_flatten(gradients), key=lambda each: str(each[0]))
    squares = [mx.square(gradient.astype(mx.float32)).sum() for _, gradient in named]
    return mx.sqrt(mx.stack(squares).sum())


def clipped(gradients: Any, norm: mx.array, most: float | None) -> Any:
    """The gradients, whose norm this is, shortened to `most` where they are longer; unchanged for None."""
    if most is None:
        return gradients
    factor = mx.minimum(most / (norm + 1e-6), 1.0)
    return tree_map(lambda gradient: gradient * factor, gradients)
