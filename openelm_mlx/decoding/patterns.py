"""Regular expressions as automata, to find the shortest text that completes a match.

The engine tells which characters may follow, not which of them leads to an end: after `.+` and before `\\.txt` nearly all
may. Here a pattern becomes a nondeterministic automaton (Thompson's), in which the shortest path to an end is found.

The result is a proposal that the engine has to accept. So where the two could differ the automaton accepts more (`\\w` and
`\\p{...}` have all letters outside ASCII), and a pattern with an unknown construct gets no automaton.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import final

from .character_classes import ANY, a_character_of, contains, preference
from .pattern_parser import Parser, State, Unreadable, anchored_branches, ends_with_anchor

# A search through several patterns at once ends after this many combinations of their states.
_MOST_PLACES = 5_000
_MOST_STEPS = 2_000_000


@final
class Pattern:
    """One pattern as an automaton. Raises ValueError for what it cannot read.

    matches_whole: whether the pattern is the whole text, as in `regex=`; in JSON Schema it may match anywhere unless it is
    anchored.
    """

    def __init__(self, text: str, matches_whole: bool = False) -> None:
        self._states: list[State] = []
        try:
            starts = self._read(text, matches_whole)
        except (Unreadable, IndexError, RecursionError):
            raise ValueError(f"the pattern {text!r} makes no automaton") from None
        self.start = self._closure(starts)
        self._after: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def _read(self, text: str, matches_whole: bool) -> list[int]:
        """Build the states of all alternatives, each with its own anchors; return where they start."""
        starts, self._ends = [], set()
        for branch in anchored_branches(text):
            is_start, is_end = branch.startswith(("^", r"\A")), ends_with_anchor(branch)
            core = branch.removeprefix("^").removeprefix(r"\A")
            core = core[: -1 if branch.endswith("$") else -2] if is_end else core
            piece = Parser(core, self._states).whole()
            if not (matches_whole or is_start):
                self._states[piece.start].empty.append(self._loop(piece.start))
            if not (matches_whole or is_end):
                self._states[piece.end].empty.append(self._loop(piece.end))
            starts.append(piece.start)
            self._ends.add(piece.end)
        return starts

    def _loop(self, back: int) -> int:
        """A state that takes any character and returns to `back`."""
        state = State()
        state.ranges, state.target = ANY, back
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
        reached = self._closure({node.target for node in nodes if node.target >= 0 and contains(node.ranges, code)})
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
        found = {a_character_of(self._states[state].ranges) for state in states if self._states[state].target >= 0}
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
            character = a_character_of(state.ranges) if state.target >= 0 else None
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
                character = a_character_of(node.ranges) if node.target >= 0 else None
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
    """The patterns that one string must match, and its length in characters."""

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
        """A breadth-first search over the states of all patterns together, and the missing length."""
        first = (start, max(0, missing))
        came: dict[tuple[tuple[frozenset[int], ...], int], tuple[object, str] | None] = {first: None}
        waiting = deque([first])
        while waiting and len(came) < _MOST_PLACES:
            place = waiting.popleft()
            states, left = place
            if not left and all(p.is_match(s) for p, s in zip(self.patterns, states, strict=True)):
                return _way_to(place, came)
            choices = set().union(*(p.choices(s) for p, s in zip(self.patterns, states, strict=True)))
            for character in sorted(choices, key=preference):
                following = tuple(p.after(s, character) for p, s in zip(self.patterns, states, strict=True))
                reached = (following, max(0, left - 1))
                if all(following) and reached not in came:
                    came[reached] = (place, character)
                    waiting.append(reached)
        return None


def _way_to(place: object, came: dict) -> str:
    characters = []
    while (step := came[place]) is not None:
        place, character = step
        characters.append(character)
    return "".join(reversed(characters))
