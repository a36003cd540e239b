"""apply_patch: changes to text files in the `*** Begin Patch` format, inside one folder, all of them or none.

First everything is read and computed in memory; only a patch that fits as a whole touches the disk (swap.py). What a patch
does not change keeps its bytes, line ends and spaces included. Errors are sentences for the model, which can then correct
its patch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, final

from ..arguments import PATH, TEXT, checked_call
from ..errors import ToolError
from ..text.unicode import whole_characters
from .document import Document, Hunk
from .paths import Names, existing_folder
from .swap import Change, Seen, read_file, swap
from .tool import arguments_of

_LARGEST_FILE = 4 << 20

_BEGIN, _END = "*** Begin Patch", "*** End Patch"
_ADD, _DELETE, _UPDATE, _MOVE = "*** Add File: ", "*** Delete File: ", "*** Update File: ", "*** Move to: "
_END_OF_FILE = "*** End of File"


@dataclass
class FileChange:
    """A patch's change of one file: "add" (content), "delete", or "update" (hunks, and move_to for a new name)."""

    action: str
    path: str
    content: str = ""
    hunks: list[Hunk] = field(default_factory=list)
    move_to: str | None = None


@final
@checked_call("PatchTool", ToolError, folder=PATH)
class PatchTool:
    """A tool that applies patches to the text files of `folder`. Raises ToolError if there is no such folder.

    Called with `{"patch": text}`, it returns what it changed; a patch that cannot be applied is a ToolError that says
    why, and has changed nothing. Threads may share the tool: patches are applied one after the other.
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
        self.folder = existing_folder(folder, "is nothing to patch")
        self._turn = threading.Lock()

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON Schema of the arguments."""
        patch = {"type": "string", "description": "The patch."}
        return {"type": "object", "properties": {"patch": patch}, "required": ["patch"], "additionalProperties": False}

    def __call__(self, arguments: Any) -> str:
        """Apply the patch in `arguments`, a dictionary or JSON; returns a line for each changed file."""
        patch = _patch_text(arguments)
        with self._turn:
            return "\n".join(apply_patch(patch, self.folder))


def _patch_text(arguments: Any) -> str:
    if isinstance(arguments, str) and arguments.lstrip().startswith(_BEGIN):
        return arguments  # a patch without JSON around it, which models send too
    patch = arguments_of(arguments, PatchTool.name).get("patch")
    if not isinstance(patch, str):
        raise ToolError(f"The patch is a {type(patch).__name__}, not text.")
    return patch


@checked_call("apply_patch", ToolError, patch=TEXT, folder=PATH)
def apply_patch(patch: str, folder: str | Path) -> list[str]:
    """Apply a patch to the files of `folder`, all of it or nothing.

    Returns what is different now: "A path" (new), "M path", "D path", "R old -> new", or "unchanged: path, ..." when
    nothing is. Raises ToolError when the patch cannot be read, does not fit, or cannot be written.
    """
    workspace = _Workspace(existing_folder(folder, "is nothing to patch"))
    for change in parse_patch(patch):
        if change.action == "add":
            workspace.add(change.path, change.content)
        elif change.action == "delete":
            workspace.delete(change.path)
        else:
            workspace.document(change.path).apply(change.hunks, change.path)
            if change.move_to is not None:
                workspace.move(change.path, change.move_to)
    return workspace.commit()


# --- Reading a patch --------------------------------------------------------------------------------------------------


def parse_patch(patch: str) -> list[FileChange]:
    """The changes that a patch asks for. Raises ToolError with the number of the line that cannot be read."""
    if whole_characters(patch) != patch:
        wrong = next(c for c in patch if whole_characters(c) != c)
        raise ToolError(
            f"The patch has {wrong!r}, half of a surrogate pair, which no file can hold: write whole characters."
        )
    lines = patch.strip("\r\n").split("\n")
    if lines[0].endswith("\r"):  # the patch's own line ends; otherwise a "\r" is content
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
            raise ToolError(f"The patch updates {path} but has no changes for it.")
        return change

    def _hunk(self) -> Hunk:
        hunk = Hunk()
        while self._more() and self._lines[self._at].startswith("@@"):
            anchor = self._next()[2:].removeprefix(" ").removesuffix("\r")
            if anchor.strip() and not anchor.endswith(
                "@@"
            ):  # "-1,2 +1,2 @@" has diff's line numbers, which are ignored
                hunk.anchors.append(anchor)
        while self._more() and not self._lines[self._at].startswith("@@"):
            line = self._next()
            if line.startswith(_END_OF_FILE):
                hunk.is_at_end = True
                break
            mark, text = (line[0], line[1:]) if line else (" ", "")
            if mark not in (" ", "+", "-", "\r"):
                raise self._error(line, "should begin with ' ', '+' or '-'")
            hunk.lines.append((mark, text) if mark != "\r" else (" ", ""))
        if not hunk.lines:
            raise ToolError(f"A place of the patch, before line {self._at + 1}, has no lines.")
        return hunk

    def _error(self, line: str, what: str) -> ToolError:
        return ToolError(f"Line {self._at} of the patch, {line[:60]!r}, {what}.")


