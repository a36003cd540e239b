"""`python -m benchmarks.memory`: what the planner predicts beside what is used, over models of many shapes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command import existing_folder, run_benchmark, show_rows

HELP = "measure how far the planner's figures are from what models of many shapes use"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--only", metavar="TEXT", help="only the shapes whose name has this in it")
    parser.add_argument("--prompt-tokens", metavar="N,N", default="64,512,1900", help="prompts (default: 64,512,1900)")
    parser.add_argument(
        "--folder", metavar="FOLDER", help="where to write the models (default: the system's temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print a row as it is known. Returns 0."""
    from openelm_mlx.bench.memory import HEADING, SHAPES, rows
    from openelm_mlx.errors import SettingError
    from openelm_mlx.models.precision import runs_on_cpu

    shapes = [name for name in SHAPES if args.only is None or args.only in name]
    if not shapes:
        raise SettingError(f"No shape has {args.only!r} in its name; there are: {'; '.join(SHAPES)}.")
    prompts = args.prompt_tokens.split(",")
    if not all(each.isdecimal() and int(each) > 0 for each in prompts):
        raise SettingError(f"--prompt-tokens is {args.prompt_tokens!r}: give whole numbers above 0, with commas.")
    found = rows(shapes, [int(each) for each in prompts], runs_on_cpu(), existing_folder(args.folder))
    return show_rows(HEADING, found, args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("memory", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
