"""How many layers each of several machines gets: the fastest is filled first. Pure arithmetic, no arrays.

A token goes through one machine after the other, so that its time is a sum, and a layer costs least where it is computed
fastest; only memory makes it lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Of two equally fast machines the earlier one is filled first.
_LATER_IS_SLOWER = 1e-9


@dataclass(frozen=True)
class Room:
    """One machine: bytes that it has for layers with their keys and values, and seconds of a layer and of its bytes."""

    nbytes: int
    seconds_per_layer: float = 0.0
    seconds_per_byte: float = 1e-11


def split_layers(layers: Sequence[int], kept: int, rooms: Sequence[Room]) -> tuple[int, ...] | None:
    """The number of layers on each machine by which a token takes least; None where they do not fit.

    layers: bytes of each, keys and values included; they may be uneven. kept: bytes that the first machine has besides
    (embedding and head). Every machine gets a layer at least, and successive ones.
    """
    sums, count = [0, *accumulate(layers)], len(layers)
    unknown = float("inf")
    # seconds[stop]: the least for the first `stop` layers on the machines so far, and where the last one begins.
    seconds, begins = [0.0, *[unknown] * count], []
    for place, room in enumerate(rooms):
        found, begin = [unknown] * (count + 1), [0] * (count + 1)
        extra = kept if place == 0 else 0
        for stop in range(1, count + 1):
            for start in range(stop):
                nbytes = sums[stop] - sums[start] + extra
                if nbytes > room.nbytes or seconds[start] == unknown:
                    continue
                took = (stop - start) * room.seconds_per_layer + nbytes * room.seconds_per_byte
                total = seconds[start] + took * (1 + place * _LATER_IS_SLOWER)
                if total < found[stop]:
                    found[stop], begin[stop] = total, start
        seconds = found
        begins.append(begin)
    if seconds[count] == unknown:
        return None
    counts, stop = [], count
    for begin in reversed(begins):
        counts.append(stop - begin[stop])
        stop = begin[stop]
    return tuple(reversed(counts))


def split_evenly(layers: Sequence[int], kept: int, rooms: Sequence[Room]) -> tuple[int, ...]:
    """A number of layers for each machine by the bytes that it has, where all together have too few."""
    total, have = sum(layers) + kept, sum(max(1, room.nbytes) for room in rooms)
    counts: list[int] = []
    at, used, due = 0, kept, 0.0
    for place, room in enumerate(rooms):
        later = len(rooms) - place - 1
        due += total * max(1, room.nbytes) / have
        start = at
        while at < len(layers) - later and (at == start or later == 0 or used + layers[at] / 2 <= due):
            used += layers[at]
            at += 1
        counts.append(at - start)
    return tuple(counts)


def missing_bytes(layers: Sequence[int], kept: int, rooms: Sequence[Room]) -> int:
    """How much more memory it would take at least."""
    return max(0, sum(layers) + kept - sum(max(0, room.nbytes) for room in rooms))
