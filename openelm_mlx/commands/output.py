"""All output of commands: answers and reports on stdout, everything else on stderr.

Text for a terminal is made safe (text/terminal.py). An answer into a pipe or a file is data and stays as the model gave it;
only lone surrogates, which no encoding can write, are replaced. JSON is the same everywhere, with control characters
escaped.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from ..text.terminal import TerminalStream, to_json, visible, visible_line
from ..text.unicode import whole_characters
from .spelling import Flags, flags_of, in_flags

if TYPE_CHECKING:
    from tqdm import tqdm

_flags: Flags = {}
_answer, _dimmed = TerminalStream(), TerminalStream()


def answer(text: str) -> None:
    """Print a piece of the model's answer on stdout, at once."""
    sys.stdout.write(_answer.add(text) if sys.stdout.isatty() else whole_characters(text))
    sys.stdout.flush()


def end_answer() -> None:
    """The line break after an answer."""
    sys.stdout.write(_answer.finish() + "\n")
    sys.stdout.flush()


def dimmed(text: str) -> None:
    """Print text that is not the answer on stderr, at once; grey if that is a terminal with colours."""
    piece = _dimmed.add(text)
    sys.stderr.write(f"\033[2m{piece}\033[0m" if piece and has_colours(sys.stderr) else piece)
    sys.stderr.flush()


def end_dimmed() -> None:
    """The line break after dimmed text."""
    sys.stderr.write(_dimmed.finish() + "\n")
    sys.stderr.flush()


def say(text: str = "") -> None:
    """Print lines for the user on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def ask(text: str) -> None:
    """Print a prompt for input on stderr, without a line break."""
    print(visible(text), end="", file=sys.stderr, flush=True)


def report(text: str = "") -> None:
    """Print lines of a report on stdout."""
    print(visible(text), flush=True)


def report_json(value: Any) -> None:
    """Print one JSON object on stdout, in one line."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(to_json(value, ascii_only=not encoding.startswith("utf")), flush=True)


def error(prog: str, sentence: str) -> None:
    """Print an error in one line on stderr, with options as they are typed."""
    print(f"{prog}: {visible_line(typed(sentence))}", file=sys.stderr, flush=True)


def speak_for(command: argparse.ArgumentParser) -> None:
    """From now on errors name the options of this command."""
    global _flags
    _flags = flags_of(command)


def also_named(flags: Flags) -> None:
    """Other names that errors use for the running command's options, such as a chat's `/save!`."""
    global _flags
    _flags = {**_flags, **flags}


_heard: int | None = None  # where standard error went before `set_libraries_apart`


def set_libraries_apart(silent: bool) -> int:
    """What compiled libraries write on standard error goes into a pipe; gives the end to read from.

    silent: show nothing of this process's own either: another machine speaks for it.
    """
    global _heard
    sys.stdout.flush()
    sys.stderr.flush()
    _heard = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    if silent:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    else:
        sys.stderr = open(os.dup(_heard), "w", buffering=1, errors="replace")  # noqa: SIM115  (to the end)
    return read_end


def pass_on(line: bytes) -> None:
    """Show a line that a library wrote."""
    if _heard is not None:
        os.write(_heard, line)


def speak_again() -> None:
    """After being silent: there is something to say that nobody else knows."""
    if _heard is not None:
        sys.stderr.flush()
        os.dup2(_heard, 2)


def typed(sentence: str) -> str:
    """A message of the library with options as they are typed in the running command: `--dense-bits 8`."""
    return in_flags(sentence, _flags)


# --- the streams themselves -------------------------------------------------------------------------------------------


def open_streams() -> bool:
    """Open /dev/null for a closed standard input or error (`<&-`, `2>&-`); return whether there is an output."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  (for as long as the process is there)
    if sys.stdout is None:
        # The descriptor is free: the next opened file must not get it, and with it what others print.
        sys.__stdout__ = open(os.devnull, "w")  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # so that a character missing from a terminal's encoding is not an error
            stream.reconfigure(errors="replace")
    return sys.stdout is not None


def flush() -> None:
    """Write out stdout's buffer. Raises OSError."""
    sys.stdout.flush()


def discard() -> None:
    """Discard what is left in the buffers: Python would try to write it again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def can_draw_bars() -> bool:
    """Whether stderr is a terminal that can draw a line again."""
    return can_redraw(sys.stderr)


def bar(label: str, total: int, unit: str, done: int = 0, leave: bool = True) -> tqdm[Any]:
    """A progress bar on stderr.

    done: already done by an interrupted run; it is shown from the start and not counted in the rate.
    """
    from tqdm import tqdm

    return tqdm(
        desc=visible_line(label), total=total, initial=done, unit=unit, unit_scale=unit == "B", leave=leave,
        file=sys.stderr,
    )  # fmt: skip


def terminal() -> TextIO:
    """The stream on which a prompt is edited: not stdout, which is only for answers."""
    return sys.stderr


def has_colours(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a stream is a terminal with colours: not with NO_COLOR, and not if TERM is dumb."""
    environment = os.environ if environment is None else environment
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def can_redraw(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a line of a stream can be drawn again, as a progress bar is."""
    environment = os.environ if environment is None else environment
    return stream.isatty() and environment.get("TERM") != "dumb"
