"""A run of training as it is shown: a bar, lines where there is no terminal, and the losses as a picture."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import INTERRUPTED, output
from .options import add_overwrite

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..training.loop import Progress

# Where no bar can be drawn: so many lines in a run, and one at least after so many seconds.
LINES, SECONDS_OF_A_LINE = 20, 30.0
WIDTH, HEIGHT = 60, 10
_EIGHTHS = " ▁▂▃▄▅▆▇█"


class TrainingBar:
    """Shows the progress of a run of `steps` steps on stderr; nothing when it is quiet."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self.steps, self.quiet = steps, quiet
        self.step = 0
        self._bar: tqdm[Any] | None = None
        self._has_told = False
        self._said = time.monotonic()

    def begin(self, seconds: float, resumed_at: int) -> None:
        """What is known before the first step."""
        self.step = resumed_at
        if self.quiet:
            return
        if resumed_at:
            output.say(f"going on after step {resumed_at:,}")
        output.say(f"time: about {duration(seconds)}")
        if output.can_draw_bars():
            self._bar = output.bar("training", self.steps, "step", resumed_at)

    def refer(self, done: int, total: int) -> None:
        """The reference of preferences is being computed."""
        if not self.quiet and not self._has_told:
            output.say(f"reference: {total:,} answers by the model as it is")
            self._has_told = True

    def show(self, progress: Progress) -> None:
        """After a step."""
        self.step = progress.step
        if self.quiet:
            return
        measured = "" if progress.validation is None else f", validation {progress.validation:.3f}"
        measured += "" if progress.accuracy is None else f", {progress.accuracy:.0%} right"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {progress.loss:.3f}{measured}, {progress.tokens_per_second:,.0f} tok/s")
            self._bar.update(progress.step - self._bar.n)
        elif measured or self._is_due(progress):
            self._said = time.monotonic()
            output.say(
                f"step {progress.step:,} of {progress.steps:,}: loss {progress.loss:.3f}{measured}, "
                f"{progress.tokens_per_second:,.0f} tokens/s, {duration(progress.left)} left"
            )

    def _is_due(self, progress: Progress) -> bool:
        """Whether a line is, where there is no bar."""
        if progress.step == progress.steps or progress.step % max(1, progress.steps // LINES) == 0:
            return True
        return time.monotonic() - self._said >= SECONDS_OF_A_LINE

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def watched(bar: TrainingBar, output_folder: str, train: Callable[[], Path]) -> Path | None:
    """What `train` returns; None where Ctrl-C or `kill` ended it, with its state on disk. What becomes of it then is said."""
    try:
        with _ended_by_a_signal():
            return train()
    except KeyboardInterrupt:
        from ..training.state import losses_so_far

        bar.close()
        log = losses_so_far(output_folder)
        if log:
            output.say(
                f"\nInterrupted after step {log[-1]['step']:,}: {output_folder} is not written yet; the "
                "same command goes on from there, and gives what it would have given."
            )
        else:
            output.say(f"\nInterrupted before the first step: {output_folder} was not written.")
        return None
    finally:
        bar.close()


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """`kill` ends a run as Ctrl-C does."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_result_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Where the result of a run goes, and what is shown of it."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write; nothing may be there")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted run to this output")
    parser.add_argument("--chart", metavar="FILE", help="draw the losses into a .png or .svg file")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")


def show_interrupted(args: argparse.Namespace, title: str, chart: Path | None) -> int:
    """The losses of an interrupted run so far, as `show_result` shows them. Returns the exit code."""
    from ..training.state import losses_so_far

    log = losses_so_far(args.output)
    if log and not args.quiet:
        output.say(loss_picture([entry["loss"] for entry in log]))
    if log and chart is not None:
        # It is in nobody's way when the run goes on: a picture of ours may be replaced.
        draw_losses(chart, title, log, args.overwrite)
    return INTERRUPTED


def show_result(
    args: argparse.Namespace, path: Path, log: Sequence[dict[str, Any]], title: str, chart: Path | None, use: str,
    facts: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """The losses as text, unless --quiet, and as the picture of --chart; what came of the run. Returns the exit code.

    use: the command that uses it. facts: more for --json.
    """
    if not args.quiet:
        output.say(loss_picture([entry["loss"] for entry in log]))
    if chart is not None:
        draw_losses(chart, title, log, args.overwrite)
    if args.json:
        output.report_json({"output": str(path), **(facts or {}), "log": log})
        return 0
    first, last = log[0]["loss"], log[-1]["loss"]
    output.report(f"{path}: loss {first:.3f} -> {last:.3f} in {len(log):,} steps, {duration(log[-1]['seconds'])}")
    validated = [entry["validation"] for entry in log if "validation" in entry]
    if validated:
        output.report(f"validation loss {validated[0]:.3f} -> {validated[-1]:.3f}, the lowest {min(validated):.3f}")
    output.report(f"use it: openelm_mlx {use}")
    return 0


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 3.5 min, 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def loss_picture(losses: Sequence[float], width: int = WIDTH, height: int = HEIGHT) -> str:
    """The losses of all steps as lines of text, each column a mean over its steps."""
    if len(losses) < 2:
        return ""
    width = min(width, len(losses))
    borders = [i * len(losses) // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(borders)]
    top, bottom = max(means), min(0.0, *means)
    heights = [round(8 * height * (mean - bottom) / (top - bottom or 1.0)) for mean in means]
    lines = []
    for row in range(height - 1, -1, -1):
        cells = "".join(_EIGHTHS[max(0, min(8, each - 8 * row))] for each in heights)
        label = f"{top:8.3f} " if row == height - 1 else f"{bottom:8.3f} " if row == 0 else " " * 9
        lines.append(f"{label}│{cells.rstrip()}")
    lines.append(f"{' ' * 9}└{'─' * width} {len(losses):,} steps")
    return "\n".join(lines)


def draw_losses(file: Path, title: str, log: Sequence[dict[str, Any]], overwrite: bool = False) -> None:
    """The losses of a run as a PNG or SVG. Raises DestinationError."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from ..bench.chart import save_chart

    figure, axes = plt.subplots(figsize=(7.5, 4))
    axes.plot([e["step"] for e in log], [e["loss"] for e in log], color="#3b7dd8", linewidth=1.2, label="training")
    validated = [e for e in log if "validation" in e]
    if validated:
        axes.plot(
            [e["step"] for e in validated], [e["validation"] for e in validated], "o--", color="#d8733b", markersize=4,
            linewidth=1, label="validation",
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save_chart(figure, file, overwrite)
