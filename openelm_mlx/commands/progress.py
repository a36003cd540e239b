"""Progress bars on stderr, for what takes long: made when the first bytes move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..hub import Progress


def byte_bar(label: str) -> Progress | None:
    """A callback that takes (bytes done, bytes in all) and draws a bar, gone when all have come; None where none can be."""
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

    return update


class StageBars:
    """One bar at a time, for the stages of a conversion; each stays as it ended."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage` to `done` of `total`."""
        if stage != self._stage or self._bar is None:
            self.close()
            self._bar = output.bar(stage, total, "layer" if stage == "verify" else "B", done)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
