"""Which way a few rows are fastest through gpt-oss's experts on this machine: checked for equality, then timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.precision import default_choices
from ..models.routing_ways import KERNEL, UNSORTED, WAYS, ExpertWays, way_for
from .expert_layer import (
    NEAR,
    LayerShape,
    by_way,
    distance,
    in_turns,
    outputs_of,
    passes_of,
    random_experts,
    random_rows,
)

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A way that is not the default has to be faster by this much.
MARGIN = 0.05
# Seconds for all numbers of rows; those that are not reached go as the last one did, or as the default says.
MOST_SECONDS = 12.0
_ROUNDS, _PASSES = 3, 4


@dataclass(frozen=True)
class WaysTiming:
    """The ways timed: (rows, way) -> seconds of a layer, the default table, and the one that was found.

    left_out: ways that do not compute the same here, or not at all, and why. kernel_rows: how many rows go by our own kernel
    (`KernelChoices.expert_kernel_rows`).
    """

    seconds: Mapping[tuple[int, str], float]
    default: ExpertWays
    winner: ExpertWays
    left_out: Mapping[str, str]
    kernel_rows: tuple[int, int] = (0, 0)
    name: str = "expert_ways"
    is_chosen: bool = True

    def line(self) -> str:
        """The timing for people: each number of rows, and what was taken."""
        parts = []
        for rows, found in itertools.groupby(self.seconds.items(), key=lambda each: each[0][0]):
            ways = ", ".join(f"{way} {1e6 * seconds:,.0f}" for (_, way), seconds in found)
            parts.append(f"{rows} rows: {ways}")
        reasons = "".join(f"; {way} is left out, because {why}" for way, why in self.left_out.items())
        kept = "as before" if self.winner == self.default else f"instead of {table_text(self.default)}"
        first, last = self.kernel_rows
        kernel = f", and the kernel for {first} to {last} rows" if last else ""
        return (
            f"{self.name}: us a layer of {'; '.join(parts)}{reasons}; takes {table_text(self.winner)}, {kept}{kernel}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": {f"{rows} rows, {way}": each for (rows, way), each in self.seconds.items()}}


def table_text(ways: ExpertWays) -> str:
    """A table for people."""
    return ", ".join(f"{way} from {first}" for first, way in ways)


def time_expert_ways(
    shape: LayerShape | None = None,
    rows: Sequence[int] = ROWS,
    seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> WaysTiming:
    """Time each way for so many rows of one layer. shape: gpt-oss-20b's, or a quarter of it where memory is short."""
    shape = fitting_shape() if shape is None else shape
    end, choices = clock() + seconds, default_choices()
    experts = random_experts(shape, choices.rows_in_a_tile)
    left_out = _left_out(experts, shape, max(each for each in rows if each <= 32))
    found: dict[tuple[int, str], float] = {}
    for number in rows:
        if clock() > end:
            break
        given, ways = random_rows(shape, number, _PASSES), {}
        for way in (*WAYS, KERNEL):
            if way in left_out or not by_way(experts, shape, way, number):
                continue
            call = passes_of(experts, given)
            try:
                call()
            except (RuntimeError, ValueError) as error:
                left_out[way] = _reason(error)
                found = {each: taken for each, taken in found.items() if each[1] != way}
            else:
                ways[way] = call
        found |= {(number, way): each / _PASSES for way, each in in_turns(ways, _ROUNDS).items()}
    del experts
    mx.clear_cache()
    of_tables = {each: taken for each, taken in found.items() if each[1] != KERNEL}
    table = table_of(of_tables, choices.expert_ways)
    kernel_rows = kernel_rows_of(found, table) if KERNEL not in left_out else (0, 0)
    return WaysTiming(found, choices.expert_ways, table, left_out, kernel_rows)


def fitting_shape(available_bytes: int | None = None) -> LayerShape:
    """gpt-oss-20b's layer, 0.4 GB; a quarter of it, with as many routes an expert, where there is little memory.

    available_bytes: what may be used; as this machine says if it is None.
    """
    from ..memory.machine import this_machine

    available = this_machine().available_bytes if available_bytes is None else available_bytes
    shape = LayerShape.of("20b")
    return shape if available >= 5 * shape.layer_bytes else shape.a_quarter()


def _left_out(experts: Any, shape: LayerShape, number: int) -> dict[str, str]:
    """The ways that are not the unsorted one's equal, or that raise."""
    found: dict[str, str] = {}
    given = random_rows(shape, number, 1)
    by_way(experts, shape, UNSORTED, number)
    known = outputs_of(experts, given)
    for way in (*WAYS[1:], KERNEL):
        if not by_way(experts, shape, way, number):
            continue
        try:
            off = distance(outputs_of(experts, given), known)
            if way == KERNEL:  # models of other types go by it too, and each type is a program of its own
                for dtype in (mx.float16, mx.float32):
                    off = max(off, distance(outputs_of(experts, given, dtype), known))
        except (RuntimeError, ValueError) as error:
            found[way] = _reason(error)
            continue
        if not off <= NEAR:
            found[way] = f"it is {off:.1e} off the unsorted one"
    return found


def kernel_rows_of(seconds: Mapping[tuple[int, str], float], table: ExpertWays) -> tuple[int, int]:
    """From and to how many rows the kernel is clearly faster than the table's way; (0, 0) where it never is."""
    first = last = 0
    for number, found in itertools.groupby(seconds.items(), key=lambda each: each[0][0]):
        ways = {way: each for (_, way), each in found}
        other = ways.get(
            way_for(number, 4, 32, table), min((each for way, each in ways.items() if way != KERNEL), default=0.0)
        )
        if KERNEL in ways and ways[KERNEL] < (1 - MARGIN) * other:
            first, last = first or number, number
        elif first:
            break
    return first, last


def _reason(error: Exception) -> str:
    return f"it ends with {type(error).__name__}: {error}"


def table_of(seconds: Mapping[tuple[int, str], float], default: ExpertWays) -> ExpertWays:
    """The table that the timings say. One row goes unsorted, where it does not go by the kernel; of ways alike fast, the
    default's is taken, and else that of fewer rows, so that noise makes no steps.
    """
    table: list[tuple[int, str]] = [(1, UNSORTED)]
    for number, found in itertools.groupby(seconds.items(), key=lambda each: each[0][0]):
        if number == 1:
            continue
        ways = {way: each for (_, way), each in found}
        fastest = min(ways, key=lambda way: ways[way])
        alike = [way for way, each in ways.items() if ways[fastest] >= (1 - MARGIN) * each]
        usual = way_for(number, 4, 32, default)
        way = usual if usual in alike else table[-1][1] if table[-1][1] in alike else fastest
        if way != table[-1][1]:
            table.append((number, way))
    last = max((number for number, _ in seconds), default=0)
    if not last:
        return default
    for first, way in default:  # of what was not timed nothing is known
        if first > last and way != table[-1][1]:
            table.append((first, way))
    return tuple(table)
