"""`python -m benchmarks.experts_for_few_rows`: the ways through a layer's experts for 1 to 128 rows, on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from openelm_mlx.commands.output import report, report_json, say
from openelm_mlx.errors import SettingError

from .command import run_benchmark

if TYPE_CHECKING:
    from openelm_mlx.bench.expert_layer import LayerShape

    from .measurements.experts_for_few_rows import Measured

HELP = (
    "time each way through one layer's experts (random MXFP4 weights in gpt-oss's shapes) for few rows, beside the floor that "
    "reading the weights is, and what is done around the products"
)
ROWS = "1,2,4,8,12,16,24,32,48,64,96,128"
# What is around the products, and rows that ride in a prompt's chunk: fewer numbers say enough.
AROUND, CHUNK, RIDERS = (1, 8, 32, 128), 512, (8, 32, 64)
SHAPES = ("20b", "120b", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--shapes",
        metavar="NAME,NAME",
        help=f"of {', '.join(SHAPES)} (default: 20b,120b; tiny on a CPU, where those take long)",
    )
    parser.add_argument("--rows", metavar="N,N", default=ROWS, help=f"numbers of rows (default: {ROWS})")
    parser.add_argument(
        "--seconds", type=float, default=80.0, metavar="S", help="begin nothing more after this time (default: 80)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs whose median counts (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table as it is known. Returns 0, or 1 when a measurement ended with an error."""
    from openelm_mlx.bench.benchmark import machine_description
    from openelm_mlx.bench.limits import measured_limits
    from openelm_mlx.models.precision import default_choices, runs_on_cpu

    shapes = ("tiny" if runs_on_cpu() else "20b,120b") if args.shapes is None else args.shapes
    chosen = {name: _shape(name) for name in shapes.split(",")}
    numbers = args.rows.split(",")
    if not all(each.isdecimal() and 0 < int(each) <= 4096 for each in numbers):
        raise SettingError(f"--rows is {args.rows!r}: give whole numbers from 1 to 4,096, with commas.")
    if not args.seconds > 0:
        raise SettingError(f"--seconds is {args.seconds:g}: it must be above 0.")
    if args.rounds < 1:
        raise SettingError(f"--rounds is {args.rounds}: it must be at least 1.")
    end = time.perf_counter() + args.seconds
    small = all(name == "tiny" for name in chosen)
    limits = measured_limits(2**20, 64) if small else measured_limits(size=1024)
    tile = default_choices().rows_in_a_tile
    if not args.json:
        report(f"{machine_description()}; {limits.bandwidth / 1e9:,.4g} GB/s; experts' rows in tiles of {tile}")
    found, is_complete = _measure(
        chosen, [int(each) for each in numbers], limits.bandwidth, tile, args, lambda: end - time.perf_counter()
    )
    if args.json:
        report_json(
            {
                "machine": machine_description(), "bandwidth": limits.bandwidth, "rows_in_a_tile": tile,
                "complete": is_complete, "results": [each.as_dict() for each in found],
            }
        )  # fmt: skip
    elif not is_complete:
        report(f"Not all was measured within {args.seconds:g} s: --seconds, --shapes and --rows say how much is.")
    return 1 if any(each.error is not None for each in found) else 0


def _measure(
    shapes: dict[str, LayerShape],
    numbers: list[int],
    bandwidth: float,
    tile: int,
    args: argparse.Namespace,
    left: Callable[[], float],
) -> tuple[list[Measured], bool]:
    """All figures, and whether there was time for all. What matters most comes first."""
    import mlx.core as mx

    from openelm_mlx.bench.expert_layer import random_experts

    from .measurements.experts_for_few_rows import (
        Measured,
        Settings,
        measured_around,
        measured_riding,
        measured_ways,
        table,
    )

    settings, found = Settings(rounds=args.rounds), []
    around = [each for each in AROUND if each <= max(numbers)]
    for name, shape in shapes.items():
        try:
            experts = random_experts(shape, tile)
        except Exception as error:  # noqa: BLE001
            found.append(Measured(name, "the layer", 0, error=f"{type(error).__name__}: {error}"))
            if not args.json:
                report(table(f"{name}, the layer", found[-1:]))
            continue
        chunk = min(CHUNK, 4 * max(numbers))
        parts: dict[str, Iterable[Measured]] = {
            "ways through the experts": measured_ways(name, shape, experts, numbers, bandwidth, settings, left),
            "around the products": measured_around(name, shape, experts, around, settings, left),
            "riding in a prompt's chunk": measured_riding(name, shape, experts, chunk, RIDERS, settings, left),
        }
        for title, results in parts.items():
            part = []
            for each in results:
                part.append(each)
                say(each.line())  # whatever comes later, this is known
            found += part
            if part and not args.json:
                report(table(f"{name}, {title}", part))
        del experts, parts
        mx.clear_cache()
    return found, left() > 0


def _shape(name: str) -> LayerShape:
    from openelm_mlx.bench.expert_layer import LayerShape

    if name not in SHAPES:
        raise SettingError(f"--shapes has {name!r}: there are {', '.join(SHAPES)}.")
    return LayerShape(128, 128, 16) if name == "tiny" else LayerShape.of(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("experts_for_few_rows", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
