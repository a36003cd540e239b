"""Statistics of expert slots: by layer, in total, and since an earlier moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple


@dataclass
class LayerStatistics:
    """Statistics of one layer's slots. hits, misses: experts needed, each once a call; bytes_read: in bytes.

    seconds_waited: for reads, when there was nothing else to do. read_backs: how often the host waited for the router's
    choice.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0
    read_backs: int = 0
    evictions: int = 0

    def since(self, before: LayerStatistics) -> LayerStatistics:
        """What came after `before`, an earlier state of the same layer."""
        return LayerStatistics(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))


class ExpertStatistics(NamedTuple):
    """Sums over all layers of `LayerStatistics`; `layers` has each layer's, as it was then."""

    hits: int
    misses: int
    bytes_read: int
    seconds_waited: float
    read_backs: int
    evictions: int
    layers: tuple[LayerStatistics, ...]

    @classmethod
    def of(cls, layers: Iterable[LayerStatistics]) -> ExpertStatistics:
        """The sums as they are now."""
        kept = tuple(replace(layer) for layer in layers)
        total = {each.name: sum(getattr(layer, each.name) for layer in kept) for each in fields(LayerStatistics)}
        return cls(**total, layers=kept)

    def since(self, before: ExpertStatistics) -> ExpertStatistics:
        """What came after `before`, which the same model gave earlier."""
        return self.of(now.since(then) for now, then in zip(self.layers, before.layers, strict=True))

    @property
    def hit_rate(self) -> float:
        """Hits over experts needed; 0 when none was needed."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0
