"""How long the steps of an engine take, for the pace of prompts (`ChunkPace`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from .active import ActiveRequest
    from .scheduler import Scheduler


@final
class StepTimes:
    """See the module. began: when a step began, by `time.perf_counter`. chunk_length: tokens of prompts in it."""

    def __init__(self, scheduler: Scheduler[ActiveRequest]) -> None:
        self._scheduler, self._pace = scheduler, scheduler.pace
        # When the tokens of the pass before came, and how many tokens of prompts are in the one that is being computed.
        self._came: float | None = None
        self._in_flight = 0

    def took(self, began: float, chunk_length: int, was_first: bool = False) -> None:
        """A step has been computed. was_first: nobody decoded before it."""
        self._came = None
        seconds = time.perf_counter() - began
        if self._scheduler.decoding and not was_first:
            self._pace.step_took(seconds, chunk_length)
        elif chunk_length:
            self._pace.prompt_took(seconds, chunk_length)

    def dispatched(self, began: float, chunk_length: int, has_handed_over: bool) -> None:
        """A pass has been dispatched, and the tokens of the one before it have come, where somebody decodes.

        The host is a pass ahead: what a pass takes is the time from the tokens of the one before it to its own.
        """
        now, came, before = time.perf_counter(), self._came, self._in_flight
        if not has_handed_over:
            self._came = None  # the next tokens are those of a pass that has been waited for
            if chunk_length:
                self._pace.prompt_took(now - began, chunk_length)
            return
        self._came, self._in_flight = now, chunk_length
        if came is not None:
            self._pace.step_took(now - came, before)
