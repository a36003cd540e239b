"""A progress bar on stderr, for what takes long: made when the first bytes move, gone when they have all come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..text.terminal import visible_line
from .output import can_redraw

Progress = Callable[[int, int], None]


def byte_bar(label: str) -> Progress | None:
    """A callback that takes (bytes done, bytes in all) and draws a bar; None where stderr cannot redraw one."""
    if not can_redraw(sys.stderr):
        return None
    bar: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(desc=visible_line(label), total=total, unit="B", unit_scale=True, file=sys.stderr, leave=False)
        bar.n = done
        bar.refresh()
        if done >= total:
            bar.close()

    return update