def _path(line: str, word: str) -> str:
    return line[len(word) :].strip()


# --- Files ------------------------------------------------------------------------------------------------------------


class _Workspace:
    """The files of a folder as they will be; `commit` writes them to the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._names = Names(self._folder)
        self._keys: dict[str, str] = {}
        self._before: dict[str, Seen | None] = {}
        self._after: dict[str, bytes | None] = {}  # None: no such file
        # New name -> the name that the file had: a moved file keeps its permissions.
        self._origin: dict[str, str | None] = {}
        self._open: dict[str, Document] = {}
        self._where: dict[str, str | None] = {}  # old name -> the file's name now

    def document(self, path: str) -> Document:
        """The text of a file, to be changed in place."""
        key = self._key(path)
        if key not in self._open:
            data = self._load(path)
            if data is None:
                raise ToolError(f"There is no file {path}; to make one, use *** Add File.")
            try:
                self._open[key] = Document(data.decode("utf-8"))
            except UnicodeDecodeError:
                raise ToolError(f"{path} is not UTF-8 text, so no patch can change it.") from None
        return self._open[key]

    def add(self, path: str, content: str) -> None:
        if self._load(path) is not None:
            raise ToolError(f"There is a file {path} already; to change it, use *** Update File.")
        key = self._key(path)
        self._set(key, content)
        if self._before[key] is not None and not self._is_moved(key):  # deleted, and then added again
            self._origin[key] = self._where[key] = key

    def _set(self, key: str, text: str) -> None:
        data = text.encode()
        if len(data) > _LARGEST_FILE:
            raise ToolError(f"{key} would have more than {_LARGEST_FILE / 1e6:.0f} MB, too much for a patch.")
        self._after[key] = data

    def delete(self, path: str) -> None:
        if self._load(path) is None:
            raise ToolError(f"There is no file {path} to delete.")
        key = self._key(path)
        origin = self._origin[key]
        self._after[key] = self._origin[key] = None
        if origin is not None:
            self._where[origin] = None

    def move(self, path: str, target: str) -> None:
        source, key = self._key(path), self._key(target)
        self._load(path)
        if key == source:
            key = str(PurePosixPath(source).with_name(PurePosixPath(target).name))
            if key == source:
                return  # moved to where it is
            # The same name in other case, on a volume that ignores case.
            self._before[key] = self._after[key] = None
        elif self._load(target) is not None:
            raise ToolError(f"{path} cannot be moved to {target}: there is such a file already.")
        self._after[key], self._after[source] = self._after[source], None
        origin = self._origin[key] = self._origin[source]
        self._origin[source] = None
        if origin is not None:
            self._where[origin] = key

    def commit(self) -> list[str]:
        """Write what changed, all of it or nothing, and say what that was. Raises ToolError when it cannot be written."""
        for key in list(self._open):
            self._set(key, self._open.pop(key).text)
        changed = [key for key in self._after if self._after[key] != self._data_before(key) or self._is_new_file(key)]
        if not changed:
            return [f"unchanged: {', '.join(self._after)}"]
        swap([self._change(key) for key in changed])
        return [line for key in changed for line in self._report(key)]

    def _change(self, key: str) -> Change:
        origin = self._origin[key]
        seen = None if origin is None else self._before[origin]
        like = None if origin is None or seen is None else (self._place(origin), seen)
        return Change(key, self._place(key), self._before[key], self._after[key], like)

    def _report(self, key: str) -> list[str]:
        origin, is_there = self._origin[key], self._after[key] is not None
        if not is_there:
            return [] if self._is_moved(key) else [f"D {key}"]
        if origin is not None and origin != key:
            return [f"R {origin} -> {key}"]
        return [f"A {key}" if origin is None else f"M {key}"]

    def _is_moved(self, key: str) -> bool:
        return self._where.get(key) not in (None, key)

    def _is_new_file(self, key: str) -> bool:
        """Whether the path has a new file, though with the same content."""
        return self._after[key] is not None and self._origin[key] != key

    def _data_before(self, key: str) -> bytes | None:
        seen = self._before[key]
        return None if seen is None else seen.data

    def _load(self, path: str) -> bytes | None:
        key = self._key(path)
        if key in self._open:
            self._set(key, self._open.pop(key).text)
        if key not in self._after:
            seen = self._before[key] = read_file(self._place(key), path, _LARGEST_FILE)
            self._after[key] = None if seen is None else seen.data
            self._origin[key] = None if seen is None else key
            if seen is not None:
                self._where[key] = key
        return self._after[key]

    def _place(self, key: str) -> str:
        return os.path.join(self._folder, key)

    def _key(self, path: str) -> str:
        if path not in self._keys:
            self._keys[path] = self._names.key(path)
        return self._keys[path]
