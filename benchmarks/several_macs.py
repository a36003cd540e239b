"""`python -m benchmarks.several_macs`: a model over processes of this machine, beside the same model in one process."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from openelm_mlx.commands.output import report, report_json
from openelm_mlx.errors import SettingError

from .command import run_benchmark

HELP = "measure what a pipeline costs where the network costs nothing: hops and tokens over processes on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="with this one (default: 2)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of all, the best of which counts (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0."""
    if not 2 <= args.processes <= 8:
        raise SettingError(f"--processes is {args.processes}: give 2 to 8.")
    if args.rounds < 1:
        raise SettingError(f"--rounds is {args.rounds}: give at least 1.")
    from openelm_mlx.bench.benchmark import machine_description
    from openelm_mlx.bench.several import check_workers

    rounds = []
    with _workers(args.processes - 1) as addresses:
        if not args.json:
            report(machine_description())
        for _ in range(args.rounds):
            rounds.append(check_workers(addresses, None, 60.0, lambda line: None if args.json else report(line)))
    hop = min(each.hop for distances, _ in rounds for each in distances)
    models: dict[str, float] = {}
    for _, found in rounds:
        for each in found:
            ratio = each.together / each.alone
            models[each.source] = min(ratio, models.get(each.source, ratio))
    if args.json:
        report_json({"machine": machine_description(), "hop_seconds": hop / 2, "ratios": models})
        return 0
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in models.items())
    report(f"Best round: a hop {1e6 * hop / 2:,.0f} us; times one process's time a token: {ratios}.")
    return 0


@contextmanager
def _workers(count: int) -> Iterator[list[str]]:
    """The addresses of so many workers, which end with the block."""
    command = [sys.executable, "-m", "openelm_mlx", "serve-layers", "--port", "0"]
    made: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            made.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        yield [f"127.0.0.1:{_port(each)}" for each in made]
    finally:
        for each in made:
            each.kill()
            each.wait()


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    found = re.search(r"port (\d+)", process.stderr.readline())
    if found is None:
        raise SettingError("A worker did not start: run `python -m openelm_mlx serve-layers` to see why.")
    stream = process.stderr
    threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()  # what it says must not fill the pipe
    return int(found[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("several_macs", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
