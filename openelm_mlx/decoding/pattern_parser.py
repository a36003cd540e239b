"""Reading a regular expression into the states of a nondeterministic automaton (Thompson's construction).

A construct that the parser does not know (look-around, back references, word boundaries) makes no automaton: Unreadable.
"""

from __future__ import annotations

from typing import NamedTuple, final

from .character_classes import (
    ANY,
    BEYOND_ASCII,
    CLASSES,
    LAST,
    NAMED,
    PROPERTIES,
    Ranges,
    complement,
    intersection,
    union,
)

# A pattern that needs more states than this (nested counts) gets no automaton.
_MOST_STATES = 20_000
_NUM_DIGITS = {"x": 2, "u": 4, "U": 8}  # of a character's code
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "a": 0x07, "0": 0}


class Unreadable(Exception):
    """The pattern has something that makes no automaton here."""


class State:
    """A state of the automaton: at most one class of characters leads on from it, and any number of empty moves."""

    __slots__ = ("empty", "ranges", "target")

    def __init__(self) -> None:
        self.ranges: Ranges = ()
        self.target = -1
        self.empty: list[int] = []


class Piece(NamedTuple):
    start: int
    end: int


@final
class Parser:
    """A recursive descent over the syntax that Rust's regex crate and ECMAScript share, building states as it goes."""

    def __init__(self, text: str, states: list[State]) -> None:
        self._text, self._at, self._states = text, 0, states
        self._ignore_case = self._dot_all = False
        self._depth = 0

    def whole(self) -> Piece:
        piece = self._alternatives()
        if self._at != len(self._text):
            raise Unreadable
        return piece

    # --- States ---

    def _new(self) -> int:
        if len(self._states) >= _MOST_STATES:
            raise Unreadable
        self._states.append(State())
        return len(self._states) - 1

    def _link(self, start: int, end: int) -> None:
        self._states[start].empty.append(end)

    def _nothing(self) -> Piece:
        start, end = self._new(), self._new()
        self._link(start, end)
        return Piece(start, end)

    def _characters(self, ranges: Ranges) -> Piece:
        if self._ignore_case:
            both = list(ranges)
            for low, high in ranges:
                for first, last, shift in ((0x41, 0x5A, 32), (0x61, 0x7A, -32)):
                    if max(low, first) <= min(high, last):
                        both.append((max(low, first) + shift, min(high, last) + shift))
            ranges = union(both)
        start, end = self._new(), self._new()
        self._states[start].ranges, self._states[start].target = ranges, end
        return Piece(start, end)

    # --- Syntax ---

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self._at += len(text)
            return True
        return False

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise Unreadable
        self._at += 1
        return self._text[self._at - 1]

    def _until(self, end: str) -> str:
        stop = self._text.find(end, self._at)
        if stop < 0:
            raise Unreadable
        found, self._at = self._text[self._at : stop], stop + len(end)
        return found

    def _alternatives(self) -> Piece:
        self._depth += 1
        if self._depth > 100:
            raise Unreadable
        flags = self._ignore_case, self._dot_all
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        self._ignore_case, self._dot_all = flags
        self._depth -= 1
        if len(branches) == 1:
            return branches[0]
        start, end = self._new(), self._new()
        for branch in branches:
            self._link(start, branch.start)
            self._link(branch.end, end)
        return Piece(start, end)

    def _sequence(self) -> Piece:
        whole = self._nothing()
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            begin = self._at
            piece = self._repeated(begin)
            self._link(whole.end, piece.start)
            whole = Piece(whole.start, piece.end)
        return whole

    def _repeated(self, begin: int) -> Piece:
        piece, end_of_atom = self._atom(), self._at
        counts = self._counts()
        if counts is None:
            return piece
        low, high = counts
        self._take("?")  # lazy: the same strings
        after = self._at
        whole = self._nothing()

        def once_more() -> Piece:
            self._at = begin
            again = self._atom()
            assert self._at == end_of_atom
            return again

        for _ in range(low):
            self._link(whole.end, piece.start)
            whole = Piece(whole.start, piece.end)
            piece = once_more()
        if high is None:
            end = self._new()
            self._link(whole.end, piece.start)
            self._link(piece.end, piece.start)
            self._link(whole.end, end)
            self._link(piece.end, end)
            whole = Piece(whole.start, end)
        else:
            end = self._new()
            for _ in range(high - low):
                self._link(whole.end, end)
                self._link(whole.end, piece.start)
                whole = Piece(whole.start, piece.end)
                piece = once_more()
            self._link(whole.end, end)
            whole = Piece(whole.start, end)
        self._at = after
        return whole

    def _counts(self) -> tuple[int, int | None] | None:
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if self._take("?"):
            return 0, 1
        if not self._peek("{"):
            return None
        self._at += 1
        low, comma, high = self._until("}").replace(" ", "").partition(",")
        if not (low or high).isdigit() or not (high or "0").isdigit() or len(low) > 6 or len(high) > 6:
            raise Unreadable
        first = int(low or 0)
        last = first if not comma else int(high) if high else None
        if last is not None and last < first:
            raise Unreadable
        return first, last

    def _atom(self) -> Piece:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._characters(self._class())
        if character == ".":
            return self._characters(ANY if self._dot_all else complement(((0x0A, 0x0A),)))
        if character == "\\":
            return self._characters(self._escape())
        if character in "^$":
            raise Unreadable  # `Pattern` handles anchors at the ends; elsewhere they are rare
        if character in "*+?":
            raise Unreadable
        return self._characters(((ord(character), ord(character)),))

    def _group(self) -> Piece:
        if self._take("?"):
            if self._take("P<") or (
                self._peek("<") and not self._peek("<=") and not self._peek("<!") and self._take("<")
            ):
                self._until(">")
            elif not self._take(":"):
                return self._flagged()
        piece = self._alternatives()
        if not self._take(")"):
            raise Unreadable
        return piece

    def _flagged(self) -> Piece:
        """`(?i)` for what follows, or `(?i:...)`."""
        outside, value = (self._ignore_case, self._dot_all), True
        while (letter := self._next()) not in ":)":
            if letter == "-":
                value = False
            elif letter == "i":
                self._ignore_case = value
            elif letter == "s":
                self._dot_all = value
            elif letter not in "um":
                raise Unreadable
        if letter == ")":
            return self._nothing()
        piece = self._alternatives()
        self._ignore_case, self._dot_all = outside
        if not self._take(")"):
            raise Unreadable
        return piece

    def _escape(self) -> Ranges:
        letter = self._next()
        if letter.lower() in CLASSES:
            ranges = CLASSES[letter.lower()]
            return complement(ranges) if letter.isupper() else union((*ranges, BEYOND_ASCII))
        if letter in "pP":
            name = self._until("}") if self._take("{") else self._next()
            known = PROPERTIES.get(name.rpartition("=")[2], ANY)
            return union((*known, BEYOND_ASCII)) if letter == "p" else ANY
        if letter in _NUM_DIGITS:
            digits = self._until("}") if self._take("{") else "".join(self._next() for _ in range(_NUM_DIGITS[letter]))
            try:
                code = int(digits, 16)
            except ValueError:
                raise Unreadable from None
        elif letter == "c":
            code = ord(self._next()) % 32
        elif letter in _CONTROLS:
            code = _CONTROLS[letter]
        elif letter.isalnum():
            raise Unreadable  # \b, \B, \1 and whatever else
        else:
            code = ord(letter)
        return ((min(code, LAST), min(code, LAST)),)

    def _class(self) -> Ranges:
        self._depth += 1
        if self._depth > 100:
            raise Unreadable
        parts: list[tuple[int, int]] = []
        is_negated, is_first = self._take("^"), True
        result: Ranges | None = None
        while not self._peek("]") or is_first:
            if self._take("&&"):
                part = union(parts)
                result, parts = part if result is None else intersection(result, part), []
                continue
            if self._peek("--") or self._peek("~~"):
                raise Unreadable
            parts += self._class_item(is_first)
            is_first = False
        self._at += 1
        self._depth -= 1
        ranges = union(parts) if result is None else intersection(result, union(parts))
        return complement(ranges) if is_negated else ranges

    def _class_item(self, is_first: bool) -> Ranges:
        if self._take("[:"):
            name = self._until(":]")
            ranges = NAMED.get(name.lstrip("^"))
            if ranges is None:
                raise Unreadable
            return complement(ranges) if name.startswith("^") else ranges
        if not is_first and self._take("["):
            return self._class()
        low = self._class_character()
        if len(low) != 1 or low[0][0] != low[0][1]:
            return low
        if self._peek("-") and not self._peek("-]") and not self._peek("--"):
            self._at += 1
            high = self._class_character()
            if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                raise Unreadable
            return ((low[0][0], high[0][0]),)
        return low

    def _class_character(self) -> Ranges:
        character = self._next()
        if character == "\\":
            if self._take("b"):
                return ((8, 8),)
            return self._escape()
        return ((ord(character), ord(character)),)


def anchored_branches(text: str) -> list[str]:
    """A pattern split at its outermost `|`: each branch has anchors of its own."""
    branches, start, depth, at, in_class = [], 0, 0, 0, 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 1
        elif in_class:
            in_class += (character == "[") - (character == "]")
        elif character == "[":
            in_class = 1
            at += text.startswith("^", at + 1)
            at += text.startswith("]", at + 1)
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            branches.append(text[start:at])
            start = at + 1
        at += 1
    return [*branches, text[start:]]


def ends_with_anchor(branch: str) -> bool:
    if branch.endswith((r"\z", r"\Z")):
        return (len(branch) - len(branch[:-1].rstrip("\\"))) % 2 == 0
    return branch.endswith("$") and (len(branch) - 1 - len(branch[:-1].rstrip("\\"))) % 2 == 0
