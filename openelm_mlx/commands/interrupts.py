"""Ctrl-C as a conversation wants it: it ends what is going on, and never the session by coming late."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# After an interruption things are put in order, which takes no time; who insists after so many seconds is heard again.
PATIENCE_SECONDS = 3.0


class Interrupts:
    """While it is entered, KeyboardInterrupt is raised within `armed` blocks alone, and in each of them once.

    One that comes a moment later, while what was said is put in order or the next prompt is made, means the same answer:
    nothing happens. It could otherwise strike in the midst of that, and end the program.
    """

    def __init__(self) -> None:
        self._is_armed = False
        self._since = 0.0
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """A block that Ctrl-C ends."""
        self._is_armed = True
        try:
            yield
        finally:
            self._is_armed, self._since = False, time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed or time.monotonic() - self._since > PATIENCE_SECONDS:
            self._is_armed, self._since = False, time.monotonic()
            raise KeyboardInterrupt
