"""apply_patch: changes to text files in the `*** Begin Patch` format, inside one folder, all of them or none.

First everything is read and worked out in memory; only a patch that fits as a whole touches the disk, and if writing
fails half-way, what was written is put back. Errors are sentences for the model, which can then mend its patch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, final

from ..errors import ToolError
from .tool import arguments_of

_LARGEST_FILE = 4 << 20

_BEGIN, _END = "*** Begin Patch", "*** End Patch"
_ADD, _DELETE, _UPDATE, _MOVE = "*** Add File: ", "*** Delete File: ", "*** Update File: ", "*** Move to: "
_END_OF_FILE = "*** End of File"


@dataclass
class Hunk:
    """One place of a file that changes: `old` lines become `new`. anchors: lines that stand somewhere before, in order."""

    anchors: list[str] = field(default_factory=list)
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    is_at_end: bool = False


@dataclass
class FileChange:
    """What a patch does to one file: "add" (content), "delete", or "update" (hunks, and move_to for a new name)."""

    action: str
    path: str
    content: str = ""
    hunks: list[Hunk] = field(default_factory=list)
    move_to: str | None = None


@final
class PatchTool:
    """A tool that applies patches to the text files of `folder`. Raises ToolError if there is no such folder.

    Called with `{"patch": text}`, it returns what it changed; a patch that cannot be applied is a ToolError that says
    why, and has changed nothing.
    """

    name = "apply_patch"
    namespace: str | None = "functions"
    description = (
        "Changes text files. The patch begins with the line `*** Begin Patch` and ends with `*** End Patch`. Between them, "
        "for each file, a line `*** Add File: PATH` and its lines, each after a `+`; or `*** Delete File: PATH`; or "
        "`*** Update File: PATH`, maybe `*** Move to: PATH`, and for each place that changes a line `@@`, then about three "
        "lines of context before and after, each after a space, lines to remove after a `-`, lines to insert after a `+`. "
        "`@@ def f():` says after which line the place is to be looked for. Paths are relative. Either all is changed or "
        "nothing."
    )

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise ToolError(f"{folder} is no folder, so there is nothing to patch in it: name one that exists.")

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON Schema of the arguments."""
        patch = {"type": "string", "description": "The patch."}
        return {"type": "object", "properties": {"patch": patch}, "required": ["patch"], "additionalProperties": False}

    def __call__(self, arguments: Any) -> str:
        """Apply the patch in `arguments`, a dictionary or JSON; returns a line for each changed file."""
        return "\n".join(apply_patch(_patch_text(arguments), self.folder))


def _patch_text(arguments: Any) -> str:
    if isinstance(arguments, str) and arguments.lstrip().startswith(_BEGIN):
        return arguments  # the bare patch, which models send too
    patch = arguments_of(arguments, PatchTool.name).get("patch")
    if not isinstance(patch, str):
        raise ToolError(f"The patch is a {type(patch).__name__}, not text.")
    return patch


def apply_patch(patch: str, folder: Path) -> list[str]:
    """Apply a patch to the files of `folder`, all of it or nothing. Returns "A path", "M path", "D path", "R old -> new"."""
    changes = parse_patch(patch)
    workspace = _Workspace(folder)
    report = []
    for change in changes:
        if change.action == "add":
            workspace.add(change.path, change.content)
            report.append(f"A {change.path}")
        elif change.action == "delete":
            workspace.delete(change.path)
            report.append(f"D {change.path}")
        else:
            text = patched(workspace.read(change.path), change.hunks, change.path)
            workspace.replace(change.path, text)
            if change.move_to is not None:
                workspace.move(change.path, change.move_to)
            report.append(f"R {change.path} -> {change.move_to}" if change.move_to else f"M {change.path}")
    workspace.commit()
    return report


# --- Reading a patch --------------------------------------------------------------------------------------------------


def parse_patch(patch: str) -> list[FileChange]:
    """The changes that a patch asks for. Raises ToolError with the number of the line that cannot be read."""
    lines = patch.strip("\n").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    if lines[0].strip() != _BEGIN:
        raise ToolError(f"The patch begins with {lines[0][:60]!r} and not with the line {_BEGIN!r}.")
    if lines[-1].strip() != _END or len(lines) == 1:
        raise ToolError(f"The patch does not end with the line {_END!r}.")
    return _PatchReader(lines[:-1]).read()


