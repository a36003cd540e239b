"""Experts that are not all in memory: a fixed number of slots a layer, filled from the checkpoint's files when needed.

Each layer has one array a tensor (packed words and scales of gate_up and of down) with a slot for an expert along its
first axis. The arrays are made once and stay; an expert is read straight into its slot, through a NumPy view of the
array's own memory, by several threads. Kernels are given slot numbers where a resident model gives expert numbers.
Router, attention and the experts' biases are in memory as ever.

Why a slot is never overwritten under a kernel that reads it
------------------------------------------------------------
MLX is lazy and keeps no watch over memory that is written from outside, so the order of reads by kernels and writes by
threads is ours to keep. Five rules do it:

1. Kernels read a bank through `feed_forward` alone. Every result of it that is still to be computed when the thread lets go
   of the bank is dispatched by then, and noted as a reader, with the slots it may read. Results of one bank's calls do not
   depend on each other: a chunk's router does not wait for the experts of the chunk before in the same layer. So nothing is
   inferred from other values having arrived, but from those that were computed from the result itself.
2. Before slots are overwritten, `fence` evaluates all noted readers that may read one of them, which ends when their
   kernels have ended. The table of slots is overwritten only after all who look slots up in it.
3. Between `begin` and `finish` threads write into the slots. Whoever builds a graph on them in between evaluates nothing of
   it before `finish`; and writers are joined however that ends (`Reading`). Where an array is not written in place,
   `begin` does all of it.
4. A slot that holds an expert of the call that is being served is never chosen for another one (`SlotTable.place`), and
   a slot is named resident only when all its bytes have come. An error or an interruption before that leaves it free, once
   nobody writes into it any more.
5. One thread at a time is at a model's banks: a plain lock, held in the frame that works (a context manager's own frame
   could keep it after an interruption). Of what a thread had built when it was interrupted nobody sees a result.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoint.quantize import NOT_A_SCALE
from ..errors import CheckpointError
from .records import Reading, Record, RecordFile, RecordReader, fill_with
from .slots import SlotTable
from .statistics import LayerStatistics
from .writable import Allocator, WritableArray

Lock = Any  # threading.RLock(), which has no type of its own
PROJECTIONS = ("gate_up_proj", "down_proj")
PARTS = ("weight", "scales")
# Results of a layer that wait for a fence; with one more, all are waited for.
MOST_PENDING = 16


class Stored(NamedTuple):
    """One tensor of a layer's experts in its file: expert e is `nbytes` bytes from `start + e * nbytes`."""

    name: str
    file: RecordFile
    start: int
    nbytes: int


class Part:
    """One array of a bank, (S, rows, columns) with S slots, and how an expert's bytes come into a slot of it.

    rows may be more than an expert has: its bytes then fill the first of them.
    """

    def __init__(self, stored: Stored, memory: WritableArray) -> None:
        self.stored, self.memory = stored, memory

    @property
    def array(self) -> mx.array:
        return self.memory.array

    def record(self, expert: int, slot: int) -> Record:
        """What brings an expert into a slot."""
        stored = self.stored
        check = partial(_check_scales, expert, stored) if stored.name.endswith("scales") else None
        return Record(
            stored.file, stored.start + expert * stored.nbytes, self.memory.target(slot, stored.nbytes, check)
        )


def _check_scales(expert: int, stored: Stored, scales: memoryview) -> None:
    """A resident model refuses scales that stand for no number when it is loaded; here they are seen when read."""
    if np.frombuffer(scales, np.uint8).max() == NOT_A_SCALE:
        raise CheckpointError(
            f"The scales of expert {expert} in {stored.name} have a byte of 255, which stands for no number (NaN): "
            f"{stored.file.path} is damaged; download or copy it again."
        )


class PendingRead(NamedTuple):
    """A result that is computed from slots: those of `slots`, or None for any that the table says."""

    result: mx.array
    slots: frozenset[int] | None


NOTHING_COMING: tuple[list[tuple[int, int]], Reading, Sequence[int]] = ([], Reading(), ())


