"""Reading files that others wrote: only regular files of bounded size, and every problem is one of our own errors.

A path may name a pipe, a socket, a device, a folder or a dangling link; a file may be huge, not text, or nested so deep
that a parser gives up. All readers use these functions and say which error class their users expect. They check the
meaning of the content themselves.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from .errors import UserError
from .finder import DISK_IS_GONE, is_macos_own

ErrorClass = type[UserError]
_P = ParamSpec("_P")
_T = TypeVar("_T")

# Configs, indexes and tokenizer settings of the largest releases have about 100 kB.
LARGEST_JSON = 8 * 2**20
# CoreNet's have 5 kB, and a YAML parser in Python takes a second for 100 kB.
LARGEST_YAML = 2**18
# A config has fewer values than this. With aliases a few lines of YAML can expand to billions.
MOST_VALUES = 1_000_000
# Files that are copied with a model: licences, model cards, tokenizers.
LARGEST_COPY = 2**29

_LFS_POINTER = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Where a shell puts the output of <(command), or standard input by its name.
_HANDED_OVER = re.compile(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxtuple = _short.maxdict = 6
_short.maxlevel, _short.maxlong = 3, 40


def shown(value: Any) -> str:
    """`value` as an error message quotes it: always short, with escapes for unprintable characters."""
    try:
        return _short.repr(value)
    except ValueError:  # Python does not write out numbers of thousands of digits
        return "a number of thousands of digits"


def one_line(problem: BaseException | str) -> str:
    """Another program's message as ours quotes it: one short line without control characters."""
    text = " ".join(str(problem).split())[:200] or type(problem).__name__
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def reason_of(problem: BaseException) -> str:
    """What the system says of a problem, in a few words; else the problem itself, as `one_line` quotes it."""
    return getattr(problem, "strerror", None) or one_line(problem)


def expanded(path: str | os.PathLike[str], error: ErrorClass) -> Path:
    """The path with "~" expanded. Raises `error` for the home folder of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise error(
            f"{_name(path)} cannot be used, because there is no home folder for {user}: check the path."
        ) from None


def open_regular(path: str | os.PathLike[str], error: ErrorClass, *, may_be_pipe: bool = False) -> BinaryIO:
    """The file at `path`, open for reading. Raises `error` when there is none, or it is not a regular file.

    Never blocks: reading a pipe that nobody writes to would wait for ever. may_be_pipe: the user named the input, and a shell
    may have put a running command's output in its place.
    """
    name = os.fspath(path)
    if may_be_pipe and _HANDED_OVER.fullmatch(name):
        return _opened(name, 0, error)
    stream = _opened(name, getattr(os, "O_NONBLOCK", 0), error)
    kind = kind_of(os.fstat(stream.fileno()))
    if kind is not None:  # it was put there since `_opened` looked
        stream.close()
        raise _not_a_file(name, kind, error)
    return stream


def read_bytes(
    path: str | os.PathLike[str], error: ErrorClass, most: int = LARGEST_JSON, *, may_be_pipe: bool = False
) -> bytes:
    """All bytes of a file, at most `most`. Raises `error`, also for a Git LFS pointer."""
    try:
        with open_regular(path, error, may_be_pipe=may_be_pipe) as stream:
            data = stream.read(most + 1)
            size = os.fstat(stream.fileno()).st_size
    except OSError as problem:
        raise unreadable(path, problem, error) from problem
    if len(data) > most:
        raise error(
            f"{_name(path)} has {max(size, len(data)):,} bytes and at most {most:,} are read there: it is not what its "
            "name says, or damaged; copy it again or remove it."
        )
    refuse_pointer(path, data, error)
    return data


def read_text(
    path: str | os.PathLike[str], error: ErrorClass, most: int = LARGEST_JSON, *, may_be_pipe: bool = False
) -> str:
    """The UTF-8 text of a file. Raises `error`."""
    data = read_bytes(path, error, most, may_be_pipe=may_be_pipe)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{_name(path)} is not UTF-8 text (byte {problem.start} is 0x{data[problem.start]:02x}): convert it, for example "
            "with iconv, or copy it again."
        ) from None


def read_json(path: str | os.PathLike[str], error: ErrorClass, most: int = LARGEST_JSON) -> Any:
    """The value of a JSON file. Raises `error`."""
    return parse_json(read_bytes(path, error, most), _name(path), error)


def read_object(path: str | os.PathLike[str], error: ErrorClass, most: int = LARGEST_JSON) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error`, also for other values."""
    value = read_json(path, error, most)
    if not isinstance(value, dict):
        raise error(f"{_name(path)} holds a {type(value).__name__}, not an object with named fields: copy it again.")
    return value


