"""Which experts of a layer are in memory, and which has to go when another one comes: decisions in plain Python.

`experts/residency.py` acts on them; `benchmarks/measurements/routing.py` replays recorded routing through the same classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol


class Policy(Protocol):
    """Decides which resident expert to evict. Experts are numbers."""

    def use(self, expert: int) -> None:
        """`expert` is resident and has just been used."""

    def victim(self, candidates: Collection[int]) -> int:
        """Which of these resident experts to evict: there is one, and of some it may never have been told."""


class LeastRecentlyUsed:
    """Evicts the expert whose last use is longest ago: the best of the simple policies on public traces of gpt-oss."""

    def __init__(self) -> None:
        self._num_uses = 0
        self._last_use: dict[int, int] = {}

    def use(self, expert: int) -> None:
        self._num_uses += 1
        self._last_use[expert] = self._num_uses

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda expert: self._last_use.get(expert, 0))


PolicyFactory = Callable[[], Policy]


class SlotTable:
    """One layer's slots: expert -> slot for what is there.

    An expert that has to be read is `place`d first, which says in what slot, and is resident only once it has `arrived`: so
    nothing half-read is ever named in `slot_of`. A slot that is not named there is free. Nothing else is kept, so that there
    is nothing that an interruption could leave half done.
    """

    def __init__(self, num_slots: int, policy: PolicyFactory = LeastRecentlyUsed) -> None:
        self.num_slots = num_slots
        self.slot_of: dict[int, int] = {}
        self.evictions = 0
        self._policy = policy()

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Those of `wanted` that are not resident, each once, in their order."""
        return [expert for expert in dict.fromkeys(wanted) if expert not in self.slot_of]

    def use(self, wanted: Sequence[int]) -> None:
        """Note that all of `wanted` that are resident are used now, in this order."""
        for expert in wanted:
            if expert in self.slot_of:
                self._policy.use(expert)

    def place(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """(expert, slot) for each of `wanted` that is missing. Evicts others where needed, none of `wanted` ever.

        What was placed before and has not arrived has lost its slot.
        """
        missing, kept = self.missing(wanted), set(wanted)
        assert len(kept) <= self.num_slots, f"{len(kept)} experts at once in {self.num_slots} slots"
        free = sorted(set(range(self.num_slots)) - set(self.slot_of.values()))
        while len(free) < len(missing):
            victim = self._policy.victim([expert for expert in self.slot_of if expert not in kept])
            free.append(self.slot_of.pop(victim))
            self.evictions += 1
        return list(zip(missing, free, strict=False))

    def arrived(self, placed: Sequence[tuple[int, int]]) -> None:
        """What was placed is in its slots now, and used."""
        for expert, slot in placed:
            self.slot_of[expert] = slot
            self._policy.use(expert)


def blocks_of(wanted: Sequence[int], table: SlotTable) -> list[list[int]]:
    """`wanted` (each once, the one used last at the end) in blocks of which two fit into the slots.

    One block can be read while the one before it is computed. What is resident already comes first, so that none of it is
    evicted before it was used and then read again: each expert is read at most once. The last block is what the last tokens
    used, which the next ones likely want.
    """
    resident = [expert for expert in wanted if expert in table.slot_of]
    missing = [expert for expert in wanted if expert not in table.slot_of]
    size = max(1, table.num_slots // 2) if len(wanted) > table.num_slots else table.num_slots
    return [*_cut(resident, size), *_cut(missing, size)]


def _cut(experts: list[int], size: int) -> list[list[int]]:
    """In pieces of `size`; a short one comes first, so that the last one is whole."""
    return [experts[max(0, stop - size) : stop] for stop in range(len(experts) % size or size, len(experts) + 1, size)]


def by_last_use(experts: Sequence[int]) -> list[int]:
    """Each expert of a sequence of routes once, in the order of its last appearance."""
    return list(dict.fromkeys(reversed(experts)))[::-1]


def rounds_of(routes: Sequence[int], table: SlotTable, is_grouped: bool) -> list[list[int]]:
    """The experts of a call's routes, each once, in rounds that are served one after the other.

    All in one round where they fit; `is_grouped` says that the routes are many and go by expert in any case.
    """
    wanted = list(dict.fromkeys(routes))
    if len(wanted) <= table.num_slots and not is_grouped:
        return [wanted]
    return blocks_of(by_last_use(routes), table)
