"""Progress bars on stderr, shown when the first bytes arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..hub import Progress


def byte_bar(label: str) -> Progress | None:
    """A callback for (bytes so far, total bytes) that draws a bar, removed at the end; None if none can be drawn."""
    if not output.can_draw_bars():
        return None
    bar: tqdm[Any] | None = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = output.bar(label, total, "B", leave=False)
        bar.n = done
        bar.refresh()
        if done >= total:
            bar.close()
            bar = None  # what comes next has a bar of its own

    return update


class StageBars:
    """One bar at a time, for the stages of a conversion; finished bars stay visible."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage` to `done` of `total`."""
        if stage != self._stage or self._bar is None:
            self.close()
            self._bar = output.bar(stage, total, "part" if stage == "verify" else "B", done)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
