"""How a benchmark runs as a command: streams, errors and exit codes as the commands of openelm_mlx have them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from openelm_mlx.commands import Parser, run_program
from openelm_mlx.commands.output import report, report_json
from openelm_mlx.errors import SettingError


def run_benchmark(
    name: str,
    summary: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the benchmark `benchmarks/NAME.py` with these arguments (default: the process's) and return its exit code.

    summary: for its help. run: from the parsed arguments to the exit code; a UserError of its is one sentence and 2.
    """
    prog = f"python -m benchmarks.{name}"

    def parser() -> Parser:
        made = Parser(prog=prog, description=summary)
        add_arguments(made)
        made.set_defaults(run=run, command=made)
        return made

    return run_program(prog, list(sys.argv[1:] if argv is None else argv), parser)


class Row(Protocol):
    """What was measured once."""

    def line(self) -> str:
        """A line for people."""

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""


def show_rows(heading: str, rows: Iterable[Row], as_json: bool) -> int:
    """Print each row as soon as it is known, under the machine and a heading, or all as one JSON object. Returns 0."""
    from openelm_mlx.bench.benchmark import machine_description

    found = []
    if not as_json:
        report(f"{machine_description()}\n{heading}")
    for row in rows:
        found.append(row)
        if not as_json:
            report(row.line())
    if as_json:
        report_json({"machine": machine_description(), "rows": [row.as_dict() for row in found]})
    return 0


def existing_folder(text: str | None) -> Path | None:
    """The folder that --folder names, None where it names none. Raises SettingError unless it exists."""
    folder = None if text is None else Path(text)
    if folder is not None and not folder.is_dir():
        raise SettingError(f"--folder is {text!r}, which is not a folder: name one that exists.")
    return folder
