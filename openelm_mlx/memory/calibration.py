"""Calibration: measured memory and speed of this machine, used by all later plans.

Memory is a correction of the scratch memory that shapes predict (memory/scratch.py); speed has three terms
(memory/rates.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from .machine import Machine
from .measured import Calibration, MeasuredRates
from .stored import load_stored, store

# One file has both: memory, and `speed`. Older files have no version and no speed.
SUBJECT, SPEED = "memory", "speed"
VERSION = 2
# Rows with less scratch memory than this show rounding rather than computing.
LEAST_SCRATCH = 4_000_000
# A correction outside this range means that something else was measured.
SMALLEST, LARGEST = 0.25, 4.0
# If rounds of one run differ by more than this, or the terms miss a run by more, the machine did other work.
WIDEST_SPREAD, LARGEST_ERROR = 0.25, 0.35
# No model of these sizes has reached 0.9 of a chip's bandwidth; only caches are faster.
MOST_OF_BANDWIDTH = 1.2


class Measured(Protocol):
    """One run: the planned scratch bytes, and by how much MLX's peak exceeded the whole plan."""

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
    """The correction with which none of these runs would have exceeded its plan."""
    factors: dict[str, float] = {}
    process = []
    for row in rows:
        if row.peak_process > row.peak:
            process.append(row.peak_process - row.peak)
        if row.scratch >= LEAST_SCRATCH:
            factor = (row.peak - row.planned + row.scratch) / row.scratch
            factors[row.family] = max(factors.get(row.family, SMALLEST), min(factor, LARGEST))
    # Rounded up to a hundredth: a plan that is a little too large is harmless, one that is too small is not.
    rounded = {family: math.ceil(100 * factor) / 100 for family, factor in factors.items()}
    return Calibration(rounded, max(process) if process else None, date)


@dataclass(frozen=True)
class Timed:
    """One run of a small model: layers, seconds of a decoded token, and the bytes that it reads. prefill: operations a second
    of its prompt, without attention; None if it was too short. spread: the interquartile range of its rounds, as a share of
    their median.
    """

    family: str
    layers: int
    weight_bytes: float
    kv_bytes: float
    seconds: float
    prefill: float | None = None
    spread: float = 0.0


def spread_of(rounds: Sequence[float]) -> float:
    """The interquartile range of some times, as a share of their median; 0 for fewer than two."""
    if len(rounds) < 2:
        return 0.0
    low, middle, high = np.quantile(np.array(rounds, float), [0.25, 0.5, 0.75])
    return float((high - low) / middle) if middle > 0 else math.inf


def checked_rates(
    rows: Iterable[Timed], bandwidth: float | None = None
) -> tuple[dict[str, MeasuredRates], dict[str, str]]:
    """`rates_from` for the families with credible runs; and for the others the reason, as a clause.

    bandwidth: of the machine, bytes a second, if known.
    """
    rows = list(rows)
    rates, reasons = rates_from(rows), {}
    for family in dict.fromkeys(row.family for row in rows):
        spread = max(row.spread for row in rows if row.family == family)
        found = rates.get(family)
        if not spread <= WIDEST_SPREAD:
            reasons[family] = f"rounds of one run differ by {100 * spread:.0f} %: other work runs on this machine"
        elif found is None:
            reasons[family] = "the weights do not explain the time of its runs"
        elif not found.error <= LARGEST_ERROR:
            reasons[family] = f"its terms miss a run by {100 * found.error:.0f} %: other work may have run meanwhile"
        elif bandwidth is not None and found.weights > MOST_OF_BANDWIDTH * bandwidth:
            reasons[family] = (
                f"weights seemed to stream at {found.weights / 1e9:,.0f} GB/s, and the chip has {bandwidth / 1e9:,.0f}"
            )
    return {family: each for family, each in rates.items() if family not in reasons}, reasons


def rates_from(rows: Iterable[Timed]) -> dict[str, MeasuredRates]:
    """Family -> the three terms that fit its runs best: least squares of the relative error, none of them negative.

    A family with fewer than two runs has none. If the time for keys and values is too short to measure, they count as weights.
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
            float(solved[0]), 1 / float(solved[1]), 1 / float(solved[2] or solved[1]), max(products, default=None),
            float(np.abs(terms @ solved - 1).max()),
        )  # fmt: skip
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


def store_memory(calibration: Calibration, machine: Machine) -> Path:
    """Store the measured memory, keep the stored speed, and return the file. Raises DestinationError."""
    return _store(machine, calibration.as_dict())


def store_speed(rates: Mapping[str, MeasuredRates], disk: float | None, machine: Machine, date: str) -> Path:
    """Store the measured speed, keep the stored memory, and return the file. Raises DestinationError.

    A family, or the disk, that was not measured this time keeps its stored speed.
    """
    before = _kept(machine).get(SPEED)
    known = before if isinstance(before, dict) and before.get("machine") == machine.name else {}
    kept_rates, kept_disk = _stored_rates(known.get("rates")), known.get("disk")
    values = {
        "machine": machine.name, "date": date, "disk": kept_disk if disk is None else disk,
        "rates": {family: asdict(each) for family, each in {**kept_rates, **rates}.items()},
    }  # fmt: skip
    return _store(machine, {SPEED: values})


def _store(machine: Machine, values: Mapping[str, Any]) -> Path:
    return store(SUBJECT, {**_kept(machine), "version": VERSION, "backend": machine.backend, **values})


def _kept(machine: Machine) -> dict[str, Any]:
    values = load_stored(SUBJECT)
    return values if values.get("backend") == machine.backend else {}


def calibrated(machine: Machine) -> Machine:
    """The machine with measured values, if there are any: memory corrections of a Mac apply to any other Mac as well, speeds
    only to this one.
    """
    kept = _kept(machine)
    calibration = _stored_memory(kept)
    values = kept.get(SPEED)
    if isinstance(values, dict) and values.get("machine") == machine.name:
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


def _stored_memory(values: Mapping[str, Any]) -> Calibration | None:
    scratch, process = values.get("scratch"), values.get("process_bytes")
    if not isinstance(scratch, dict) or not all(_is_factor(each) for each in scratch.values()):
        return None
    process_bytes = process if isinstance(process, int) and 0 < process < 2**40 else None
    return Calibration(scratch, process_bytes, str(values.get("date", "")))


def _stored_rates(values: Any) -> dict[str, MeasuredRates]:
    """The valid rates in a file, which a user may have edited."""
    found = {}
    for family, each in values.items() if isinstance(values, dict) else ():
        if not isinstance(family, str) or not isinstance(each, dict):
            continue
        names = ("layer_seconds", "weights", "keys_values", "products")
        layer, weights, cached, products = (cast(Any, each.get(name)) for name in names)
        if _is_number(layer) and 0 <= layer < 1 and _is_rate(weights) and _is_rate(cached):
            error = cast(Any, each.get("error"))
            found[family] = MeasuredRates(
                layer, weights, cached, products if _is_rate(products) else None, error if _is_error(error) else 0.0
            )
    return found


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 1e3 <= value <= 1e18


def _is_error(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_factor(value: Any) -> bool:
    return _is_number(value) and SMALLEST <= value <= LARGEST
