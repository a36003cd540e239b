"""Streamed experts: each layer has a fixed number of slots, filled from the checkpoint's files when needed.

Each layer has one array per tensor (packed words and scales of gate_up and of down), whose first axis is the slots. The
arrays are allocated once; several threads read an expert straight into its slot, through a NumPy view of the array's own
memory. Kernels get slot numbers where a resident model passes expert numbers. Router, attention and the experts' biases
are in memory as usual.

Why a slot is never overwritten under a kernel that reads it
------------------------------------------------------------
MLX is lazy and does not track memory that is written from outside, so the order of reads by kernels and writes by threads
must be ensured here. Five rules do it:

1. Kernels read a bank only through `feed_forward`. When a thread releases the bank, every result that is not computed yet
   has been dispatched, and is noted as a pending read with the slots it may read. Results of one bank's calls do not depend
   on each other: a chunk's router does not wait for the experts of the previous chunk in the same layer. So a result counts
   as computed only if it, or a value computed from it, has arrived.
2. Before slots are overwritten, `fence` evaluates all pending reads of any of them, which waits for their kernels. The
   slot table is overwritten only after every pending read that uses it.
3. Between `begin` and `finish` threads write into the slots. A graph built on them in between must not be evaluated before
   `finish`; the writing threads are always waited for, whatever happens (`Reading`). Where an array is not written in place,
   `begin` does everything.
4. A slot with an expert that the current call needs is never evicted (`SlotTable.place`), and an expert counts as resident
   only when all its bytes have arrived. An error or an interruption before that leaves the slot free, once no thread writes
   into it.
5. Only one thread at a time uses a model's banks: a plain lock, held in the working frame (a context manager's own frame
   could keep it after an interruption). Whatever a thread had built when it was interrupted is never used.
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
# At most this many pending reads of a layer; with one more, all are waited for.
MOST_PENDING = 16


class Stored(NamedTuple):
    """One tensor of a layer's experts in its file: expert e is `nbytes` bytes from `start + e * nbytes`."""

    name: str
    file: RecordFile
    start: int
    nbytes: int


class Part:
    """One array of a bank, (S, rows, columns) with S slots, and how an expert's bytes are read into a slot.

    There may be more rows than an expert has: its bytes then fill the first ones.
    """

    def __init__(self, stored: Stored, memory: WritableArray) -> None:
        self.stored, self.memory = stored, memory

    @property
    def array(self) -> mx.array:
        return self.memory.array

    def record(self, expert: int, slot: int) -> Record:
        """The record that reads an expert into a slot."""
        stored = self.stored
        check = partial(_check_scales, expert, stored) if stored.name.endswith("scales") else None
        return Record(
            stored.file, stored.start + expert * stored.nbytes, self.memory.target(slot, stored.nbytes, check)
        )


def _check_scales(expert: int, stored: Stored, scales: memoryview) -> None:
    """Raise CheckpointError for scales that are NaN, which a resident model finds when it is loaded."""
    if np.frombuffer(scales, np.uint8).max() == NOT_A_SCALE:
        raise CheckpointError(
            f"The scales of expert {expert} in {stored.name} have a byte of 255, which means NaN: "
            f"{stored.file.path} is damaged; download or copy it again."
        )


class PendingRead(NamedTuple):
    """A result that is computed from these slots; None: from any slots in the table."""

    result: mx.array
    slots: frozenset[int] | None


NOTHING_COMING: tuple[list[tuple[int, int]], Reading, Sequence[int]] = ([], Reading(), ())


class ExpertBank:
    """The slots of one layer: which experts are resident, and reading the others."""

    def __init__(
        self, parts: Sequence[Part], table: SlotTable, num_experts: int, reader: RecordReader, allocator: Allocator
    ) -> None:
        self.parts, self.table, self.num_experts = parts, table, num_experts
        self.statistics = LayerStatistics()
        self._read = reader
        self._readers: list[PendingRead] = []
        # Expert -> slot for kernels, (1, E): an arbitrary slot for an expert that is not resident.
        self._on_device = allocator.allocate((1, num_experts), mx.uint32)
        self._in_place = self._on_device.in_place and all(part.memory.in_place for part in parts)
        # Between `begin` and `finish`: (expert, slot) of each read, the reads, and all wanted experts.
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
        """Make all of `wanted` resident (each once, at most as many as there are slots), and count hits and misses."""
        self.begin(wanted)
        self.finish()

    def begin(self, wanted: Sequence[int]) -> None:
        """Begin to make all of `wanted` resident; `finish` has to be called before the bank is used again."""
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
        """Wait for the reads; then everything wanted is resident. Raises their first error, and the bank stays usable."""
        placed, reading, wanted = self._coming
        if not placed:
            return
        try:
            slots = self.slots(np.arange(self.num_experts))
            for expert, slot in placed:
                slots[expert] = slot
            with self._waiting():
                reading.finish()
                # No pending read uses the table: all were waited for before the first slot was overwritten.
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
        """Cancel the reads and wait for running ones; their experts do not become resident. Does nothing after `finish`."""
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
        """(E,) uint32: the slot of each expert at the time of evaluation, and an arbitrary slot for one that is not resident
        then.
        """
        return self._on_device.array.reshape(-1)

    def note(self, result: mx.array, slots: Collection[int] | None = None) -> None:
        """Note a pending read: the dispatched `result` reads these slots as they are now; None: any slots in the table."""
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