class _PatchReader:
    """Reads the lines of a patch one after the other."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines, self._at = lines, 1

    def read(self) -> list[FileChange]:
        changes = []
        while self._at < len(self._lines):
            line = self._next()
            if line.startswith(_ADD):
                changes.append(FileChange("add", _path(line, _ADD), content=self._content()))
            elif line.startswith(_DELETE):
                changes.append(FileChange("delete", _path(line, _DELETE)))
            elif line.startswith(_UPDATE):
                changes.append(self._update(_path(line, _UPDATE)))
            elif line.strip():
                raise self._error(line, "should begin a file: *** Add File, *** Update File or *** Delete File")
        if not changes:
            raise ToolError("The patch changes no file.")
        return changes

    def _next(self) -> str:
        self._at += 1
        return self._lines[self._at - 1]

    def _more(self) -> bool:
        """Whether lines of the same file follow."""
        if self._at >= len(self._lines):
            return False
        line = self._lines[self._at]
        return not line.startswith("*** ") or line.startswith(_END_OF_FILE)

    def _content(self) -> str:
        lines = []
        while self._more():
            line = self._next()
            if not line.startswith("+"):
                raise self._error(line, "of a new file should begin with '+'")
            lines.append(line[1:])
        return "".join(f"{line}\n" for line in lines)

    def _update(self, path: str) -> FileChange:
        change = FileChange("update", path)
        if self._at < len(self._lines) and self._lines[self._at].startswith(_MOVE):
            change.move_to = _path(self._next(), _MOVE)
        while self._more():
            change.hunks.append(self._hunk())
        if not change.hunks and change.move_to is None:
            raise ToolError(f"The patch updates {path} and says nothing of what changes in it.")
        return change

    def _hunk(self) -> Hunk:
        hunk = Hunk()
        while self._more() and self._lines[self._at].startswith("@@"):
            anchor = self._next()[2:].removeprefix(" ")
            if anchor.strip() and not anchor.endswith("@@"):  # "-1,2 +1,2 @@" is diff's line numbers, which say nothing
                hunk.anchors.append(anchor)
        while self._more() and not self._lines[self._at].startswith("@@"):
            line = self._next()
            if line.startswith(_END_OF_FILE):
                hunk.is_at_end = True
                break
            mark, text = (line[0], line[1:]) if line else (" ", "")
            if mark not in " +-":
                raise self._error(line, "should begin with ' ', '+' or '-'")
            if mark in " -":
                hunk.old.append(text)
            if mark in " +":
                hunk.new.append(text)
        if not hunk.old and not hunk.new:
            raise ToolError(f"A place of the patch, before line {self._at + 1}, has no lines.")
        return hunk

    def _error(self, line: str, what: str) -> ToolError:
        return ToolError(f"Line {self._at} of the patch, {line[:60]!r}, {what}.")


def _path(line: str, word: str) -> str:
    return line[len(word) :].strip()


# --- Changing a text --------------------------------------------------------------------------------------------------


def patched(text: str, hunks: Sequence[Hunk], path: str) -> str:
    """The text with its hunks applied one after the other, line ends as they were. Raises ToolError where one does not fit."""
    line_end = "\r\n" if text.count("\r\n") > text.count("\n") / 2 else "\n"
    lines = text.replace("\r\n", "\n").split("\n")
    ends_with_newline = lines[-1] == ""
    if ends_with_newline:
        lines.pop()
    done: list[str] = []
    for number, hunk in enumerate(hunks, 1):
        start = _start_of(lines, hunk, path, number)
        done += lines[:start] + _kept_context(lines[start:], hunk)
        lines = lines[start + len(hunk.old) :]
    result = line_end.join(done + lines)
    return result + line_end if ends_with_newline or not text else result


def _kept_context(lines: Sequence[str], hunk: Hunk) -> list[str]:
    """The hunk's new lines; a context line as the file has it, where the patch has other spaces at its ends."""
    originals = dict(zip(hunk.old, lines, strict=False))
    return [originals.get(line, line) if line in hunk.old else line for line in hunk.new]


