"""Regular expressions as automata, to find the shortest text that completes a match.

The engine tells which characters may follow, not which of them leads to an end: after `.+` and before `\\.txt` nearly all
may. Here a pattern becomes a nondeterministic automaton (Thompson's), and the shortest way to its end is looked up.

What is found is a proposal, and the engine has the last word. So where the two could differ the automaton takes more
(`\\w` has all letters outside ASCII, `\\p{...}` too), and a construct that it does not know makes no automaton at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, final

_LAST = 0x10FFFF
# A pattern that needs more states than this (nested counts) gets no automaton, and a search ends after so many places.
_MOST_STATES = 20_000
_MOST_PLACES = 5_000
_MOST_STEPS = 2_000_000

Ranges = tuple[tuple[int, int], ...]  # of code points, sorted and apart

_ANY: Ranges = ((0, _LAST),)
_BEYOND_ASCII = (0x80, _LAST)
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_CLASSES: dict[str, Ranges] = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_NAMED: dict[str, Ranges] = {
    "alpha": ((0x41, 0x5A), (0x61, 0x7A)),
    "alnum": ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)),
    "ascii": ((0, 0x7F),),
    "blank": ((0x09, 0x09), (0x20, 0x20)),
    "cntrl": ((0, 0x1F), (0x7F, 0x7F)),
    "digit": _DIGIT,
    "graph": ((0x21, 0x7E),),
    "lower": ((0x61, 0x7A),),
    "print": ((0x20, 0x7E),),
    "punct": ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)),
    "space": _SPACE,
    "upper": ((0x41, 0x5A),),
    "word": _WORD,
    "xdigit": ((0x30, 0x39), (0x41, 0x46), (0x61, 0x66)),
}
_PROPERTIES: dict[str, Ranges] = {"L": _NAMED["alpha"], "Lu": _NAMED["upper"], "Ll": _NAMED["lower"], "N": _DIGIT}
_PROPERTIES |= {"Letter": _NAMED["alpha"], "Alphabetic": _NAMED["alpha"], "Nd": _DIGIT, "P": _NAMED["punct"]}
_NUM_DIGITS = {"x": 2, "u": 4, "U": 8}  # of a character's code
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "a": 0x07, "0": 0}

# Taken for a class when it has them; then other printable characters, and what JSON would have to escape last.
_PREFERRED = [ord(c) for c in "a0A-_.:/@, ;+"]
_PREFERRED += [code for code in range(0x21, 0x7F) if chr(code) not in '"\\' and code not in _PREFERRED]
_PREFERRED += [ord('"'), ord("\\"), 0x0A, 0x09]


def _union(parts: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _complement(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for low, high in ranges:
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    return tuple(found) if start > _LAST else (*found, (start, _LAST))


def _common(first: Ranges, second: Ranges) -> Ranges:
    return _complement(_union((*_complement(first), *_complement(second))))


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _one_of(ranges: Ranges) -> str | None:
    """A character of a class, a plain one where it has any."""
    for code in _PREFERRED:
        if _has(ranges, code):
            return chr(code)
    for low, high in ranges:
        code = max(low, 0xA1) if high >= 0xA1 else low
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)
        if high > 0xDFFF:
            return chr(0xE000)
    return None


class _Unknown(Exception):
    """The pattern has something that makes no automaton here."""


class _State:
    """A state of the automaton: at most one class of characters leads on from it, and any number of empty moves."""

    __slots__ = ("empty", "ranges", "target")

    def __init__(self) -> None:
        self.ranges: Ranges = ()
        self.target = -1
        self.empty: list[int] = []


class _Piece(NamedTuple):
    start: int
    end: int


@final
class _Parser:
    """A recursive descent over the syntax that Rust's regex crate and ECMAScript share, building states as it goes."""

    def __init__(self, text: str, states: list[_State]) -> None:
        self._text, self._at, self._states = text, 0, states
        self._ignore_case = self._dot_all = False
        self._depth = 0

    def whole(self) -> _Piece:
        piece = self._alternatives()
        if self._at != len(self._text):
            raise _Unknown
        return piece

    # --- States ---

    def _new(self) -> int:
        if len(self._states) >= _MOST_STATES:
            raise _Unknown
        self._states.append(_State())
        return len(self._states) - 1

    def _link(self, start: int, end: int) -> None:
        self._states[start].empty.append(end)

    def _nothing(self) -> _Piece:
        start, end = self._new(), self._new()
        self._link(start, end)
        return _Piece(start, end)

    def _characters(self, ranges: Ranges) -> _Piece:
        if self._ignore_case:
            both = list(ranges)
            for low, high in ranges:
                for first, last, shift in ((0x41, 0x5A, 32), (0x61, 0x7A, -32)):
                    if max(low, first) <= min(high, last):
                        both.append((max(low, first) + shift, min(high, last) + shift))
            ranges = _union(both)
        start, end = self._new(), self._new()
        self._states[start].ranges, self._states[start].target = ranges, end
        return _Piece(start, end)

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
            raise _Unknown
        self._at += 1
        return self._text[self._at - 1]

    def _until(self, end: str) -> str:
        stop = self._text.find(end, self._at)
        if stop < 0:
            raise _Unknown
        found, self._at = self._text[self._at : stop], stop + len(end)
        return found

    def _alternatives(self) -> _Piece:
        self._depth += 1
        if self._depth > 100:
            raise _Unknown
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
        return _Piece(start, end)

    def _sequence(self) -> _Piece:
        whole = self._nothing()
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            begin = self._at
            piece = self._repeated(begin)
            self._link(whole.end, piece.start)
            whole = _Piece(whole.start, piece.end)
        return whole

    def _repeated(self, begin: int) -> _Piece:
        piece, end_of_atom = self._atom(), self._at
        counts = self._counts()
        if counts is None:
            return piece
        low, high = counts
        self._take("?")  # lazy: the same strings
        after = self._at
        whole = self._nothing()

        def once_more() -> _Piece:
            self._at = begin
            again = self._atom()
            assert self._at == end_of_atom
            return again

        for _ in range(low):
            self._link(whole.end, piece.start)
            whole = _Piece(whole.start, piece.end)
            piece = once_more()
        if high is None:
            end = self._new()
            self._link(whole.end, piece.start)
            self._link(piece.end, piece.start)
            self._link(whole.end, end)
            self._link(piece.end, end)
            whole = _Piece(whole.start, end)
        else:
            end = self._new()
            for _ in range(high - low):
                self._link(whole.end, end)
                self._link(whole.end, piece.start)
                whole = _Piece(whole.start, piece.end)
                piece = once_more()
            self._link(whole.end, end)
            whole = _Piece(whole.start, end)
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
            raise _Unknown
        first = int(low or 0)
        last = first if not comma else int(high) if high else None
        if last is not None and last < first:
            raise _Unknown
        return first, last

    def _atom(self) -> _Piece:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._characters(self._class())
        if character == ".":
            return self._characters(_ANY if self._dot_all else _complement(((0x0A, 0x0A),)))
        if character == "\\":
            return self._characters(self._escape())
        if character in "^$":
            raise _Unknown  # `Pattern` takes those at the ends; in between they are rare
        if character in "*+?":
            raise _Unknown
        return self._characters(((ord(character), ord(character)),))

    def _group(self) -> _Piece:
        if self._take("?"):
            if self._take("P<") or (
                self._peek("<") and not self._peek("<=") and not self._peek("<!") and self._take("<")
            ):
                self._until(">")
            elif not self._take(":"):
                return self._flagged()
        piece = self._alternatives()
        if not self._take(")"):
            raise _Unknown
        return piece

    def _flagged(self) -> _Piece:
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
                raise _Unknown
        if letter == ")":
            return self._nothing()
        piece = self._alternatives()
        self._ignore_case, self._dot_all = outside
        if not self._take(")"):
            raise _Unknown
        return piece

    def _escape(self) -> Ranges:
        letter = self._next()
        if letter.lower() in _CLASSES:
            ranges = _CLASSES[letter.lower()]
            return _complement(ranges) if letter.isupper() else _union((*ranges, _BEYOND_ASCII))
        if letter in "pP":
            name = self._until("}") if self._take("{") else self._next()
            known = _PROPERTIES.get(name.rpartition("=")[2], _ANY)
            return _union((*known, _BEYOND_ASCII)) if letter == "p" else _ANY
        if letter in _NUM_DIGITS:
            digits = self._until("}") if self._take("{") else "".join(self._next() for _ in range(_NUM_DIGITS[letter]))
            try:
                code = int(digits, 16)
            except ValueError:
                raise _Unknown from None
        elif letter == "c":
            code = ord(self._next()) % 32
        elif letter in _CONTROLS:
            code = _CONTROLS[letter]
        elif letter.isalnum():
            raise _Unknown  # \b, \B, \1 and whatever else
        else:
            code = ord(letter)
        return ((min(code, _LAST), min(code, _LAST)),)

    def _class(self) -> Ranges:
        self._depth += 1
        if self._depth > 100:
            raise _Unknown
        parts: list[tuple[int, int]] = []
        is_negated, is_first = self._take("^"), True
        result: Ranges | None = None
        while not self._peek("]") or is_first:
            if self._take("&&"):
                part = _union(parts)
                result, parts = part if result is None else _common(result, part), []
                continue
            if self._peek("--") or self._peek("~~"):
                raise _Unknown
            parts += self._class_item(is_first)
            is_first = False
        self._at += 1
        self._depth -= 1
        ranges = _union(parts) if result is None else _common(result, _union(parts))
        return _complement(ranges) if is_negated else ranges

    def _class_item(self, is_first: bool) -> Ranges:
        if self._take("[:"):
            name = self._until(":]")
            ranges = _NAMED.get(name.lstrip("^"))
            if ranges is None:
                raise _Unknown
            return _complement(ranges) if name.startswith("^") else ranges
        if not is_first and self._take("["):
            return self._class()
        low = self._class_character()
        if len(low) != 1 or low[0][0] != low[0][1]:
            return low
        if self._peek("-") and not self._peek("-]") and not self._peek("--"):
            self._at += 1
            high = self._class_character()
            if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                raise _Unknown
            return ((low[0][0], high[0][0]),)
        return low

    def _class_character(self) -> Ranges:
        character = self._next()
        if character == "\\":
            if self._take("b"):
                return ((8, 8),)
            return self._escape()
        return ((ord(character), ord(character)),)


