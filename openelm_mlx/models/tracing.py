"""Functions compiled by MLX, whose traces are theirs alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

_numbers = itertools.count(1)


def compile_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile(function)`, for functions that come and go.

    MLX keeps what it has traced in each thread, by the function's address, and forgets it only in the thread that gives the
    function up (compile.cpp, `CompilerCache`, 0.32.4). Called in two threads, a function leaves a trace behind in one of them,
    with the weights that it was traced with, and the next function that comes to lie at its address would be taken for it
    there. So each has a number, which is a part of what MLX compares.
    """
    traced = mx.compile(lambda number, *arguments: function(*arguments))
    return partial(traced, next(_numbers))
