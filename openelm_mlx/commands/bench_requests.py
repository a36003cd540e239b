"""What `bench --requests` measures and prints: many requests at once, part by part."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from .options import bits_asked_for
from .output import report, say

if TYPE_CHECKING:
    from ..bench.request_rows import Row, Settings
    from ..models import Model

# More rows than any server runs together.
MOST = 1024


def numbers_of(text: str, option: str = "--requests") -> list[int]:
    """The numbers of requests, each once, as they were given. Raises SettingError."""
    words = [each.strip() for each in text.split(",")]
    if not all(each.isdecimal() and 1 <= int(each) <= MOST for each in words):
        raise SettingError(f"{option} is {text!r}: give whole numbers from 1 to {MOST:,}, with commas.")
    return list(dict.fromkeys(map(int, words)))


def models_of(args: argparse.Namespace) -> tuple[str, Model, Any]:
    """What is measured: its name, our model, and mlx-lm's (None where nothing is compared)."""
    theirs = args.against == "mlx-lm"
    if args.random is not None:
        from ..bench.random_pair import random_pair, shape_config

        bits = bits_asked_for(args, "--bits")
        model, other = random_pair(shape_config(args.random, args.layers), bits, theirs)
        layers = "" if args.layers is None else f", {args.layers} layers"
        return f"{args.random}{'' if bits is None else f' in {bits} bits'}{layers}, random weights", model, other
    from mlx.utils import tree_flatten

    from ..bench.benchmark import mlx_lm_model
    from ..checks import size
    from ..loading import load
    from ..memory.machine import this_machine

    model, _ = load(args.model, preset=args.preset, adapter=args.adapter)
    if not theirs:
        return args.model, model, None
    nbytes, room = sum(each.nbytes for _, each in tree_flatten(model.parameters())), this_machine().available_bytes
    if 2.2 * nbytes > room:
        raise SettingError(
            f"{args.model} takes {size(nbytes)}, and mlx-lm's model of it does not fit beside it into the {size(room)} "
            "that there are: add --against nothing."
        )
    return args.model, model, mlx_lm_model(args.model, args.preset, args.adapter)


def show(name: str, model: Model, other: Any, settings: Settings, is_silent: bool = False) -> Iterator[Row]:
    """Measure, and print every row as it is known, below its part's title, unless `is_silent`; samples go to stderr."""
    from ..bench.benchmark import machine_description
    from ..bench.conditions import disturbances
    from ..bench.request_rows import titles
    from ..bench.requests import fitting, run_parts

    if not is_silent:
        report(f"{name} on {machine_description()}; medians [least to most], and the first over the second")
        for sentence in disturbances():
            report(f"(note: {sentence})")
    of_parts, part = titles(fitting(model, settings)), None
    for row in run_parts(model, other, settings, say):
        if not is_silent and row.part != part:
            part = row.part
            report(of_parts[part])
        if not is_silent:
            report(f"  {row.line()}")
        yield row
