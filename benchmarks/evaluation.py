"""`python -m benchmarks.evaluation`: how fast choices are scored, beside mlx-lm's evaluator in the same run.

On a GPU, with a released shape and random weights:

    python -m benchmarks.evaluation --model openelm-1.1b --questions 200
    python -m benchmarks.evaluation --model openelm-1.1b --questions 200 --few-shot-tokens 1000 --seconds 60

Besides mlx, mlx-lm and numpy it needs nothing, and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from openelm_mlx.checks import whole_number
from openelm_mlx.commands.output import say
from openelm_mlx.errors import SettingError

from .command import run_benchmark, show_rows

if TYPE_CHECKING:
    from .measurements.evaluation import Rates

HELP = "measure how fast choices are scored, beside mlx-lm's evaluator on the same questions and weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", default="demo-openelm", metavar="NAME",
        help="demo-openelm (default), demo-gpt-oss, or random weights in a shape: openelm-270m, -450m, -1.1b, -3b, gpt-oss-20b",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="each with 4 choices (default: 200)")
    parser.add_argument(
        "--few-shot-tokens", default="0", metavar="N[,N...]", help="tokens that all questions begin with (default: 0)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help="end a round of mlx-lm's side after so many, and compare the time that a question takes (default: never)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N", help="of a shape only so many layers")
    parser.add_argument("--tokens-at-once", type=int, metavar="N", help="in a pass of ours (default: the plan's chunk)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0."""
    for name in ("questions", "rounds"):
        whole_number(name, getattr(args, name))
    if args.tokens_at_once is not None:
        whole_number("tokens_at_once", args.tokens_at_once)
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise SettingError(f"--seconds is {args.seconds:g}: it must be above 0.")
    try:
        examples = [int(each) for each in args.few_shot_tokens.split(",")]
    except ValueError:
        examples = [-1]
    for each in examples:
        whole_number("few_shot_tokens", each, low=0)
    return show_rows("scoring choices", _rows(args, examples), args.json)


def _rows(args: argparse.Namespace, examples: Sequence[int]) -> Iterator[Rates]:
    from .measurements.evaluation import measure

    for each in examples:
        yield measure(
            args.model, args.questions, each, args.rounds, args.layers, args.tokens_at_once,
            seconds=math.inf if args.seconds is None else args.seconds, note=say,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("evaluation", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
