"""`python -m benchmarks.requests`: many requests at once on random models of the released shapes, beside mlx-lm."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openelm_mlx.commands.bench_requests import numbers_of
from openelm_mlx.commands.output import report, report_json
from openelm_mlx.errors import SettingError

from .command import run_benchmark

if TYPE_CHECKING:
    from openelm_mlx.bench.request_rows import Row, Settings

HELP = (
    "measure many requests at once, a mixed load, one alone and one beside a long prompt, on random models of the released "
    "shapes, with mlx-lm's models of the same weights in turns"
)
SHAPES = "openelm-1.1b,openelm-270m:4,gpt-oss-20b"
NUMBERS = "1,4,8,16,32,64,128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--shapes",
        metavar="NAME[:BITS],...",
        default=SHAPES,
        help=f"released shapes; with bits, packed to so many (default: {SHAPES})",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--requests", metavar="N,N", default=NUMBERS, help=f"at once (default: {NUMBERS})")
    parser.add_argument("--parts", metavar="NAME,NAME", help="of decode, mixed, one, gap, together (default: all)")
    parser.add_argument(
        "--against", choices=["mlx-lm", "nothing"], default="mlx-lm", help="compare with mlx-lm (default) or not"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of each request (default: 128)")
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="N", help="of each request (default: 64)")
    parser.add_argument(
        "--long-context",
        type=int,
        default=0,
        metavar="N",
        help="length of the long prompt (default: 8,192; 512 on a CPU)",
    )
    parser.add_argument("--mixed-requests", type=int, default=64, metavar="N", help="in the mixed load (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs whose median counts (default: 3)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        metavar="S",
        help="for all shapes together; begin nothing more after them (default: 420)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, and print every row as it is known. Returns 0, or 1 when something could not be measured."""
    if not 0 < args.seconds < float("inf"):
        raise SettingError(f"--seconds is {args.seconds:g}: it must be above 0.")
    if args.layers is not None and args.layers < 1:
        raise SettingError(f"--layers is {args.layers}: it must be at least 1.")
    import mlx.core as mx

    from openelm_mlx.bench.benchmark import machine_description
    from openelm_mlx.bench.random_pair import shape_config

    settings = settings_of(args)
    shapes = [_shape(each) for each in args.shapes.split(",")]
    for shape, _ in shapes:
        shape_config(shape, args.layers)  # a wrong one is a sentence, before anything is drawn
    end = time.perf_counter() + args.seconds
    found: dict[str, tuple[list[Row], str | None]] = {}
    for place, (shape, bits) in enumerate(shapes):
        # A gpt-oss takes about twice as long as the others.
        weights = [2 if each.startswith("gpt-oss") else 1 for each, _ in shapes[place:]]
        limit = max(0.0, end - time.perf_counter()) * weights[0] / sum(weights)
        name = shape if bits is None else f"{shape}:{bits}"
        found[name] = _measure(shape, bits, settings, limit, args)
        mx.clear_cache()  # both models are gone
    if args.json:
        shown = {name: {"rows": [row.as_dict() for row in rows], "error": told} for name, (rows, told) in found.items()}
        report_json({"machine": machine_description(), "shapes": shown})
    is_complete = all(told is None and all(row.error is None for row in rows) for rows, told in found.values())
    return 0 if is_complete else 1


def settings_of(args: argparse.Namespace) -> Settings:
    """What is to be measured. Raises SettingError."""
    from openelm_mlx.bench.request_rows import PARTS, Settings

    return Settings(
        numbers_of(args.requests),
        args.prompt_tokens,
        args.completion_tokens,
        args.long_context,
        args.mixed_requests,
        args.rounds,
        args.seconds,
        PARTS if args.parts is None else args.parts.split(","),
    )


def _measure(
    shape: str, bits: int | None, settings: Settings, seconds: float, args: argparse.Namespace
) -> tuple[list[Row], str | None]:
    """A shape's rows, and why there are none or not all."""
    from dataclasses import replace

    from openelm_mlx.bench.random_pair import random_pair, shape_config
    from openelm_mlx.commands.bench_requests import show

    started, rows = time.perf_counter(), []
    name = f"{shape}{'' if bits is None else f' in {bits} bits'}"
    try:
        model, other = random_pair(shape_config(shape, args.layers), bits, args.against == "mlx-lm")
        took = time.perf_counter() - started
        if not args.json:
            report(f"{name}: random weights drawn in {took:.1f} s")
        for row in show(name, model, other, replace(settings, seconds=max(0.0, seconds - took)), args.json):
            rows.append(row)
    except Exception as error:  # noqa: BLE001 - one shape that fails must not end the others
        told = f"{type(error).__name__}: {error}"
        if not args.json:
            report(f"{name}: {told}")
        return rows, told
    return rows, None


def _shape(text: str) -> tuple[str, int | None]:
    name, _, bits = text.strip().partition(":")
    if bits not in ("", "4", "5", "6", "8"):
        raise SettingError(f"--shapes has {text!r}: after the colon stand bits, 4, 5, 6 or 8.")
    return name, int(bits) if bits else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("requests", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
