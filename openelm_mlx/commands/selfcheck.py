"""`python -m openelm_mlx selfcheck`: does this machine compute what it should? A report to attach to an issue."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from . import INTERRUPTED
from .output import report as report_lines
from .output import report_json, say, terminal

if TYPE_CHECKING:
    from ..bench.selfcheck import Check, Outcome
    from ..memory.machine import Machine

FORMAT, WHAT = "openelm_mlx selfcheck 1", "The report"
HELP = "check that this machine computes correctly, and write a report without personal data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--only", metavar="TEXT", help="only the checks with this number or with TEXT in their name; nothing is timed"
    )
    parser.add_argument("--no-timings", action="store_true", help="check only: time nothing and store nothing")
    parser.add_argument("--keep", action="store_true", help="keep the measured speeds for later plans, without asking")
    parser.add_argument(
        "--output", metavar="FILE", help="file for the report (default: selfcheck-DATE.json in this folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the report itself, one JSON object")
    several = parser.add_argument_group("several machines (instead of the checks of this one)")
    several.add_argument(
        "--workers", metavar="HOST:PORT,...",
        help="how far away these are, and whether the demos over all of them answer as on this machine, bit for bit",
    )  # fmt: skip
    several.add_argument("--secret-file", metavar="FILE", help="the secret that all of them have a copy of")


def run(args: argparse.Namespace) -> int:
    """Check, print, and leave the report. Returns 0 when nothing failed, 1 when something did, a timing too,
    130 after Ctrl-C."""
    if args.workers is not None:
        return run_several(args)
    if args.secret_file is not None:
        raise SettingError("--secret-file is for --workers: add it, or leave the file out.")
    from ..bench.report import cleaner
    from ..bench.selfcheck import MOST_SECONDS, TIMING_SECONDS, run_checks
    from ..bench.selfcheck_machine import facts, facts_lines
    from ..outputs import checked_output, json_with, write_output

    is_ours = json_with("format", FORMAT)
    checks = chosen_checks(args.only)
    clean, date = cleaner(), time.strftime("%Y-%m-%d")
    output = checked_output(args.output or f"selfcheck-{date}.json", WHAT, is_ours, None)

    def tell(line: str) -> None:
        if not args.json:
            report_lines(clean(line))

    def keep_report() -> None:
        report["seconds"] = time.perf_counter() - started
        write_output(output, json.dumps(clean(report), indent=2) + "\n", WHAT, is_ours, None)

    started = time.perf_counter()
    found = facts()
    report: dict[str, Any] = {
        "format": FORMAT, "date": date, "facts": found, "checks": [], "timings": [], "speed": None, "timing_failed": None,
        "interrupted": False,
    }  # fmt: skip
    for line in facts_lines(found):
        tell(line)
    is_interrupted, outcomes = False, []
    with_timings = args.only is None and not args.no_timings
    try:
        for outcome in run_checks(checks, MOST_SECONDS - (TIMING_SECONDS if with_timings else 0)):
            outcomes.append(outcome)
            report["checks"].append(outcome.as_dict())
            for line in lines(outcome):
                tell(line)
        # No timing after a failed check, or when only some checks were requested.
        if with_timings and not any(each.passed is False for each in outcomes):
            keep_report()  # timing runs in this process: if it crashes, the report must survive
            report["timing_failed"] = failure_of(
                lambda: time_machine(report, tell, args, date, lambda: MOST_SECONDS - (time.perf_counter() - started))
            )
            if report["timing_failed"] is not None:
                tell(f"The timing ended with an error: {report['timing_failed']}")
    except KeyboardInterrupt:
        is_interrupted = True
    report["interrupted"] = is_interrupted
    keep_report()
    if args.json:
        report_json(clean(report))
    failed = sum(each.passed is False for each in outcomes)
    passed = sum(each.passed is True for each in outcomes)
    tell(
        f"{'Interrupted. ' if is_interrupted else ''}{passed} of {len(checks)} checks passed, {failed} failed, "
        f"{len(checks) - passed - failed} did not run or do not apply here ({report['seconds']:.0f} s)."
    )
    tell(
        f"The report is in {output.name if output.parent == Path() else output}; it has no personal data in it. "
        "Please attach it to an issue, especially if a check failed."
    )
    if is_interrupted:
        return INTERRUPTED
    return 1 if failed or report["timing_failed"] is not None else 0


def run_several(args: argparse.Namespace) -> int:
    """`--workers`: returns 0 when a model over all machines gives this machine's tokens, else 1."""
    from ..bench.several import check_workers
    from ..link.team import DEADLINE

    if args.only is not None or args.keep or args.output is not None:
        raise SettingError("--workers has checks of its own: leave --only, --keep and --output out.")
    distances, found = check_workers(
        args.workers, args.secret_file, DEADLINE, lambda line: None if args.json else report_lines(line)
    )
    if args.json:
        report_json({"workers": [vars(each) for each in distances], "models": [vars(each) for each in found]})
    return 0 if all(each.same_tokens for each in found) else 1


