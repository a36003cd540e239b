"""What each of several requests has of the experts that were read from disk for all of them.

A pass computes rows of many requests, and an expert that it needs is needed once. Its hits, reads and waits are shared by
the rows that each request had in the pass, so that the sum over all requests is what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Protocol, final

from ..experts.statistics import ExpertStatistics, LayerStatistics

if TYPE_CHECKING:
    from ..experts.residency import Residency


class CountsExpertReads(Protocol):
    """Whoever can say what has been read so far: a model's residency for all, a request's share for one."""

    def statistics(self) -> ExpertStatistics: ...


@final
class ExpertShare:
    """One request's part so far."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerStatistics() for _ in range(num_layers)]

    def statistics(self) -> ExpertStatistics:
        """As `Residency.statistics`, of this request alone."""
        return ExpertStatistics.of(self.layers)


@final
class ExpertShares:
    """Divides what was read among those for whom it was."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._before = residency.statistics()
        self._num_passes = 0

    def begin(self) -> None:
        """A pass begins. What was read since the last one was for somebody else."""
        self._before = self._residency.statistics()

    def divide(self, rows: Sequence[tuple[ExpertShare, int]]) -> None:
        """What was read since the pass began was for these, each with so many rows."""
        now = self._residency.statistics()
        before, self._before = self._before, now
        total = sum(count for _, count in rows)
        # What is rounded falls to whoever stands last: another one in every pass.
        first = self._num_passes % max(1, len(rows))
        self._num_passes += 1
        rows = [*rows[first:], *rows[:first]]
        has_begun_anew = now.read_backs < before.read_backs  # `reset_statistics`
        for i, layer in enumerate(now.layers):
            read = layer if has_begun_anew else layer.since(before.layers[i])
            start = 0
            for share, count in rows:
                _add(share.layers[i], read, start, start + count, total)
                start += count


def _add(share: LayerStatistics, read: LayerStatistics, start: int, stop: int, total: int) -> None:
    """Rows start ... stop - 1 of `total`. Whole numbers stay whole: their sum over all rows is what was read."""
    for each in fields(LayerStatistics):
        value = getattr(read, each.name)
        if isinstance(value, float):
            mine = value * (stop - start) / total
        else:
            mine = value * stop // total - value * start // total
        setattr(share, each.name, getattr(share, each.name) + mine)
