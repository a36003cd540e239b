"""Measured memory and speed of a machine, as plans use them; `calibration.py` computes, stores and finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeasuredRates:
    """For one model family: the fixed seconds of a layer; bytes a second of weights, and of keys and values, in decoding;
    operations a second (two a multiplication) of a prompt's products. error: the largest relative error of the terms.
    """

    layer_seconds: float
    weights: float
    keys_values: float
    products: float | None = None
    error: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """scratch: model family -> factor for the scratch memory that shapes predict; process_bytes: of the process besides MLX.

    rates: model family -> rates of `machine`, which do not apply to any other; disk: bytes a second at which experts are read.
    """

    scratch: Mapping[str, float]
    process_bytes: int | None = None
    date: str = ""
    rates: Mapping[str, MeasuredRates] = field(default_factory=dict)
    disk: float | None = None
    machine: str = ""
    speed_date: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The memory corrections, as they are stored."""
        return {"scratch": dict(self.scratch), "process_bytes": self.process_bytes, "date": self.date}
