"""Options of the commands that measure models, and their progress on stderr."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import output
from .options import add_preset_argument, add_worker_arguments, bits_asked_for, worker_options

Add = Callable[..., None]


def add_evaluated_model(parser: argparse.ArgumentParser, whose: str = "") -> None:
    """How the model is loaded, and how results are shown. whose: said of what makes another form of a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of the repository")
    group.add_argument(
        "--adapter", metavar="PATH", help=f"a LoRA or DoRA adapter beside the weights, as for `generate`{whose}"
    )
    group.add_argument("--tokenizer", metavar="SOURCE", help="a tokenizer's file, folder or repository")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type")
    add_preset_argument(group)
    group.add_argument(
        "--dense-bits", type=int, choices=[8, 6, 5, 4],
        help=f"instead of a preset: quantize matrices that are not quantized yet to N bits as they are read{whose}",
    )  # fmt: skip
    group.add_argument("--kv-bits", type=int, choices=[8, 16], help=f"keys and values in N bits (default: 16){whose}")
    group.add_argument("--expert-slots", type=int, metavar="N", help="keep N of each layer's experts in memory")
    group.add_argument("--memory-limit", metavar="SIZE", help="memory limit, for example 8GB")
    group.add_argument("--context-length", type=int, metavar="N", help="use at most N tokens of the model's context")
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shown.add_argument("--quiet", "-q", action="store_true", help="no progress on stderr")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """For those commands that have one model, which may lie on several machines."""
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
