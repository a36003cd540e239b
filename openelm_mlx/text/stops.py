"""Stop strings in streamed text: what may be shown, and when to stop.

Text arrives in arbitrary pieces, so text that may still become a stop string is held back until that is decided.
Stop *tokens* are not handled here: the decoding loop compares token numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from openelm_mlx.errors import SettingError


@final
class StopStrings:
    """Watches streamed text for stop strings; a stop string and what follows it are never shown.

    The stop string that is completed first wins; of two completed by the same character, the longer one. The outcome
    does not depend on how the text is cut into pieces. One lone string is one stop. An empty one raises SettingError.

    With the stop `"</end>"`: `feed("a <")` gives `("a ", False)`, `feed("b </e")` gives `("<b ", False)` and
    `feed("nd> c")` gives `("", True)`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str):
                raise SettingError(f"A stop string is text, and {stop!r} is not; give the text to stop at.")
            if not stop:
                raise SettingError("An empty stop string would end every answer before it begins; leave it out.")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False
        self.found: str | None = None  # the stop string that ended the text

    def feed(self, piece: str) -> tuple[str, bool]:
        """Take the next piece; return the text that may be shown now, and whether a stop string was completed.

        After a completed stop string every further call returns `("", True)`.
        """
        if self._stopped:
            return "", True
        if not self._stops:
            return piece, False
        text = self._held + piece
        if (first := self._first_stop(text)) is not None:
            start, self.found = first
            self._stopped, self._held = True, ""
            return text[:start], True
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """Return the text still held back: the stream has ended, so it cannot become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is completed first begins, and which one it is; None if there is none."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