def failure_of(work: Callable[[], None]) -> str | None:
    """Run `work`; return its error, of any class, for the report, or None."""
    import traceback

    from ..errors import UserError

    try:
        work()
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return None


def chosen_checks(only: str | None) -> list[Check]:
    """The checks to run, in their order. Raises SettingError when none is meant."""
    from ..bench.selfcheck import all_checks

    checks = list(all_checks().values())
    if only is None:
        return checks
    chosen = [each for each in checks if (only == str(each.number) if only.isdecimal() else only in each.name)]
    if not chosen:
        names = ", ".join(f"{each.number} {each.name}" for each in sorted(checks, key=lambda each: each.number))
        raise SettingError(f"--only {only}: no check has that number or name; there are: {names}.")
    return chosen


def lines(outcome: Outcome) -> Sequence[str]:
    """An outcome for people: the check, the expected result, the actual one."""
    return (
        f"{outcome.word:20}{outcome.number:2}. {outcome.name} ({outcome.seconds:.1f} s)",
        f"{'':24}expected: {outcome.expected}",
        f"{'':24}{'found' if outcome.passed is not None else 'reason'}:{'':{4 if outcome.passed is not None else 3}}"
        f"{outcome.found}",
    )


# --- what is timed ----------------------------------------------------------------------------------------------------


def time_machine(
    report: dict[str, Any], tell: Callable[[str], None], args: argparse.Namespace, date: str, left: Callable[[], float]
) -> None:
    """Time equivalent kernels, keep the faster ones, and measure speeds as far as there is time; results go into `report`."""
    from ..bench.alternatives import time_alternatives, winners
    from ..bench.selfcheck import TIMING_SECONDS
    from ..bench.speeds import measured_speeds
    from ..memory.choices import store_choices
    from ..memory.machine import this_machine

    if left() < TIMING_SECONDS / 2:
        tell("Nothing is timed: the checks took too long; plan --calibrate measures only speeds.")
        return
    timings = time_alternatives()
    report["timings"] = [each.as_dict() for each in timings]
    for timing in timings:
        tell(f"timed  {timing.line()}")
    if timings:
        store_choices(winners(timings))
        tell("These choices are used from now on; they are kept in the cache folder until MLX is updated.")
    if left() < TIMING_SECONDS / 2:
        return
    machine = this_machine()
    tell("Speeds of this machine:")
    speeds = measured_speeds(machine, with_disk=False, left=left)
    report["speed"] = speeds.as_dict()
    for line in speeds.lines():
        tell(f"  {line}")
    if speeds.rates and (args.keep or (not args.json and wants_to_keep(tell))):
        keep(machine, speeds.rates, date)
        tell("They are kept: plan uses them from now on.")


def keep(machine: Machine, rates: Any, date: str) -> None:
    """Store the measured speeds for later plans."""
    from ..memory.calibration import store_speed

    store_speed(rates, None, machine, date)


def wants_to_keep(tell: Callable[[str], None]) -> bool:
    """Ask the user if there is a terminal; else say how to keep the speeds."""
    if not (sys.stdin is not None and sys.stdin.isatty() and terminal().isatty()):
        tell("They are not kept: use --keep, or plan --calibrate, to have later plans use them.")
        return False
    try:
        say("Keep these speeds for later plans? [y/N]")
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
