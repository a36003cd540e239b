"""Ctrl-C in a chat: it ends the current answer, and never the session because it came a moment too late."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Further interruptions are ignored while the chat cleans up, but at most for this many seconds.
PATIENCE_SECONDS = 3.0


class Interrupts:
    """While it is entered, KeyboardInterrupt is raised only within `armed` blocks, once in each.

    An interruption a moment later, while the history is updated or the next prompt is shown, is meant for the same answer and
    is ignored. Otherwise it could end the program.
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
