"""Everything that a command shows goes through here: answers and reports on stdout, words about them on stderr.

What is shown in a terminal is made harmless on the way (text/terminal.py). An answer that goes into a pipe or a file is the
answer as the model gave it, since it is data there; only half characters, which no encoding can write, are replaced. JSON is
the same everywhere: control characters are escaped in it.
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
    """A piece of the model's answer, on stdout, at once."""
    sys.stdout.write(_answer.add(text) if sys.stdout.isatty() else whole_characters(text))
    sys.stdout.flush()


def end_answer() -> None:
    """The line break after an answer."""
    sys.stdout.write(_answer.finish() + "\n")
    sys.stdout.flush()


def dimmed(text: str) -> None:
    """A piece of text that is not the answer, on stderr, at once; grey where that is a terminal with colours."""
    piece = _dimmed.add(text)
    sys.stderr.write(f"\033[2m{piece}\033[0m" if piece and has_colours(sys.stderr) else piece)
    sys.stderr.flush()


def end_dimmed() -> None:
    """The line break after dimmed text."""
    sys.stderr.write(_dimmed.finish() + "\n")
    sys.stderr.flush()


def say(text: str = "") -> None:
    """Lines for the person, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def ask(text: str) -> None:
    """What stands before a line that the person types, on stderr, without a line break."""
    print(visible(text), end="", file=sys.stderr, flush=True)


def report(text: str = "") -> None:
    """Lines of a report that was asked for, on stdout."""
    print(visible(text), flush=True)


def report_json(value: Any) -> None:
    """One JSON object, on stdout, in a line."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(to_json(value, ascii_only=not encoding.startswith("utf")), flush=True)


def error(prog: str, sentence: str) -> None:
    """What went wrong, in one line on stderr, with options as they are typed."""
    print(f"{prog}: {visible_line(typed(sentence))}", file=sys.stderr, flush=True)


def speak_for(command: argparse.ArgumentParser) -> None:
    """From now on advice names the options of this command."""
    global _flags
    _flags = flags_of(command)


def also_named(flags: Flags) -> None:
    """What the running command has another name for than an option: a line of a chat's, such as `/save!`."""
    global _flags
    _flags = {**_flags, **flags}


def typed(sentence: str) -> str:
    """A sentence of the library's with the names of options as the running command has them: `--dense-bits 8`."""
    return in_flags(sentence, _flags)


# --- the streams themselves -------------------------------------------------------------------------------------------


def open_streams() -> bool:
    """Give closed standard input and error (`<&-`, `2>&-`) an end that is nowhere; whether there is an output."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  (for as long as the process is there)
    if sys.stdout is None:
        # Its number is free: the next file that is opened must not get what others print.
        sys.__stdout__ = open(os.devnull, "w")  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal's encoding does not have is no error
            stream.reconfigure(errors="replace")
    return sys.stdout is not None


def flush() -> None:
    """Write what is still in stdout's buffer. Raises OSError."""
    sys.stdout.flush()


def discard() -> None:
    """Send what is left in the buffers nowhere: Python would try to write it again at exit."""
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

    done: what an interrupted run left is there from the start, and no part of the rate.
    """
    from tqdm import tqdm

    return tqdm(
        desc=visible_line(label), total=total, initial=done, unit=unit, unit_scale=unit == "B", leave=leave,
        file=sys.stderr,
    )  # fmt: skip


def terminal() -> TextIO:
    """The stream on which a prompt is edited: stdout has the answers and nothing else, wherever it goes."""
    return sys.stderr


def has_colours(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a stream is a terminal that may be sent colours: not with NO_COLOR, and not where TERM is dumb."""
    environment = os.environ if environment is None else environment
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def can_redraw(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a line of a stream can be drawn again, as a progress bar is."""
    environment = os.environ if environment is None else environment
    return stream.isatty() and environment.get("TERM") != "dumb"
