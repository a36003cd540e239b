"""Differences between MLX's CPU and GPU backends: half precision, compiling, the layout of matrices, kernel choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import mlx.core as mx
from mlx import nn

from .prompt_products import PRODUCTS_TO_ON_CUDA
from .routing_ways import BY_SORTING, IN_BLOCKS, KERNEL_ROWS_ON_CUDA, ExpertWays
from .tracing import compile_apart

# Combinations of shapes for which an elementwise function stays traced: an OpenELM has one for each layer and number of rows.
MOST_TRACES = 2048


_CPU = mx.Device(mx.cpu)


def runs_on_cpu() -> bool:
    """Whether MLX's CPU backend computes."""
    return mx.default_device() == _CPU


@dataclass(frozen=True)
class KernelChoices:
    """Choices between equivalent kernels; which one is faster depends on the machine.

    rows_in_a_tile: an expert's rows are padded to a multiple of it in memory (1: not padded). spare_places: how many unused
    places a cache's buffer has at least. compiled_step: decode in compiled pieces. fuse_residual_add: the residual stream
    is added in the product's own kernel; fuse_many_residual_adds: only where there are several rows. bias_apart: the bias
    of a single row is added in a kernel of its own.
    slots: decoding requests keep their keys and values side by side, and their attention is one call (models/slots.py).
    slot_kernel: that call is a kernel of our own (models/slot_attention.py). prompts_in_slots: with it, prompts beside others
    are rows of that call too. prompt_products_to: a chunk of a prompt that goes beside others attends by two products and a
    softmax, in up to eight blocks of so many scores a layer; 0: never. pads_rows: a pass with chunks of prompts gets rows
    that are nobody's, so that numbers of rows are few. expert_ways: which way so many rows at once go through their experts
    (models/routing_ways.py). expert_kernel_rows: from and to how many of them go by a kernel of our own instead, where
    experts are in MXFP4 (models/expert_kernel.py); (0, 0): none.
    """

    rows_in_a_tile: int = 1
    spare_places: int = 0
    compiled_step: bool = True
    fuse_residual_add: bool = False
    bias_apart: bool = False
    slots: bool = True
    slot_kernel: bool = False
    prompts_in_slots: bool = False
    prompt_products_to: int = 0
    expert_ways: ExpertWays = BY_SORTING
    fuse_many_residual_adds: bool = False
    pads_rows: bool = False
    expert_kernel_rows: tuple[int, int] = (0, 0)


def default_choices() -> KernelChoices:
    """What is chosen where nobody has measured (`selfcheck` does): by the backend.

    CUDA, measured on an H200 (docs/LOG.md): a sorted product over 2,880 rows took ten times as long as over 2,944; for one
    token over a multiple of 256 places MLX takes cuDNN, which is four times as slow as its own kernel; and a product with a
    bias goes through cublasLt, which takes longer than MLX's own kernel for one row and the sum. Few rows and their experts:
    a route took as long as the 16 rows of a tile, sorted or not, and experts with all their rows side by side half of that
    from 16 rows on; blocks of 16 are the same kernel for fewer tiles (`python -m benchmarks.experts_for_few_rows`).
    cuDNN builds a program for each shape of a prompt's chunk, which took 40 ms and more a shape; products do not. But cublasLt
    takes half a millisecond for a product whose shape is new, and an OpenELM has a hundred of them for each number of rows.
    Attention over caches apart costs a GPU some calls a layer for each request (docs/benchmarks.md). Metal: nothing is
    measured; its product with one row is written so that a sum costs nothing. The CPU backend is slower
    compiled, its BLAS would add each product to the residual stream itself, which is larger: less exact; and it computes
    what a row is padded with as it does a row.
    """
    if runs_on_cpu():
        return KernelChoices(compiled_step=False, slots=False)
    if mx.cuda.is_available():
        return KernelChoices(
            rows_in_a_tile=128,
            spare_places=8,
            bias_apart=True,
            slot_kernel=True,
            prompts_in_slots=True,
            prompt_products_to=PRODUCTS_TO_ON_CUDA,
            expert_ways=IN_BLOCKS,
            expert_kernel_rows=KERNEL_ROWS_ON_CUDA,
            fuse_many_residual_adds=True,
            pads_rows=True,
        )
    return KernelChoices(fuse_residual_add=True)


def linear(module: Any, x: mx.array, bias_apart: bool = False) -> mx.array:
    """module(x), a linear layer's. bias_apart: see `KernelChoices`."""
    if bias_apart and type(module) is nn.Linear and "bias" in module and x.size == x.shape[-1]:
        return x @ module["weight"].T + module["bias"]
    result: mx.array = module(x)
    return result


def widen(x: mx.array) -> mx.array:
    """x in float32 on the CPU, x itself on a GPU: for an operation whose result is then cast back to x's own type.

    The GPU kernels of rotary embedding, attention and gathered products accumulate in float32 whatever their input. The CPU
    backend computes them in the type of the input, which loses a digit in half precision, or does not support it;
    `gather_qmm` is also eight times as fast there in float32.
    """
    if x.dtype == mx.float32 or not runs_on_cpu():
        return x
    return x.astype(mx.float32)


def by_columns(matrix: mx.array) -> mx.array:
    """The same matrix (..., rows, columns), stored column by column instead of row by row.

    `x @ matrix.T` in float32 is 2.3 times as fast with it on the CPU backend, however many rows x has (docs/LOG.md).
    """
    return mx.contiguous(matrix.swapaxes(-1, -2)).swapaxes(-1, -2)


def one_kernel(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function`, elementwise, compiled to one kernel on a GPU. On the CPU it stays as it is.

    There MLX would call the machine's C++ compiler, which may not be installed and takes a second if it is. The function is
    traced for each combination of shapes: traced without shapes, every operand of every operation would be broadcast first,
    and operations beyond the depth of MLX's compiler (the casts of the inputs) would become separate kernels.
    """
    made: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}

    @wraps(function)
    def call(*arguments: mx.array | float) -> mx.array:
        if mx.default_device() == _CPU:  # `runs_on_cpu`, without one more call in every layer
            return function(*arguments)
        shapes = tuple([each.shape for each in arguments if isinstance(each, mx.array)])
        compiled = made.get(shapes)
        if compiled is None:
            if len(made) >= MOST_TRACES:
                made.clear()
            # A function of its own: MLX looks through the traces of one function one by one.
            made[shapes] = compiled = compile_apart(function)
        found: mx.array = compiled(*arguments)
        return found

    return call


def add_rounded(x: mx.array, y: mx.array, dtype: mx.Dtype) -> mx.array:
    """x + y, both of the same shape, rounded to `dtype` but returned as float32, so that the next operation needs no cast."""
    return _adder(dtype)(x, y)


@lru_cache
def _adder(dtype: mx.Dtype) -> Callable[..., mx.array]:
    def add(x: mx.array, y: mx.array) -> mx.array:
        return (x.astype(mx.float32) + y.astype(mx.float32)).astype(dtype).astype(mx.float32)

    return one_kernel(add)
