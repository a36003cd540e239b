"""What a machine was measured to take and to reach, as plans read it; `calibration.py` makes, keeps and finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeasuredRates:
    """Of one model family: seconds a layer however small it is; bytes a second of weights, and of keys and values, that
    decoding reaches; operations a second (two a multiplication) of a prompt's products. error: by how much of a run's
    time the terms missed the one that they explain worst.
    """

    layer_seconds: float
    weights: float
    keys_values: float
    products: float | None = None
    error: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """scratch: model family -> how many times as much as the shapes say; process_bytes: of the process beside MLX's peak.

    rates: model family -> what `machine` reaches, which says nothing of any other; disk: bytes a second that its experts
    are read with.
    """

    scratch: Mapping[str, float]
    process_bytes: int | None = None
    date: str = ""
    rates: Mapping[str, MeasuredRates] = field(default_factory=dict)
    disk: float | None = None
    machine: str = ""
    speed_date: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What is kept of memory."""
        return {"scratch": dict(self.scratch), "process_bytes": self.process_bytes, "date": self.date}