@final
class Pattern:
    """One pattern as an automaton. Raises ValueError for what it cannot read.

    matches_whole: whether the pattern is the whole text, as in `regex=`; in JSON Schema it may match anywhere unless it is
    anchored.
    """

    def __init__(self, text: str, matches_whole: bool = False) -> None:
        self._states: list[_State] = []
        try:
            starts = self._read(text, matches_whole)
        except (_Unknown, IndexError, RecursionError):
            raise ValueError(f"the pattern {text!r} makes no automaton") from None
        self.start = self._closure(starts)
        self._after: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def _read(self, text: str, matches_whole: bool) -> list[int]:
        """Build the states of all alternatives, each with its own anchors; return where they start."""
        starts, self._ends = [], set()
        for branch in _branches(text):
            is_start, is_end = branch.startswith(("^", r"\A")), _ends_with_anchor(branch)
            core = branch.removeprefix("^").removeprefix(r"\A")
            core = core[: -1 if branch.endswith("$") else -2] if is_end else core
            piece = _Parser(core, self._states).whole()
            if not (matches_whole or is_start):
                self._states[piece.start].empty.append(self._loop(piece.start))
            if not (matches_whole or is_end):
                self._states[piece.end].empty.append(self._loop(piece.end))
            starts.append(piece.start)
            self._ends.add(piece.end)
        return starts

    def _loop(self, back: int) -> int:
        """A state that takes any character and returns to `back`."""
        state = _State()
        state.ranges, state.target = _ANY, back
        self._states.append(state)
        return len(self._states) - 1

    def _closure(self, states: Iterable[int]) -> frozenset[int]:
        found, waiting = set(states), list(states)
        while waiting:
            for following in self._states[waiting.pop()].empty:
                if following not in found:
                    found.add(following)
                    waiting.append(following)
        return frozenset(found)

    def after(self, states: frozenset[int], character: str) -> frozenset[int]:
        """The states that one more character leads to."""
        known = self._after.get((states, character))
        if known is not None:
            return known
        code = ord(character)
        nodes = (self._states[state] for state in states)
        reached = self._closure({node.target for node in nodes if node.target >= 0 and _has(node.ranges, code)})
        if len(self._after) >= _MOST_PLACES:
            self._after.clear()
        self._after[states, character] = reached
        return reached

    def after_text(self, text: str) -> frozenset[int]:
        states = self.start
        for character in text:
            states = self.after(states, character)
        return states

    def is_match(self, states: frozenset[int]) -> bool:
        return not self._ends.isdisjoint(states)

    def choices(self, states: frozenset[int]) -> set[str]:
        """A character for each class that may come next."""
        found = {_one_of(self._states[state].ranges) for state in states if self._states[state].target >= 0}
        return {character for character in found if character is not None}

    def rests_of_tails(self, text: str) -> set[str]:
        """The shortest rests of all matches that may have begun anywhere in `text`, one for each state."""
        states = self.start
        for character in text:
            states = self.after(states, character) | self.start
        rests = (self.shortest(frozenset((state,))) for state in states)
        return {rest for rest in rests if rest is not None}

    @cached_property
    def _shortest(self) -> list[tuple[int, str, int] | None]:
        """For each state: how many characters the end is away, the first of them, and the state after it."""
        before: list[list[tuple[int, str]]] = [[] for _ in self._states]
        for number, state in enumerate(self._states):
            for following in state.empty:
                before[following].append((number, ""))
            character = _one_of(state.ranges) if state.target >= 0 else None
            if character is not None:
                before[state.target].append((number, character))
        found: list[tuple[int, str, int] | None] = [None] * len(self._states)
        waiting: deque[tuple[int, tuple[int, str, int]]] = deque((end, (0, "", end)) for end in self._ends)
        while waiting:
            number, way = waiting.popleft()
            if found[number] is not None:
                continue
            found[number] = way
            for earlier, character in before[number]:
                if character:
                    waiting.append((earlier, (way[0] + 1, character, number)))
                else:
                    waiting.appendleft((earlier, (way[0], "", number)))
        return found

    def shortest(self, states: frozenset[int], min_length: int = 0) -> str | None:
        """The shortest text of at least this length that leads from these states to a match; None if none does."""
        if len(self._states) * min_length > _MOST_STEPS:
            return None
        came: list[dict[int, tuple[int, str]]] = []  # for each character: the state before it, by the state after it
        current = states
        for _ in range(min_length):
            layer: dict[int, tuple[int, str]] = {}
            for state in current:
                node = self._states[state]
                character = _one_of(node.ranges) if node.target >= 0 else None
                if character is not None:
                    for reached in self._closure([node.target]):
                        layer.setdefault(reached, (state, character))
            came.append(layer)
            current = frozenset(layer)
        ways = [(way[0], state) for state in current if (way := self._shortest[state]) is not None]
        if not ways:
            return None
        length, state = min(ways)
        text, before = "", state
        for layer in reversed(came):
            before, character = layer[before]
            text = character + text
        length += min_length
        while len(text) < length:
            _, character, state = self._shortest[state]  # type: ignore[misc]  # it is on a way that was found
            text += character
        return text


