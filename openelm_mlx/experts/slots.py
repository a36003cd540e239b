"""Which experts of a layer are resident, and which one is evicted for another: decisions in plain Python.

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
        """Which of these resident experts to evict. There is at least one; some may never have been passed to `use`."""


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
    """One layer's slots: expert -> slot of the resident experts.

    An expert that has to be read is first `place`d, which gives its slot, and is resident only once it has `arrived`, so
    `slot_of` never has a half-read expert. A slot that is not in it is free. There is no other state that an interruption
    could leave inconsistent.
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
        """Note that the resident ones of `wanted` are used now, in this order."""
        for expert in wanted:
            if expert in self.slot_of:
                self._policy.use(expert)

    def place(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """(expert, slot) for each of `wanted` that is missing. Evicts other experts if needed, never one of `wanted`.

        Experts that were placed before and have not arrived lose their slots.
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
        """Note that the placed experts are in their slots now, and used."""
        for expert, slot in placed:
            self.slot_of[expert] = slot
            self._policy.use(expert)


def blocks_of(wanted: Sequence[int], table: SlotTable) -> list[list[int]]:
    """`wanted` (each once, the last used at the end) in blocks of which two fit into the slots.

    One block can be read while the previous one is computed. Resident experts come first, so that none is evicted before it
    is used and then read again: each expert is read at most once. The last block has the experts of the last tokens, which
    the next tokens are likely to need.
    """
    resident = [expert for expert in wanted if expert in table.slot_of]
    missing = [expert for expert in wanted if expert not in table.slot_of]
    size = max(1, table.num_slots // 2) if len(wanted) > table.num_slots else table.num_slots
    return [*_cut(resident, size), *_cut(missing, size)]


def _cut(experts: list[int], size: int) -> list[list[int]]:
    """Blocks of `size`; a shorter one comes first, so that the last one is full."""
    return [experts[max(0, stop - size) : stop] for stop in range(len(experts) % size or size, len(experts) + 1, size)]


def by_last_use(experts: Sequence[int]) -> list[int]:
    """Each expert of a sequence of routes once, in the order of its last appearance."""
    return list(dict.fromkeys(reversed(experts)))[::-1]


def rounds_of(routes: Sequence[int], table: SlotTable, is_grouped: bool) -> list[list[int]]:
    """The experts of a call's routes, each once, in rounds that are computed one after the other.

    One round if all fit; is_grouped: the routes are many and grouped by expert in any case.
    """
    wanted = list(dict.fromkeys(routes))
    if len(wanted) <= table.num_slots and not is_grouped:
        return [wanted]
    return blocks_of(by_last_use(routes), table)
