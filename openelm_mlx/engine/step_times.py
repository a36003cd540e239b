"""How long the steps of an engine take, for the pace of prompts (`ChunkPace`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import mlx.core as mx

if TYPE_CHECKING:
    from .active import ActiveRequest
    from .scheduler import Scheduler


# A part of the time between two tokens: who has waited less for the second one was busy until it came, or longer.
_LEAST_WAITED = 0.02


@final
class StepTimes:
    """See the module. began: when a step began, by `time.perf_counter`. chunk_length: tokens of prompts in it.

    Where the host is a pass ahead, a pass takes its own time on the host, or that on the device from the tokens of the one
    before it to its own, whichever is longer. The latter is not seen where its tokens are there when they are asked for.
    """

    def __init__(self, scheduler: Scheduler[ActiveRequest]) -> None:
        self._scheduler, self._pace = scheduler, scheduler.pace
        # When the tokens of the pass before came, and how many tokens of prompts are in the one that is being computed.
        self._came: float | None = None
        self._in_flight = 0
        # Seconds that the pass in flight has taken on the host, and that the step has waited for tokens.
        self._on_host = self._waited = 0.0

    def took(self, began: float, chunk_length: int, was_first: bool = False, is_alone: bool = False) -> None:
        """A step has been computed. was_first: nobody decoded before it. is_alone: of one request by itself."""
        self._came = None
        seconds = time.perf_counter() - began
        if self._scheduler.decoding and not was_first:
            self._pace.step_took(seconds, chunk_length, is_alone)
        elif chunk_length:
            self._pace.prompt_took(seconds, chunk_length)

    def wait_for(self, tokens: Sequence[mx.array]) -> None:
        """Wait for the tokens of the pass in flight."""
        started = time.perf_counter()
        with contextlib.suppress(RuntimeError):  # the device's, which whoever hands them over is told
            mx.eval(tokens)
        now, came = time.perf_counter(), self._came
        self._came, self._waited = now, now - started
        if came is None:
            return
        on_device = now - came if self._waited >= _LEAST_WAITED * (now - came) else 0.0
        if (seconds := max(self._on_host, on_device)) > 0:
            self._pace.step_took(seconds, self._in_flight)

    def dispatched(self, began: float, chunk_length: int, has_moved: bool) -> None:
        """The step is done in which a pass has been dispatched that nobody has waited for.

        has_moved: whether somebody came into a slot in it, which takes the host longer, once.
        """
        self._on_host = 0.0 if has_moved else time.perf_counter() - began - self._waited
        self._in_flight = chunk_length

    def failed(self) -> None:
        """A pass has failed: how long the one in flight took is no longer known."""
        self._came = None

    def waited(self, began: float, chunk_length: int) -> None:
        """A pass has been computed in which nobody's token was handed over."""
        self._came = None  # the next tokens are its own
        if chunk_length:
            self._pace.prompt_took(time.perf_counter() - began, chunk_length)
