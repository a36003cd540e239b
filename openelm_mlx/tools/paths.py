"""Names and paths that a model gives: which files the tools can see, and how a name is shown.

One rule for all tools: hidden files, and files behind a symbolic link, are invisible. Files are named by paths inside one
folder; the volume may ignore case and the form of accents, as a Mac's usually does.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import ToolError
from ..text.unicode import whole_characters

# Not secret, but full of generated files where no answer is to be found.
_GENERATED = ("__pycache__", "node_modules")


def existing_folder(folder: str | Path, purpose: str) -> Path:
    """The folder that a program gives its tools, as an absolute path without links.

    purpose: for the error, such as "are no files to read". Raises ToolError.
    """
    try:
        found = Path(folder).expanduser().resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError, ValueError):  # a loop of links, "~nobody", what no file system takes
        is_folder = False
    if not is_folder:
        raise ToolError(f"{folder} is not a folder, so there {purpose} in it: name one that exists.")
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out by the tools: `.env`, `.git`, `node_modules`."""
    # Some volumes ignore characters without a shape, so that "\u200c.git" is .git.
    visible = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return visible.startswith(".") or visible.casefold() in _GENERATED


def shown(name: str) -> str:
    """A file's name as one line of text, with `\ufffd` for invisible characters such as line breaks."""
    name = whole_characters(name)
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in name)


class Names:
    """Paths inside `folder` as a patch gives them, each in the volume's own spelling.

    A folder's names are read once; files that others make meanwhile are noticed when the patch is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[str, frozenset[str]] = {}

    def key(self, path: str) -> str:
        """The path, relative to the folder, with '/'. It need not exist.

        Raises ToolError for one that leads, or could lead, out of the folder, to something hidden or through a link, and for
        an impossible path.
        """
        parts = PurePosixPath(path).parts
        if not parts or path.startswith(("/", "~")) or ".." in parts or "\\" in path or ":" in parts[0]:
            raise ToolError(f"{shown(path)!r} is not a path inside the folder: give a relative one, without '..'.")
        if shown(path) != path:
            raise ToolError(f"{shown(path)!r} has characters that no file's name should have: leave them out.")
        place, spelled = os.fspath(self._folder), []
        try:
            for part in parts:
                part = self._own_spelling(place, part)
                if is_hidden(part):
                    raise ToolError(
                        f"{path} is hidden ({part}), and hidden files are not for tools: choose another place."
                    )
                place = os.path.join(place, part)
                spelled.append(part)
                if os.path.islink(place):
                    raise ToolError(f"{path} leads through a symbolic link, {part}, and links are not followed.")
        except OSError as error:
            raise ToolError(f"{path[:200]} cannot be used: {error.strerror}.") from error
        return "/".join(spelled)

    def _own_spelling(self, folder: str, name: str) -> str:
        """How the volume spells a name that it finds: README for Readme where case does not count."""
        try:
            status = os.lstat(os.path.join(folder, name))
            if folder not in self._listed:
                self._listed[folder] = frozenset(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return name
        names = self._listed[folder]
        if name in names:
            return name
        for each in sorted(names, key=lambda each: (_folded(each) != _folded(name), each)):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(os.path.join(folder, each)), status):
                    return each
        return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def first_hidden(parts: Iterable[str]) -> str | None:
    """The first hidden one of a path's parts."""
    return next((part for part in parts if is_hidden(part)), None)
