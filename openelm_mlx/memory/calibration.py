"""What this machine itself was measured to take and to reach, used by every plan from then on.

Computing's memory beside what the shapes say (memory/scratch.py), and the terms of speed (memory/rates.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np

from .machine import Machine
from .stored import load_stored

SUBJECT, SPEED_SUBJECT = "memory", "speed"
# Rows with less scratch than this say more of roundings than of computing.
LEAST_SCRATCH = 4_000_000
# What lies outside is no correction of a sum but a sign that something else was measured.
SMALLEST, LARGEST = 0.25, 4.0


@dataclass(frozen=True)
class MeasuredRates:
    """Of one model family: seconds a layer however small it is; bytes a second of weights, and of keys and values, that
    decoding reaches; operations a second (two a multiplication) of a prompt's products.
    """

    layer_seconds: float
    weights: float
    keys_values: float
    products: float | None = None


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


@dataclass(frozen=True)
class Timed:
    """One run of a small model of so many layers: seconds of a decoded token that reads these bytes. prefill: operations a
    second of its prompt, without what attention took; None where it was too short to say.
    """

    family: str
    layers: int
    weight_bytes: float
    kv_bytes: float
    seconds: float
    prefill: float | None = None


def rates_from(rows: Iterable[Timed]) -> dict[str, MeasuredRates]:
    """Family -> the three terms that explain its runs best: least squares of the relative error, none of them negative.

    A family with less than two runs has none. Where keys and values were too few to be seen they stream like weights.
    """
    families: dict[str, list[Timed]] = {}
    for row in rows:
        if math.isfinite(row.seconds) and row.seconds > 0:
            families.setdefault(row.family, []).append(row)
    found = {}
    for family, each in families.items():
        terms = np.array([[row.layers, row.weight_bytes, row.kv_bytes] for row in each], float)
        terms /= np.array([row.seconds for row in each])[:, None]
        solved = None if len(each) < 2 else _without_negatives(terms)
        if solved is None or solved[1] <= 0:
            continue
        products = [row.prefill for row in each if row.prefill is not None and row.prefill > 0]
        found[family] = MeasuredRates(
            float(solved[0]), 1 / float(solved[1]), 1 / float(solved[2] or solved[1]), max(products, default=None)
        )
    return found


def _without_negatives(terms: np.ndarray) -> np.ndarray | None:
    """x of `terms @ x = 1` with the least squared error and nothing below 0, by trying which of its parts are 0."""
    best, least = None, math.inf
    size = np.maximum(np.abs(terms).max(axis=0), 1e-300)  # columns of one size: seconds and bytes are far apart
    for kept in ([0, 1, 2], [0, 1], [1, 2], [1]):
        if len(kept) > len(terms):
            continue
        solved = np.zeros(3)
        solved[kept] = np.linalg.lstsq(terms[:, kept] / size[kept], np.ones(len(terms)), rcond=None)[0] / size[kept]
        error = float(np.square(terms @ solved - 1).sum())
        if (solved >= 0).all() and error < least - 1e-12:
            best, least = solved, error
    return best


def speed_values(rates: Mapping[str, MeasuredRates], disk: float | None, machine: Machine, date: str) -> dict[str, Any]:
    """What is kept of speed."""
    return {
        "backend": machine.backend, "machine": machine.name, "date": date, "disk": disk,
        "rates": {family: asdict(each) for family, each in rates.items()},
    }  # fmt: skip


def calibrated(machine: Machine) -> Machine:
    """The machine with what was measured here, if anything was: memory's corrections on a Mac for any other Mac as well,
    speeds for this one alone.
    """
    calibration = _stored_memory(machine)
    values = load_stored(SPEED_SUBJECT)
    if values.get("backend") == machine.backend and values.get("machine") == machine.name:
        rates, read = _stored_rates(values.get("rates")), cast(Any, values.get("disk"))
        disk = float(read) if _is_rate(read) else None
        calibration = replace(
            calibration or Calibration({}),
            rates=rates,
            disk=disk,
            machine=machine.name,
            speed_date=str(values.get("date", "")),
        )
        if disk is not None:
            machine = replace(machine, ssd=(disk, disk))
    return machine if calibration is None else replace(machine, calibration=calibration)


def _stored_memory(machine: Machine) -> Calibration | None:
    values = load_stored(SUBJECT)
    if values.get("backend") != machine.backend:
        return None
    scratch, process = values.get("scratch"), values.get("process_bytes")
    if not isinstance(scratch, dict) or not all(_is_factor(each) for each in scratch.values()):
        return None
    process_bytes = process if isinstance(process, int) and 0 < process < 2**40 else None
    return Calibration(scratch, process_bytes, str(values.get("date", "")))


def _stored_rates(values: Any) -> dict[str, MeasuredRates]:
    """Those of a file that can be; what somebody wrote into it by hand may be anything."""
    found = {}
    for family, each in values.items() if isinstance(values, dict) else ():
        if not isinstance(each, dict):
            continue
        names = ("layer_seconds", "weights", "keys_values", "products")
        layer, weights, cached, products = (cast(Any, each.get(name)) for name in names)
        if _is_number(layer) and 0 <= layer < 1 and _is_rate(weights) and _is_rate(cached):
            found[family] = MeasuredRates(layer, weights, cached, products if _is_rate(products) else None)
    return found


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 1e3 <= value <= 1e18


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_factor(value: Any) -> bool:
    return _is_number(value) and SMALLEST <= value <= LARGEST
