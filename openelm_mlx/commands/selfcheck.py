"""`python -m openelm_mlx selfcheck`: does this machine compute what it should? A report to paste into an issue."""

from __future__ import annotations

import argparse

from .output import report, report_json

HELP = "check on this machine what nobody could check on it, and print a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--only", metavar="TEXT", help="only the checks whose name has this in it")
    parser.add_argument("--no-timings", action="store_true", help="check only: time nothing and store nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check and print. Returns 0 when nothing failed, else 1."""
    from .. import __version__
    from ..bench.benchmark import machine_description
    from ..bench.conditions import disturbances
    from ..bench.selfcheck import CHECKS, run_checks
    from ..errors import SettingError

    names = [name for name in CHECKS if args.only is None or args.only in name]
    if not names:
        raise SettingError(f"No check has {args.only!r} in its name; there are: {', '.join(CHECKS)}.")
    outcomes = []
    if not args.json:
        report(f"openelm_mlx {__version__} on {machine_description()}")
        for sentence in disturbances():
            report(f"(note: {sentence})")
    for outcome in run_checks(names):
        outcomes.append(outcome)
        if not args.json:
            word = {True: "ok    ", False: "FAILED", None: "-     "}[outcome.passed]
            report(f"{word} {outcome.name} ({outcome.seconds:.1f} s): {outcome.detail}")
    failed = sum(outcome.passed is False for outcome in outcomes)
    # What is wrong must not be made fast; and whoever asks for one check wants no others.
    timings, file = [], None
    if not failed and args.only is None and not args.no_timings:
        from ..bench.alternatives import time_alternatives, winners
        from ..memory.choices import store_choices

        timings = time_alternatives()
        file = store_choices(winners(timings)) if timings else None
    if args.json:
        report_json(
            {
                "machine": machine_description(),
                "outcomes": [vars(outcome) for outcome in outcomes],
                "timings": [each.as_dict() for each in timings],
                "file": None if file is None else str(file),
            }
        )
    else:
        for timing in timings:
            report(f"timed  {timing.line()}")
        if file is not None:
            report(
                f"These choices hold from now on; they are kept in {file}, and the defaults return when it is deleted."
            )
        report(f"{len(outcomes)} checks, {failed} failed. Please paste all of this into an issue when one failed.")
    return 1 if failed else 0