def _start_of(lines: Sequence[str], hunk: Hunk, path: str, number: int) -> int:
    """Where the hunk's old lines begin. Spaces at the ends of lines count only where that helps."""
    start = 0
    for anchor in hunk.anchors:
        found = next(_places(lines, [anchor], start), None)
        if found is None:
            raise ToolError(
                f"{path} has no line {anchor.strip()!r} after which place {number} of its changes could be."
            )
        start = found + 1
    if not hunk.old:
        return len(lines) if hunk.is_at_end or not hunk.anchors else start
    places = list(_places(lines, hunk.old, start))
    if hunk.is_at_end:
        places = [place for place in places if place + len(hunk.old) == len(lines)]
    if not places:
        shown = "\n".join(hunk.old[:3])
        where = " at its end" if hunk.is_at_end else ""
        raise ToolError(
            f"{path} does not have these lines{where}, which place {number} of its changes is about:\n{shown}\n"
            "Read the file again, and copy the lines as they are."
        )
    return places[0]


def _places(lines: Sequence[str], wanted: Sequence[str], start: int) -> Iterator[int]:
    """Where `wanted` stands: exactly, or if nowhere so, but for spaces at line ends, or at both sides of lines."""
    for clean in (str, str.rstrip, str.strip):
        cleaned, target = [clean(line) for line in lines], [clean(line) for line in wanted]
        found = [i for i in range(start, len(lines) - len(wanted) + 1) if cleaned[i : i + len(wanted)] == target]
        if found:
            yield from found
            return


# --- Files ------------------------------------------------------------------------------------------------------------


class _Workspace:
    """The files of a folder as they will be; `commit` makes it so on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[str, bytes | None] = {}
        self._after: dict[str, bytes | None] = {}  # None: no such file

    def read(self, path: str) -> str:
        data = self._load(path)
        if data is None:
            raise ToolError(f"There is no file {path}; to make one, use *** Add File.")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not UTF-8 text, so no patch can change it.") from None

    def add(self, path: str, content: str) -> None:
        if self._load(path) is not None:
            raise ToolError(f"There is a file {path} already; to change it, use *** Update File.")
        self._after[self._key(path)] = content.encode("utf-8", "replace")

    def replace(self, path: str, text: str) -> None:
        self._after[self._key(path)] = text.encode("utf-8", "replace")

    def delete(self, path: str) -> None:
        if self._load(path) is None:
            raise ToolError(f"There is no file {path} to delete.")
        self._after[self._key(path)] = None

    def move(self, path: str, target: str) -> None:
        data = self._after[self._key(path)]
        if self._load(target) is not None:
            raise ToolError(f"{path} cannot be moved to {target}: there is such a file already.")
        self._after[self._key(path)], self._after[self._key(target)] = None, data

    def commit(self) -> None:
        """Write what changed. If that fails, put everything back and raise ToolError."""
        done: list[str] = []
        made: list[Path] = []
        try:
            for key, data in self._after.items():
                if data != self._before[key]:
                    done.append(key)
                    self._write(key, data, made)
        except OSError as error:
            for key in reversed(done):
                with contextlib.suppress(OSError):
                    self._write(key, self._before[key], [])
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise ToolError(f"The patch was not applied: {error.strerror} ({error.filename}).") from error

    def _key(self, path: str) -> str:
        """The path in one spelling. Raises ToolError for one that leads, or could lead, out of the folder."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith(("/", "~")) or ".." in parts or "\\" in path or "\0" in path or ":" in parts[0]:
            raise ToolError(f"{path!r} is no path inside the folder: give a relative one, without '..'.")
        place = self._folder
        for part in parts:
            place = place / part
            if place.is_symlink():
                raise ToolError(f"{path} leads over a symbolic link, {part}, and links are not followed.")
        return str(PurePosixPath(*parts))

    def _load(self, path: str) -> bytes | None:
        key = self._key(path)
        if key not in self._after:
            self._before[key] = self._after[key] = _content(self._folder / key, path)
        return self._after[key]

    def _write(self, key: str, data: bytes | None, made: list[Path]) -> None:
        target = self._folder / key
        if data is None:
            target.unlink(missing_ok=True)
            return
        missing = [parent for parent in target.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            made.append(parent)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".patch-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(name, _mode_of(target))
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _content(file: Path, path: str) -> bytes | None:
    try:
        if not file.exists():
            return None
        if not file.is_file():
            raise ToolError(f"{path} is no file.")
        if file.stat().st_size > _LARGEST_FILE:
            raise ToolError(f"{path} has more than {_LARGEST_FILE / 1e6:.0f} MB, too much for a patch.")
        return file.read_bytes()
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror}.") from error


def _mode_of(file: Path) -> int:
    """The permissions that a file has, or that a new one gets."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
