"""A text as lines, and applying the hunks of a patch to it: all other lines keep their bytes, line ends included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ToolError

_BOM = "\ufeff"
# Limit on the different lines of a Document, each of which is one of 1,114,112 characters (see `_index`).
_MOST_CHARACTERS = 1_060_000


@dataclass
class Hunk:
    """One place of a file that changes.

    lines: each with its prefix, " " for context, "-" for a removed line, "+" for a new one. anchors: lines that occur
    somewhere before it, in order.
    """

    anchors: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    is_at_end: bool = False

    @property
    def old(self) -> list[str]:
        """The lines that the file has there, without their ends."""
        return [line.removesuffix("\r") for mark, line in self.lines if mark != "+"]


# How lines are compared: exactly, and if that finds nothing, ignoring more and more of their spaces.
_CLEANED: tuple[Callable[[str], str], ...] = (str, str.rstrip, str.strip)


class Document:
    """A text that is being patched, as lines: what they say, and how each ends ("" for a last one without an end).

    Lines that no hunk removes stay byte for byte, except that a last line without a line end gets one when another follows.
    """

    def __init__(self, text: str) -> None:
        self._mark = _BOM if text.startswith(_BOM) else ""
        *whole, last = text.removeprefix(self._mark).split("\n")
        self._contents = [line.removesuffix("\r") for line in whole]
        self._ends = ["\r\n" if line.endswith("\r") else "\n" for line in whole]
        self._usual_end = "\r\n" if self._ends.count("\r\n") * 2 > len(self._ends) else "\n"
        if last:
            self._contents.append(last)
            self._ends.append("")
        self._indexes: list[tuple[dict[str, str], str]] = []

    @property
    def text(self) -> str:
        """The text as it is now."""
        return self._mark + "".join(map("".join, zip(self._contents, self._ends, strict=True)))

    def apply(self, hunks: Sequence[Hunk], path: str) -> None:
        """Apply hunks one after the other. Raises ToolError if one does not fit, and then applies none."""
        had_end = not self._ends or bool(self._ends[-1])
        # What it will be made of: ranges of lines that stay, and new lines with their ends.
        parts: list[tuple[int, int] | tuple[str, str]] = []
        at = 0
        for number, hunk in enumerate(hunks, 1):
            start = self._start_of(at, hunk, path, number)
            parts.append((at, start))
            at = start
            for mark, line in hunk.lines:
                if mark == "+":
                    parts.append((line.removesuffix("\r"), "\r\n" if line.endswith("\r") else self._end_near(at)))
                    continue
                if mark == " ":
                    parts.append((at, at + 1))
                at += 1
        parts.append((at, len(self._contents)))
        self._rebuild([part for part in parts if part[0] != part[1] or isinstance(part[0], str)], had_end)

    def _rebuild(self, parts: Sequence[tuple[Any, Any]], had_end: bool) -> None:
        contents: list[str] = []
        ends: list[str] = []
        for first, second in parts:
            if isinstance(first, str):
                contents.append(first)
                ends.append(second)
            else:
                contents += self._contents[first:second]
                ends += self._ends[first:second]
        number = next((i for i, end in enumerate(ends[:-1]) if not end), None)
        if number is not None:
            ends[number] = self._usual_end  # the last line of before, which has others after it now
        if parts and isinstance(parts[-1][0], str) and not had_end:
            ends[-1] = ""  # the file's end had none before
        for level, (characters, text) in enumerate(self._indexes):
            clean = _CLEANED[level]
            pieces = [
                text[first:second] if isinstance(first, int) else _character(characters, clean(first))
                for first, second in parts
            ]
            self._indexes[level] = characters, "".join(pieces)
        if any(len(characters) > _MOST_CHARACTERS for characters, _ in self._indexes):
            self._indexes.clear()
        self._contents, self._ends = contents, ends

    def _start_of(self, at: int, hunk: Hunk, path: str, number: int) -> int:
        """Where the hunk's old lines begin, from line `at` on."""
        for anchor in hunk.anchors:
            found = self._find([anchor], at)
            if found is None:
                raise ToolError(
                    f"{path} has no line {anchor.strip()!r} after which place {number} of its changes could be."
                )
            at = found + 1
        old = hunk.old
        if not old:
            return len(self._contents) if hunk.is_at_end or not hunk.anchors else at
        place = self._find(old, at, hunk.is_at_end)
        if place is None:
            shown = "\n".join(old[:3])
            where = " at its end" if hunk.is_at_end else ""
            raise ToolError(
                f"{path} does not have these lines{where}, which place {number} of its changes is about:\n{shown}\n"
                "Read the file again, and copy the lines as they are."
            )
        return place

    def _find(self, wanted: Sequence[str], start: int, is_at_end: bool = False) -> int | None:
        """The first occurrence of `wanted`: exact, or else ignoring spaces at line ends, or else at both sides of lines."""
        for level, clean in enumerate(_CLEANED):
            characters, text = self._index(level)
            target = "".join(characters.get(clean(line), "") for line in wanted)
            if len(target) < len(wanted):
                continue  # there is no such line at all
            if is_at_end:
                place = len(text) - len(target)
                if place >= start and text.endswith(target):
                    return place
            elif (place := text.find(target, start)) >= 0:
                return place
        return None

    def _index(self, level: int) -> tuple[dict[str, str], str]:
        """A character for each different line, and the text in them: a search for lines is one in a string, and as fast."""
        while len(self._indexes) <= level:
            clean = _CLEANED[len(self._indexes)]
            characters: dict[str, str] = {}
            text = "".join(_character(characters, clean(line)) for line in self._contents)
            self._indexes.append((characters, text))
        return self._indexes[level]

    def _end_near(self, number: int) -> str:
        """The line end for a new line before line `number`: that of the line above, or below, or the most frequent one."""
        above = self._ends[number - 1] if number else self._ends[number] if self._ends else ""
        return above or self._usual_end


def _character(characters: dict[str, str], line: str) -> str:
    return characters.setdefault(line, chr(len(characters)))