class ExpertBank:
    """The slots of one layer: which experts are in them, and how the others get there."""

    def __init__(
        self, parts: Sequence[Part], table: SlotTable, num_experts: int, reader: RecordReader, allocator: Allocator
    ) -> None:
        self.parts, self.table, self.num_experts = parts, table, num_experts
        self.statistics = LayerStatistics()
        self._read = reader
        self._readers: list[PendingRead] = []
        # Expert -> slot as kernels look it up, (1, E): any slot for an expert that is not resident.
        self._on_device = allocator.allocate((1, num_experts), mx.uint32)
        self._in_place = self._on_device.in_place and all(part.memory.in_place for part in parts)
        # What is under way between `begin` and `finish`: (expert, slot), the reads, and all that was wanted.
        self._coming: tuple[list[tuple[int, int]], Reading, Sequence[int]] = NOTHING_COMING

    @property
    def num_slots(self) -> int:
        return self.table.num_slots

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return sum(part.array.nbytes for part in self.parts)

    def has(self, wanted: Sequence[int]) -> bool:
        """Whether all of `wanted` are resident."""
        return all(expert in self.table.slot_of for expert in wanted)

    def require(self, wanted: Sequence[int]) -> None:
        """Have all of `wanted` (each once, at most as many as there are slots) resident, and count it."""
        self.begin(wanted)
        self.finish()

    def begin(self, wanted: Sequence[int]) -> None:
        """Begin to have all of `wanted` resident; `finish` has to be called before anything else is asked of the bank."""
        self.abandon()  # what an interruption may have left
        placed = self.table.place(wanted)
        self.statistics.hits += len(wanted) - len(placed)
        self.statistics.misses += len(placed)
        self.statistics.evictions = self.table.evictions
        if not placed:
            self.table.use(wanted)
            return
        try:
            self.fence({slot for _, slot in placed} if self._in_place else None)
            with self._waiting():
                if self._in_place:
                    reading = self._read.reading([part.record(*each) for each in placed for part in self.parts])
                    self._coming = placed, reading, wanted
                    reading.begin()
                else:
                    self._fetch_by_copies(placed)
                    self._coming = placed, Reading(), wanted
            if not self._in_place:
                self.finish()
        except BaseException:
            self.abandon()
            raise

    def finish(self) -> None:
        """All that `begin` was asked for is resident now. Raises what went wrong with the reads, and nothing is lost."""
        placed, reading, wanted = self._coming
        if not placed:
            return
        try:
            slots = self.slots(np.arange(self.num_experts))
            for expert, slot in placed:
                slots[expert] = slot
            with self._waiting():
                reading.finish()
                # Of those who look slots up none is left: they were waited for before the first slot was overwritten.
                fill_with(self._on_device.target(0), slots)
                self._on_device.settle(0)
                self._on_device.wait()
        except BaseException:
            self.abandon()
            raise
        self.table.arrived(placed)
        self.table.use(wanted)
        self.statistics.bytes_read += len(placed) * sum(part.stored.nbytes for part in self.parts)
        self._coming = NOTHING_COMING

    def abandon(self) -> None:
        """Nobody writes into the slots any more, and what was coming is not resident. Does nothing after `finish`."""
        placed, reading, _ = self._coming
        if placed:
            reading.abandon()
            self._on_device.wait()
        self._coming = NOTHING_COMING

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.statistics.seconds_waited += time.perf_counter() - started

    def slots(self, experts: np.ndarray) -> np.ndarray:
        """The slot of each of `experts`; 0 for one that is not resident. Any shape, uint32."""
        lookup = np.zeros(self.num_experts, np.uint32)
        for expert, slot in self.table.slot_of.items():
            lookup[expert] = slot
        return lookup[experts]

    def device_table(self) -> mx.array:
        """(E,) uint32: the slot of each expert when what is built on it is evaluated, and any slot for one that is not
        resident then.
        """
        return self._on_device.array.reshape(-1)

    def note(self, result: mx.array, slots: Collection[int] | None = None) -> None:
        """`result`, which has been dispatched, is computed from these slots as they are now, or from what the table gives."""
        self._readers.append(PendingRead(result, None if slots is None else frozenset(slots)))
        if len(self._readers) > MOST_PENDING:
            newest = self._readers.pop()
            self.fence()  # most have long been computed, and are only kept alive by this list
            self._readers.append(newest)

    def fence(self, slots: Collection[int] | None = None) -> None:
        """Wait for every kernel that may read one of `slots`, None: any slot."""
        waited: list[mx.array] = []
        others: list[PendingRead] = []
        for reader in self._readers:
            if slots is None or reader.slots is None or not reader.slots.isdisjoint(slots):
                waited.append(reader.result)
            else:
                others.append(reader)
        self._readers = others
        mx.eval(waited)

    def _fetch_by_copies(self, placed: Sequence[tuple[int, int]]) -> None:
        for expert, slot in placed:
            self._read.read([part.record(expert, slot) for part in self.parts])
            for part in self.parts:
                part.memory.settle(slot)
            mx.eval([part.array for part in self.parts])  # before the record is filled again
