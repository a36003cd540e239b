"""Products with matrices that are fast on MLX's CPU backend: forward and backward for a model in training, and on all
cores for long passes without gradients.

That backend's BLAS multiplies 2.4 times as fast with a matrix that lies in memory as the product reads it. The forward pass
reads a matrix the one way and the backward pass the other, so one of them would always be slow; a copy that is turned costs
hundredths of the product. And it computes on one core, so the rows of a product are shared among the streams of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from ..models.adapter_sites import put_module
from ..models.base import LanguageModel
from ..models.cores import streams
from ..models.moe import Experts, Routes
from ..models.precision import runs_on_cpu

# Fewer rows are not worth a stream of their own.
LEAST_ROWS = 16

# Of x, a matrix, and a bias or none.
Times = Callable[[mx.array, mx.array, mx.array | None], mx.array]
Multiply = Callable[..., mx.array]


@mx.custom_function
def product(x: mx.array, matrix: mx.array) -> mx.array:
    """x @ matrix.T for x (..., columns) and a matrix (rows, columns): (..., rows). The same bits on any number of cores."""
    y = _on_all_cores(x.reshape(-1, x.shape[-1]), mx.contiguous(matrix.T))
    return y.reshape(*x.shape[:-1], -1)


@product.vjp
def _gradients(inputs: Any, gradient: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, matrix = inputs
    of_rows = gradient.reshape(-1, gradient.shape[-1])
    of_x = _on_all_cores(of_rows, mx.contiguous(matrix)).reshape(x.shape)
    # Nothing is computed of this one where the matrix is frozen.
    of_matrix = _on_all_cores(of_rows.T, x.reshape(-1, x.shape[-1]))
    return of_x, of_matrix


def _on_all_cores(x: mx.array, matrix: mx.array, multiply: Multiply = mx.matmul) -> mx.array:
    """x (M, K) @ matrix (K, N), a piece of the rows on each stream."""
    pieces = _pieces(x.shape[0])
    if len(pieces) < 2:
        return multiply(x, matrix)
    return mx.concatenate([multiply(x[rows], matrix, stream=stream) for stream, rows in pieces])


def _pieces(num_rows: int) -> list[tuple[mx.Stream, slice]]:
    """The rows that each stream is given; with fewer than two pieces they are not worth sharing."""
    found = streams()
    count = min(len(found), num_rows // LEAST_ROWS)
    return [(found[i], slice(num_rows * i // count, num_rows * (i + 1) // count)) for i in range(count)]


def times(x: mx.array, matrix: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ matrix.T + bias by `product` where x is float32; half precision has another kernel."""
    y: mx.array = product(x, matrix) if x.dtype == mx.float32 else x @ matrix.T  # type: ignore[assignment]
    return y if bias is None else y + bias


def spread(x: mx.array, matrix: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ matrix.T + bias with the bits of an `nn.Linear`, its rows shared among the cores; no copy of the matrix."""
    rows, turned = x.reshape(-1, x.shape[-1]), matrix.T
    if bias is None:
        y = _on_all_cores(rows, turned)
    else:
        y = _on_all_cores(rows, turned, partial(mx.addmm, bias))
    return y.reshape(*x.shape[:-1], -1)


class _Linear(nn.Module):
    """In the place of an `nn.Linear`, with its parameters."""

    def __init__(self, base: nn.Module, times: Times) -> None:
        super().__init__()
        self.times = times
        self.weight = base["weight"]
        if "bias" in base:
            self.bias = base["bias"]

    def __call__(self, x: mx.array) -> mx.array:
        return self.times(x, self["weight"], self.get("bias"))


class _Embedding(nn.Module):
    """In the place of an `nn.Embedding`, with its parameters; the product is that of a tied head."""

    def __init__(self, base: nn.Module, times: Times) -> None:
        super().__init__()
        self.times = times
        self.weight = base["weight"]

    def __call__(self, tokens: mx.array) -> mx.array:
        found: mx.array = self["weight"][tokens]
        return found

    def as_linear(self, x: mx.array) -> mx.array:
        return self.times(x, self["weight"], None)


class _Experts(Experts):
    """`Experts` that share sorted rows among the cores: each piece goes through its own on a stream."""

    def feed_forward(self, x: mx.array, routes: Routes) -> mx.array:
        pieces = _pieces(x.shape[0]) if x.ndim == 2 else []  # in other shapes there are few
        if len(pieces) < 2:
            return super().feed_forward(x, routes)
        outputs = []
        for stream, rows in pieces:
            part = routes._replace(
                experts=routes.experts[rows],
                slots=None if routes.slots is None else routes.slots[rows],
                rows=None if routes.rows is None else routes.rows[rows],
            )
            with mx.stream(stream):
                outputs.append(super().feed_forward(x[rows], part))
        return mx.concatenate(outputs)


def multiply_both_ways(model: LanguageModel) -> None:
    """Let the matrices of a model to be trained be multiplied by `product`, where the CPU computes."""
    _replace(model, times)


@contextmanager
def on_all_cores(model: LanguageModel) -> Iterator[None]:
    """Within the block matrices are multiplied by `spread`, where the CPU computes, for long passes; experts' likewise."""
    replaced = _replace(model, spread)
    experts = [module for module in model.modules() if type(module) is Experts] if runs_on_cpu() else []
    for module in experts:
        module.__class__ = _Experts
    try:
        yield
    finally:
        for module in experts:
            module.__class__ = Experts
        for path, module in replaced.items():
            put_module(model, path, module)


def _replace(model: LanguageModel, times: Times) -> dict[str, nn.Module]:
    """Put such modules in the place of those of MLX's. Returns path -> what was there."""
    if not runs_on_cpu():
        return {}
    kinds: dict[type, Any] = {nn.Linear: _Linear, nn.Embedding: _Embedding}
    found = {
        path: module for path, module in model.named_modules() if type(module) in kinds and ".experts." not in path
    }
    for path, module in found.items():
        put_module(model, path, kinds[type(module)](module, times))
    return found
