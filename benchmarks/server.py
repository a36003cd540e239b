"""`python -m benchmarks.server`: how soon `openelm_mlx serve` listens, what HTTP costs, and what a second turn computes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

from openelm_mlx.errors import SettingError

from .command import Row, run_benchmark, show_rows

HELP = "measure the server: its start, HTTP beside the engine in turns, and the cached tokens of a chat"
PARTS = ("start", "overhead", "turns")
# About 1,500 tokens of the demo.
LONG_TEXT = "The ship sailed out of the harbour, past the tower and the lamp, and down the river to the sea. " * 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-gpt-oss", metavar="NAME", help="default: demo-gpt-oss")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="that stream at once (default: 8)")
    parser.add_argument("--completion-tokens", type=int, default=128, metavar="N", help="of each (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="whose medians count (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, and print every row as it is known. Returns 0."""
    for name in ("clients", "completion_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1.")
    parts = args.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise SettingError(f"--parts has {part!r}: give some of {', '.join(PARTS)}.")
    return show_rows(f"{args.model}, served", _rows(args, parts), args.json)


def _rows(args: argparse.Namespace, parts: Sequence[str]) -> Iterator[Row]:
    from .measurements.server import measure_overhead, measure_start, measure_turns

    measures: dict[str, Callable[[], Row]] = {
        "start": lambda: measure_start(args.model, args.rounds),
        "overhead": lambda: measure_overhead(args.model, args.clients, args.completion_tokens, args.rounds),
        "turns": lambda: measure_turns(args.model, LONG_TEXT),
    }
    for part in parts:
        yield measures[part]()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("server", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
