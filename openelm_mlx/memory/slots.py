"""Which experts of a layer are in memory, and which has to go when another one comes: decisions in plain Python.

`memory/residency.py` acts on them; `bench/routing.py` replays recorded routing through the very same classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol


class Policy(Protocol):
    """Decides which resident expert to evict. Experts are numbers; only resident ones are known to it."""

    def use(self, expert: int) -> None:
        """`expert` is resident and has just been used."""

    def forget(self, expert: int) -> None:
        """`expert` is resident no longer."""

    def victim(self, kept: Collection[int]) -> int:
        """The resident expert to evict, none of `kept`; there is one."""


class LeastRecentlyUsed:
    """Evicts the expert whose last use is longest ago: the best of the simple policies on public traces of gpt-oss."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def use(self, expert: int) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert)

    def forget(self, expert: int) -> None:
        del self._order[expert]

    def victim(self, kept: Collection[int]) -> int:
        return next(expert for expert in self._order if expert not in kept)


PolicyFactory = Callable[[], Policy]


class SlotTable:
    """One layer's slots: expert -> slot for what is there.

    An expert that has to be read is `place`d first, which takes a slot for it, and is resident only once it has
    `arrived`; when its read failed, `release` gives the slot back. So nothing half-read is ever named in `slot_of`.
    """

    def __init__(self, num_slots: int, policy: PolicyFactory = LeastRecentlyUsed) -> None:
        self.num_slots = num_slots
        self.slot_of: dict[int, int] = {}
        self.evictions = 0
        self._policy = policy()
        self._free = list(range(num_slots - 1, -1, -1))

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Those of `wanted` that are not resident, each once, in their order."""
        return [expert for expert in dict.fromkeys(wanted) if expert not in self.slot_of]

    def use(self, wanted: Sequence[int]) -> None:
        """Note that all of `wanted` that are resident are used now, in this order."""
        for expert in wanted:
            if expert in self.slot_of:
                self._policy.use(expert)

    def place(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """(expert, slot) for each of `wanted` that is missing. Evicts others where needed, none of `wanted` ever."""
        missing = self.missing(wanted)
        kept = set(wanted)
        assert len(kept) <= self.num_slots, f"{len(kept)} experts at once in {self.num_slots} slots"
        while len(self._free) < len(missing):
            victim = self._policy.victim(kept)
            self._policy.forget(victim)
            self._free.append(self.slot_of.pop(victim))
            self.evictions += 1
        return [(expert, self._free.pop()) for expert in missing]

    def arrived(self, placed: Sequence[tuple[int, int]]) -> None:
        """What was placed is in its slots now, and used."""
        for expert, slot in placed:
            self.slot_of[expert] = slot
            self._policy.use(expert)

    def release(self, placed: Sequence[tuple[int, int]]) -> None:
        """What was placed did not arrive: its slots are free."""
        self._free.extend(slot for _, slot in placed)


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
