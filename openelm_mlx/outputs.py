"""Output files that a user names: whether they may be written, and writing them atomically.

An existing file is replaced only when this library wrote it (its content tells), or with overwrite. Folders are not made.
Files in the user's cache folder (memory/stored.py) and the folder of a converted model (checkpoint/writer.py) have rules
of their own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from .errors import DestinationError
from .files import expanded, kind_of
from .finder import sync

# Given an open file: whether this library wrote it, and it is of the kind that is to be written.
Recognizer = Callable[[BinaryIO], bool]

# At most this much of a file is read to recognize it: none of our headers is larger.
_MOST_HEADER_BYTES = 64 * 2**20

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP)

# Written into pictures, in the field for the program that made them.
PROGRAM = "openelm_mlx"


def checked_output(
    name: str | Path, what: str, is_ours: Recognizer | None = None, overwrite: bool | None = False
) -> Path:
    """The file of that name, if it may be written now. Nothing is made or changed.

    what: what it will hold, for errors ("The chart"). is_ours: says whether an existing file may be replaced; None: never.
    overwrite: any regular file may be replaced; None: like False, in places without an option for it.

    Raises DestinationError with the next step.
    """
    text = os.fspath(name)
    try:
        path = expanded(text, DestinationError)
        # The file that a link leads to is what is written, and the link stays.
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        parent, found = path.absolute().parent, _found(path)
        if not text.strip() or path.is_dir() or text.endswith(("/", os.sep)):
            raise DestinationError(f"{what} cannot be written to {text!r}: that is a folder; name a file.")
        if not parent.is_dir():
            raise DestinationError(
                f"{what} cannot be written to {text!r}: there is no folder {str(parent)!r}; make it first."
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise DestinationError(
                f"{what} cannot be written to {text!r}: its folder is write-protected; name another one."
            )
        if found is None:
            return path
        if (kind := kind_of(found)) is not None:
            raise DestinationError(f"{what} cannot be written to {text!r}: that is {kind}; name a file.")
        if not os.access(path, os.W_OK):
            raise DestinationError(
                f"{what} cannot be written to {text!r}: the file is write-protected; name another one."
            )
        # An empty file has nothing to lose; whoever made it (mktemp) wants it filled.
        if overwrite or not found.st_size or (is_ours is not None and _is_recognized(path, is_ours)):
            return path
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DestinationError):
            raise
        raise _trouble(what, text, error) from error
    state = "is there and holds something else" if is_ours is not None else "is there already"
    remedy = "name another file" if overwrite is None else "name another file, or replace it with overwrite=True"
    raise DestinationError(f"{what} is not written: {text!r} {state}; {remedy}.")


@contextmanager
def output_file(
    name: str | Path,
    what: str,
    is_ours: Recognizer | None = None,
    overwrite: bool | None = False,
    mode: int = 0o666,
) -> Iterator[BinaryIO]:
    """A stream for the file of that name. It appears, complete, when the block ends; when the block fails nothing changes.

    The arguments are those of `checked_output`. mode: of a new file, less the process's umask; one that is there keeps
    its own. Raises DestinationError.
    """
    path = checked_output(name, what, is_ours, overwrite)
    partial: str | None = None
    try:
        was_there = path.exists()
        beside = str(path.absolute().parent / f".openelm_mlx-{os.urandom(8).hex()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)
        partial = beside
        with os.fdopen(descriptor, "wb") as stream:
            if was_there:
                os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            sync(stream)
        if not was_there and path.exists():
            left, partial = partial, None  # not deleted: hours of work may be in it
            raise DestinationError(
                f"{what} is in {left!r}: while it was written, another file appeared at {os.fspath(name)!r}."
            )
        os.replace(partial, path)
        partial = None
    except OSError as error:
        raise _trouble(what, os.fspath(name), error) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def write_output(
    name: str | Path,
    content: str | bytes,
    what: str,
    is_ours: Recognizer | None = None,
    overwrite: bool | None = False,
    mode: int = 0o666,
) -> Path:
    """Write a whole file at once and return its path; the other arguments are those of `output_file`."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    with output_file(name, what, is_ours, overwrite, mode) as stream:
        stream.write(data)
    return Path(name).expanduser()


@contextmanager
def signals_wait() -> Iterator[Callable[[], None]]:
    """Delay signal handlers written in Python, such as Ctrl-C's, until the block ends or calls `check`."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # signals are the main thread's
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    came: list[tuple[int, FrameType | None]] = []

    def check() -> None:
        while came:
            number, frame = came.pop(0)
            handler = handlers[signal.Signals(number)]
            assert callable(handler)
            handler(number, frame)

    try:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, lambda number, frame: came.append((number, frame)))
        yield check
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        check()


# --- what we wrote ----------------------------------------------------------------------------------------------------


def json_with(key: str, value: Any = None) -> Recognizer:
    """Recognizes a JSON object that has `key` (and this value of it, where one is given)."""

    def is_ours(file: BinaryIO) -> bool:
        content = json.loads(file.read(_MOST_HEADER_BYTES))
        return isinstance(content, dict) and key in content and value in (None, content[key])

    return is_ours


def safetensors_of(format_name: str) -> Recognizer:
    """Recognizes a safetensors file by the format in its metadata."""

    def is_ours(file: BinaryIO) -> bool:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MOST_HEADER_BYTES:
            return False
        header = json.loads(file.read(length))
        return bool(header["__metadata__"]["format"] == format_name)

    return is_ours


def picture_of_ours(file: BinaryIO) -> bool:
    """Recognizes a PNG or SVG that names this program as its creator."""
    begin, name = file.read(16384), PROGRAM.encode()
    is_png = begin.startswith(b"\x89PNG\r\n\x1a\n") and b"Software\0" + name in begin
    return is_png or (b"<svg" in begin and b"<dc:title>" + name + b"</dc:title>" in begin)


def _is_recognized(path: Path, is_ours: Recognizer) -> bool:
    try:
        with path.open("rb") as file:
            return is_ours(file)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _found(path: Path) -> os.stat_result | None:
    """The status of what is at `path`; None where nothing is. Raises OSError or ValueError for an impossible path."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _trouble(what: str, name: str, error: Exception) -> DestinationError:
    if isinstance(error, OSError):
        reasons = {
            errno.ENOSPC: "the disk is full", errno.EDQUOT: "your share of the disk is full",
            errno.EROFS: "the disk is read-only", errno.EFBIG: "the file is too large for this disk",
        }  # fmt: skip
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
    else:
        reason = str(error)
    return DestinationError(f"{what} cannot be written to {name!r}: {reason}.")
