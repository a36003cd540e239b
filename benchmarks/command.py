"""How a benchmark runs as a command: streams, errors and exit codes as the commands of openelm_mlx have them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from openelm_mlx.commands import Parser, run_program


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