@final
class StringForm:
    """What one string has to be: all of these patterns, and a length in characters."""

    def __init__(self, patterns: Sequence[Pattern] = (), min_length: int = 0, max_length: int | None = None) -> None:
        self.patterns, self.min_length, self.max_length = tuple(patterns), min_length, max_length

    def rest(self, text: str) -> str | None:
        """The shortest text that completes `text`; None if none was found."""
        missing = self.min_length - len(text)
        if not self.patterns:
            return "a" * max(0, missing)
        places = tuple(pattern.after_text(text) for pattern in self.patterns)
        if not all(places):
            return None
        if len(self.patterns) == 1:
            return self.patterns[0].shortest(places[0], max(0, missing))
        return self._searched(places, missing)

    def _searched(self, start: tuple[frozenset[int], ...], missing: int) -> str | None:
        """Breadth first over the places of all patterns together, with the length so far."""
        first = (start, max(0, missing))
        came: dict[tuple[tuple[frozenset[int], ...], int], tuple[object, str] | None] = {first: None}
        waiting = deque([first])
        while waiting and len(came) < _MOST_PLACES:
            place = waiting.popleft()
            states, left = place
            if not left and all(p.is_match(s) for p, s in zip(self.patterns, states, strict=True)):
                return _way_to(place, came)
            choices = set().union(*(p.choices(s) for p, s in zip(self.patterns, states, strict=True)))
            for character in sorted(choices, key=_preference):
                following = tuple(p.after(s, character) for p, s in zip(self.patterns, states, strict=True))
                reached = (following, max(0, left - 1))
                if all(following) and reached not in came:
                    came[reached] = (place, character)
                    waiting.append(reached)
        return None


def _preference(character: str) -> int:
    code = ord(character)
    return _PREFERRED.index(code) if code in _PREFERRED else 1000


def _way_to(place: object, came: dict) -> str:
    characters = []
    while (step := came[place]) is not None:
        place, character = step
        characters.append(character)
    return "".join(reversed(characters))


def _branches(text: str) -> list[str]:
    """A pattern cut at its outermost `|`, where anchors belong to one branch only."""
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


def _ends_with_anchor(branch: str) -> bool:
    if branch.endswith((r"\z", r"\Z")):
        return (len(branch) - len(branch[:-1].rstrip("\\"))) % 2 == 0
    return branch.endswith("$") and (len(branch) - 1 - len(branch[:-1].rstrip("\\"))) % 2 == 0
