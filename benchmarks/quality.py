"""`python -m benchmarks.quality`: what fewer bits of the dense parts do to a model; makes the table that `plan` shows."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from openelm_mlx.commands.options import add_overwrite
from openelm_mlx.commands.output import report
from openelm_mlx.errors import SettingError
from openelm_mlx.outputs import checked_output, write_output

from .command import run_benchmark

if TYPE_CHECKING:
    from .measurements.quality import Divergence

HELP = "measure how far fewer bits of the dense parts move a model's next-token distributions"
DEMOS = ("demo-gpt-oss", "demo-openelm")
WIDTHS = {"gpt-oss-20b": 6, "openelm-270m": 16, "openelm-3b": 6}  # shape: layers of it
WHAT = "The table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--words", type=int, default=2, metavar="N", help="what the demos say of the first N of 48 words (default: 2)"
    )
    parser.add_argument(
        "--all", action="store_true", help="also random models of the released widths: an hour on a slow CPU"
    )
    parser.add_argument("--table", metavar="FILE", help="also write a table as openelm_mlx/memory/quality.tsv is one")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print a row as it is known. Returns 0."""
    from .measurements.quality import COLUMNS, HEADING, WORDS

    if not 1 <= args.words <= len(WORDS):
        raise SettingError(f"--words is {args.words}: give a whole number from 1 to {len(WORDS)}.")

    def is_table(file: BinaryIO) -> bool:
        return file.readline().decode().rstrip("\r\n") == COLUMNS

    if args.table is not None:
        checked_output(args.table, WHAT, is_table, args.overwrite)  # hours later it would be too late
    report(HEADING)
    found = []
    for row in rows(WORDS[: args.words], args.all):
        found.append(row)
        report(row.line())
    if args.table is not None:
        command = f"python -m benchmarks.quality --words {args.words}{' --all' * args.all}"
        lines = [COLUMNS, *(row.tsv(time.strftime("%Y-%m-%d"), command) for row in found)]
        write_output(args.table, "\n".join(lines) + "\n", WHAT, is_table, args.overwrite)
    return 0


def rows(words: Sequence[str], with_widths: bool) -> Iterator[Divergence]:
    """What is measured: the demos over what they say of `words`, and random models of the released widths."""
    from .measurements.quality import demo_divergences, random_divergences

    for source in DEMOS:
        yield from demo_divergences(source, words=words)
    for shape, num_layers in WIDTHS.items() if with_widths else ():
        yield from random_divergences(shape, num_layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("quality", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