def parse_json(text: str | bytes, origin: str, error: ErrorClass, advice: str = "download or copy it again") -> Any:
    """The value of a JSON text. Raises `error` when it is not valid JSON or nested too deep. advice: the next step."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{origin} is nested too deep: {advice}.") from None
    except ValueError as problem:  # not JSON, not UTF-8, or a number with thousands of digits
        raise error(f"{origin} is not JSON ({one_line(problem)}): {advice}.") from None


def read_yaml(path: str | os.PathLike[str], error: ErrorClass, most: int = LARGEST_YAML) -> Any:
    """The value of a YAML file, in JSON's types: aliases are followed, dates are text. Raises `error`."""
    import yaml

    data = read_bytes(path, error, most)
    try:
        return _plain(yaml.safe_load(data), [MOST_VALUES])
    except RecursionError:
        raise error(f"{_name(path)} is nested too deep to be a config: download or copy it again.") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as problem:  # its dates raise any
        raise error(f"{_name(path)} is not valid YAML ({one_line(problem)}): download or copy it again.") from None


def files_in(folder: Path, pattern: str, error: ErrorClass) -> list[Path]:
    """The files of a folder whose names match, sorted, without hidden ones and folders. Raises `error`.

    What is neither file nor folder stays in the list, so that reading it raises the error.
    """
    try:
        found = sorted(path for path in folder.glob(pattern) if not is_ignored(path.name))
        return [path for path in found if not path.is_dir()]
    except OSError as problem:
        raise unreadable(folder, problem, error) from problem


def is_ignored(name: str) -> bool:
    """Whether listings of a folder skip this file: hidden ones belong to other programs."""
    return name.startswith(".") or is_macos_own(name)


def kind_of(status: os.stat_result) -> str | None:
    """What it is, in words, if it is not a regular file; None for a file."""
    if stat.S_ISREG(status.st_mode):
        return None
    return next((words for is_kind, words in _KINDS if is_kind(status.st_mode)), "something else")


def refuse_pointer(path: str | os.PathLike[str], data: bytes, error: ErrorClass) -> None:
    """Raise `error` when these first bytes of a file are a Git LFS pointer."""
    if data.startswith(_LFS_POINTER):
        raise error(f"{_name(path)} is only a pointer to a file in Git LFS: run `git lfs pull` in its repository.")


def _opened(name: str, flags: int, error: ErrorClass) -> BinaryIO:
    try:
        if not flags & getattr(os, "O_NONBLOCK", 0):
            return open(name, "rb")
        kind = kind_of(os.stat(name))  # first, because opening a device can have effects
        if kind is not None:
            raise _not_a_file(name, kind, error)
        descriptor = os.open(name, os.O_RDONLY | flags | getattr(os, "O_CLOEXEC", 0))
        try:
            return os.fdopen(descriptor, "rb")
        except IsADirectoryError:
            os.close(descriptor)
            raise
    except OSError as problem:
        raise unreadable(name, problem, error) from problem
    except UserError:
        raise
    except ValueError as problem:  # a null byte, or half a character
        raise error(f"{shown(name)} is not a valid file name ({one_line(problem)}): check the path.") from None


def _not_a_file(name: str, kind: str, error: ErrorClass) -> UserError:
    return error(f"{_name(name)} is {kind}, and a file is needed there: check the path, or put the file in its place.")


def unreadable(path: str | os.PathLike[str], problem: OSError, error: ErrorClass) -> UserError:
    """The error for a file that cannot be read: it is missing, forbidden, or its disk was disconnected."""
    if isinstance(problem, FileNotFoundError) and os.path.islink(path):
        return error(
            f"{_name(path)} is a link to a file that is not there: copy the file itself, or download it again."
        )
    reason = reason_of(problem)
    if problem.errno in DISK_IS_GONE:
        return error(f"{_name(path)} cannot be read any more ({reason}): connect its disk again, and try again.")
    return error(f"{_name(path)} cannot be read ({reason}): check that it is there and that you may read it.")


def hears_the_disk(error: ErrorClass) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A decorator: an OSError is raised as `error`, with the path in the function's first argument.

    A disk can be disconnected at any call. Errors that a function handles itself never get here.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def call(*args: _P.args, **keywords: _P.kwargs) -> _T:
            try:
                return function(*args, **keywords)
            except OSError as problem:
                named = isinstance(problem.filename, (str, bytes))
                if not named and problem.errno not in DISK_IS_GONE:
                    raise
                source = next(iter((*args, *keywords.values())), "a file")
                raise unreadable(os.fsdecode(problem.filename) if named else str(source), problem, error) from problem

        return call

    return decorate


def _plain(value: Any, budget: list[int]) -> Any:
    """A value of JSON's types; ValueError once there are more values than the budget has."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    if isinstance(value, Mapping):
        return {str(key): _plain(each, budget) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each, budget) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _name(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    return name if name.isprintable() and len(name) <= 1000 else shown(name)
