"""Options of the commands that measure models, and their progress on stderr."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import output
from .options import (
    add_kv_bits_argument,
    add_loading_arguments,
    add_worker_arguments,
    bits_asked_for,
    worker_options,
)

Add = Callable[..., None]


def add_evaluated_model(parser: argparse.ArgumentParser, whose: str = "") -> None:
    """How the model is loaded, and how results are shown. whose: said of what makes another form of a model."""
    group = parser.add_argument_group("model")
    add_loading_arguments(group, whose)
    add_kv_bits_argument(group, whose)
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shown.add_argument("--quiet", "-q", action="store_true", help="no progress on stderr")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """For a model, or one after the other, that may lie on several machines."""
    add_worker_arguments(parser.add_argument_group("several machines"))


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `openelm_mlx.load` for those options."""
    from .progress import byte_bar

    return {
        "context_length": args.context_length, "dtype": args.dtype, "dense_bits": bits_asked_for(args),
        "kv_bits": args.kv_bits, "expert_slots": args.expert_slots, "memory_limit": args.memory_limit,
        "tokenizer": args.tokenizer, "revision": args.revision, "adapter": args.adapter,
        "progress": None if args.quiet else byte_bar(str(args.model)),
        **(worker_options(args) if "workers" in args else {}),
    }  # fmt: skip


@contextmanager
def count_bar(unit: str, total: int | None, quiet: bool) -> Iterator[Add]:
    """A function (how many more, all of them) that draws a bar on stderr, in a terminal."""
    if quiet or not output.can_draw_bars():
        yield lambda more, total=None: None
        return
    bar: Any = None

    def add(more: int, all_of_them: int | None = total) -> None:
        nonlocal bar
        if bar is None:
            bar = output.bar(unit, all_of_them or 0, unit, leave=False)
        bar.update(more)

    try:
        yield add
    finally:
        if bar is not None:
            bar.close()
