"""`python -m benchmarks.training`: a training step against mlx-lm's tuner: equal batches, mixed lengths, peak memory."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from openelm_mlx.checks import whole_number

from .command import run_benchmark, show_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .measurements.training import Measured

HELP = "train adapters with this library and with mlx-lm's tuner in turns, and compare speed and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-openelm", metavar="SOURCE", help="default: demo-openelm")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="of an equal batch (default: 4)")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens of its rows (default: 64)")
    parser.add_argument("--mixed", type=int, default=32, metavar="N", help="rows of mixed length (default: 32)")
    parser.add_argument("--long", type=int, default=512, metavar="N", help="tokens of the long row (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measured in turns (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print a row as it is known. Returns 0."""
    for name in ("rows", "length", "mixed", "long", "rounds"):
        whole_number(name, getattr(args, name), high=10**6)

    def rows() -> Iterator[Measured]:
        from .measurements.training import Pair, Sizes

        pair = Pair.of(args.model, Sizes(args.rows, args.length, args.mixed, args.long, args.rounds))
        yield pair.equal_batches()
        yield pair.mixed_lengths()
        yield pair.peak_memory()

    return show_rows(f"{args.model}: LoRA on attention, rank 8, against mlx-lm's tuner", rows(), args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("training", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
