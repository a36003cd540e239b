"""Progress of several machines that read their parts of a model at the same time, as one."""

from __future__ import annotations

from typing import final

from ..hub.names import Progress


@final
class SharedProgress:
    """Adds up what each machine has read. progress: called with (bytes so far, all bytes), once all have told theirs."""

    def __init__(self, progress: Progress, num_machines: int) -> None:
        self._progress = progress
        self._done, self._totals = [0] * num_machines, [0] * num_machines

    def of(self, machine: int) -> Progress:
        """What one machine's progress is told to."""

        def update(done: int, total: int) -> None:
            self._done[machine], self._totals[machine] = done, total
            if all(self._totals):
                self._progress(sum(self._done), sum(self._totals))

        return update
