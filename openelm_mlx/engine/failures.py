"""A pass that failed for all of its requests: who is computed again, and who ends with which error.

Memory that ran out, and a GPU that macOS stopped, have a sentence with the next step; any other error is passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import mlx.core as mx

from ..decoding.gpu_errors import empty_stream, is_out_of_memory, is_watchdog
from ..errors import MemoryLimitError, SettingError
from .active import ActiveRequest
from .flat_pass import SamplerGroups
from .lifecycle import Lifecycle
from .scheduler import Scheduler


@final
class Failures:
    """See the module. The watchdog's first is forgiven: the pass is computed again, with shorter pieces of prompts."""

    def __init__(self, scheduler: Scheduler[ActiveRequest], life: Lifecycle, groups: SamplerGroups) -> None:
        self._scheduler, self._life, self._groups = scheduler, life, groups
        self._has_recomputed = False

    def handle(self, requests: Sequence[ActiveRequest], error: Exception, can_recompute: bool = False) -> None:
        """A pass has failed for all of these together. can_recompute: before any token was chosen from it."""
        errors = (error, *empty_stream())
        found = next((each for each in errors if is_out_of_memory(each)), error)
        is_recomputed = is_watchdog(found) and can_recompute and not self._has_recomputed
        if is_recomputed:
            self._groups.release()  # as they were before the pass, which has chosen nothing yet
        else:
            self._groups.forget()  # their arrays may be part of what failed
        if is_out_of_memory(found):
            text = (str(found).strip().splitlines() or [type(found).__name__])[0]
            self._life.end_all(requests, lambda: MemoryLimitError(
                "The memory ran out while several requests were being computed, and they were ended: ask again, with fewer "
                f"requests at once (max_running), shorter ones, or a smaller memory_limit. (MLX says: {text})"
            ))  # fmt: skip
        elif is_recomputed:
            self._has_recomputed = True
            self._scheduler.pace.halve()
            for each in requests:
                if each.turn is not None:
                    self._life.recompute(each)
        elif is_watchdog(found):
            self._life.end_all(requests, lambda: SettingError(
                "The GPU was stopped because a pass took longer than macOS allows: ask for a shorter prefill_chunk "
                "(--prefill-chunk), or fewer requests at once (max_running)."
            ))  # fmt: skip
        else:
            self._life.end_all(requests, lambda: found)
        mx.clear_cache()
