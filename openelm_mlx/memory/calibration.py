"""What computing took on this machine beside what the shapes say (memory/scratch.py): measured once, used by every plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .machine import Machine
from .stored import load_stored

SUBJECT = "memory"
# Rows with less scratch than this say more of roundings than of computing.
LEAST_SCRATCH = 4_000_000
# What lies outside is no correction of a sum but a sign that something else was measured.
SMALLEST, LARGEST = 0.25, 4.0


@dataclass(frozen=True)
class Calibration:
    """scratch: model family -> how many times as much as the shapes say; process_bytes: of the process beside MLX's peak."""

    scratch: Mapping[str, float]
    process_bytes: int | None = None
    date: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"scratch": dict(self.scratch), "process_bytes": self.process_bytes, "date": self.date}


class Measured(Protocol):
    """One run: bytes that were planned for computing, and by how much MLX's peak was above what was planned in all."""

    @property
    def family(self) -> str: ...
    @property
    def scratch(self) -> int: ...
    @property
    def planned(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def peak_process(self) -> int: ...


def calibration_from(rows: Iterable[Measured], date: str) -> Calibration:
    """The correction after which none of these runs would have taken more than was planned."""
    factors: dict[str, float] = {}
    process = []
    for row in rows:
        if row.peak_process > row.peak:
            process.append(row.peak_process - row.peak)
        if row.scratch >= LEAST_SCRATCH:
            factor = (row.peak - row.planned + row.scratch) / row.scratch
            factors[row.family] = max(factors.get(row.family, SMALLEST), min(factor, LARGEST))
    # Upwards, by a hundredth: a plan that is a little large costs nothing, one that is too small may cost everything.
    rounded = {family: math.ceil(100 * factor) / 100 for family, factor in factors.items()}
    return Calibration(rounded, max(process) if process else None, date)


def calibrated(machine: Machine) -> Machine:
    """The machine with what was measured here, if anything was: on this one, or on a Mac for any other Mac."""
    values = load_stored(SUBJECT)
    if values.get("backend") != machine.backend:
        return machine
    scratch, process = values.get("scratch"), values.get("process_bytes")
    if not isinstance(scratch, dict) or not all(_is_factor(each) for each in scratch.values()):
        return machine
    process_bytes = process if isinstance(process, int) and 0 < process < 2**40 else None
    return replace(machine, calibration=Calibration(scratch, process_bytes, str(values.get("date", ""))))


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and SMALLEST <= value <= LARGEST
