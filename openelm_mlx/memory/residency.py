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

import itertools
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..checkpoint.layouts import Contents
from ..checkpoint.quantize import NOT_A_SCALE, Quantization
from ..checkpoint.reader import Checkpoint, SafetensorsCheckpoint, TensorEntry
from ..errors import CheckpointError, SettingError
from ..models.gpt_oss import GptOss
from ..models.moe import SORT_FROM_ROUTES, TILE_FROM_ROWS, Experts, QuantizedExpertLinear, uses_tiles
from ..specs import ModelSpec
from .cuda_driver import MOST_RESULTS, ResultBuffer, cuda_driver, results_on_host
from .expert_statistics import ExpertStatistics, LayerStatistics
from .records import HostTarget, Reading, Record, RecordFile, RecordReader, fill_with
from .slots import LeastRecentlyUsed, PolicyFactory, SlotTable, rounds_of
from .written import Writes, Writing, Written

Lock = Any  # threading.RLock(), which has no type of its own
EMBEDDING = "model.embed_tokens.weight"
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

    def __init__(self, stored: Stored, memory: Written) -> None:
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


class Reader(NamedTuple):
    """A result that is computed from slots: those of `slots`, or None for any that the table says."""

    result: mx.array
    slots: frozenset[int] | None


NOTHING_COMING: tuple[list[tuple[int, int]], Reading, Sequence[int]] = ([], Reading(), ())


class ExpertBank:
    """The slots of one layer: which experts are in them, and how the others get there."""

    def __init__(
        self, parts: Sequence[Part], table: SlotTable, num_experts: int, reader: RecordReader, write: Writing
    ) -> None:
        self.parts, self.table, self.num_experts = parts, table, num_experts
        self.statistics = LayerStatistics()
        self._read = reader
        self._readers: list[Reader] = []
        # Expert -> slot as kernels look it up, (1, E): any slot for an expert that is not resident.
        self._on_device = write((1, num_experts), mx.uint32)
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
        self._readers.append(Reader(result, None if slots is None else frozenset(slots)))
        if len(self._readers) > MOST_PENDING:
            newest = self._readers.pop()
            self.fence()  # most have long been computed, and are only kept alive by this list
            self._readers.append(newest)

    def fence(self, slots: Collection[int] | None = None) -> None:
        """Wait for every kernel that may read one of `slots`, None: any slot."""
        waited: list[mx.array] = []
        others: list[Reader] = []
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


class StreamedExperts:
    """`RoutedExperts` over a bank: bit for bit what the resident `Experts` compute.

    experts: the layer's own arithmetic with the bank's arrays as weights.
    """

    def __init__(self, experts: Experts, bank: ExpertBank, lock: Lock, read_back: ReadBack) -> None:
        self.experts, self.bank = experts, bank
        self.on_choice: Any = None
        self._lock, self._read_back = lock, read_back

    def __call__(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        with self._lock:
            [chosen] = self._read_back([expert_indices])  # the host needs them to know what to read
            self.bank.statistics.read_backs += 1
            if self.on_choice is not None:
                self.on_choice(chosen)
            is_grouped = chosen.size >= SORT_FROM_ROUTES
            rounds = rounds_of(chosen.ravel().tolist(), self.bank.table, is_grouped)
            if is_grouped or len(rounds) > 1:
                return self._by_blocks(x, chosen, rounds)
            self.bank.require(rounds[0])
            outputs = self.compute_from_slots(x, expert_indices, self.bank.device_table())
            mx.async_eval(outputs)
            self.bank.note(outputs)
            return outputs

    def compute_from_slots(self, x: mx.array, expert_indices: mx.array, table: mx.array) -> mx.array:
        """The chosen experts' outputs from the slots that `table`, the bank's, gives: right if all are resident then."""
        return self.experts.feed_forward(x[..., None, :], expert_indices, table[expert_indices])

    def _by_blocks(self, x: mx.array, chosen: np.ndarray, blocks: list[list[int]]) -> mx.array:
        """Routes grouped by expert, experts taken in blocks that fit: each expert is read at most once.

        A row's result does not depend on which rows are computed with it, only on the kernel.
        """
        routes = chosen.ravel()
        rows = x.reshape(-1, x.shape[-1])
        tiles = uses_tiles(routes.size, self.bank.num_experts)
        pieces: list[mx.array] = []
        positions: list[np.ndarray] = []
        try:
            self.bank.begin(blocks[0])
            for block, following in itertools.zip_longest(blocks, blocks[1:]):
                self.bank.finish()
                mine = np.flatnonzero(np.isin(routes, block))
                slots = self.bank.slots(routes[mine])
                order = np.argsort(slots, kind="stable")
                mine, slots = mine[order], slots[order]
                pieces.append(self._block(rows, routes, mine, slots, tiles, chosen.shape[-1]))
                positions.append(mine)
                if following is not None:
                    # Read while this block is computed: the slots that change are those of blocks before it, if possible.
                    self.bank.begin(following)
        finally:
            self.bank.abandon()
        back = np.argsort(np.concatenate(positions)).astype(np.uint32)
        outputs = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return outputs[mx.array(back)].reshape(*chosen.shape, -1)

    def _block(
        self, rows: mx.array, routes: np.ndarray, mine: np.ndarray, slots: np.ndarray, tiles: bool, k: int
    ) -> mx.array:
        """The outputs (n, hidden_size) of the n routes `mine`, whose slots do not decrease; they are being computed."""
        count = len(mine)
        if tiles:
            # The bank has fewer experts than the model, and could be below the tiles' threshold where that is not.
            filler = max(0, max(SORT_FROM_ROUTES, TILE_FROM_ROWS * self.bank.num_slots) - count)
            mine = np.concatenate([mine, np.repeat(mine[-1:], filler)])
            slots = np.concatenate([slots, np.repeat(slots[-1:], filler)])
        inputs = rows[mx.array((mine // k).astype(np.uint32))]
        experts = mx.array(routes[mine].astype(np.uint32))
        outputs = self.experts.feed_forward(inputs, experts, mx.array(slots), sorted_slots=tiles)[:count]
        # One number that needs them all stands for them: what waits for a fence is kept in memory.
        mark = outputs[:1, :1] + 0
        mx.async_eval(outputs, mark)
        self.bank.note(mark, set(slots.tolist()))
        return outputs


class StreamedEmbedding:
    """An embedding table that stays on disk: the rows of the tokens at hand are read, (..., ) -> (..., hidden_size).

    The numbers are those of `nn.Embedding`, or of `nn.QuantizedEmbedding` where `packing` says how rows are packed.
    """

    def __init__(
        self,
        file: RecordFile,
        entry: TensorEntry,
        dtype: mx.Dtype,
        packing: Quantization | None,
        reader: RecordReader,
        lock: Lock,
    ) -> None:
        self._file, self._entry, self._dtype, self._packing, self._read = file, entry, dtype, packing, reader
        self._lock = lock
        self._row_bytes = entry.nbytes // entry.shape[0]

    def __call__(self, tokens: mx.array) -> mx.array:
        ids = np.array(tokens)  # waits for them: a streamed model is never a token ahead
        rows, where = np.unique(ids, return_inverse=True)
        data = np.empty((len(rows), self._row_bytes), np.uint8)
        with self._lock:  # experts are in the same files, which one reading at a time may open again
            self._read.read(
                [
                    Record(self._file, self._entry.start + int(row) * self._row_bytes, HostTarget(memoryview(data[i])))
                    for i, row in enumerate(rows)
                ]
            )
        table = mx.array(data).view(_STORED_TYPES[self._entry.dtype]).astype(self._dtype)
        if self._packing is not None:
            table = self._packing.dequantize(self._packing.quantize(table), self._dtype)
        if len(rows) == 1:
            return (
                mx.broadcast_to(table, (*ids.shape, table.shape[-1])) if ids.size > 1 else table.reshape(*ids.shape, -1)
            )
        return table[mx.array(where.reshape(ids.shape).astype(np.uint32))]


_STORED_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


class ReadBack:
    """Brings what routers chose to the host, and evaluates what that needs."""

    def __init__(self) -> None:
        driver = cuda_driver()
        self._buffer = None if driver is None else ResultBuffer(driver)

    def __call__(self, choices: Sequence[mx.array]) -> list[np.ndarray]:
        """Each of the choices, uint32, of any shapes."""
        if self._buffer is not None and sum(each.size for each in choices) <= MOST_RESULTS:
            return results_on_host(choices, self._buffer)
        mx.eval(choices)
        return [np.array(each) for each in choices]


@dataclass
class Residency:
    """What a model with streamed experts has more than another one: its layers' banks, files and threads.

    lock: to be held by who works with several layers, a chunk of a prompt or a step of an answer; each layer takes it anyway.
    pace: what the decode step has learned about misses, kept from one answer to the next.
    """

    layers: list[StreamedExperts]
    files: tuple[RecordFile, ...]
    reader: RecordReader
    writes: Writes
    lock: Lock
    read_back: ReadBack
    embedding_on_disk: bool = False
    pace: Any = None

    @property
    def banks(self) -> list[ExpertBank]:
        return [layer.bank for layer in self.layers]

    @property
    def num_slots(self) -> int:
        """Slots in each layer."""
        return self.layers[0].bank.num_slots

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(bank.nbytes for bank in self.banks)

    def statistics(self) -> ExpertStatistics:
        """What happened since loading, or since `reset_statistics`: of all answers from this model."""
        return ExpertStatistics.of(bank.statistics for bank in self.banks)

    def reset_statistics(self) -> None:
        """Count anew."""
        for bank in self.banks:
            bank.statistics = LayerStatistics()
            bank.table.evictions = 0


# --- loading ----------------------------------------------------------------------------------------------------------


def checked_slots(spec: ModelSpec, num_slots: int) -> int:
    """The number of slots a layer, checked. Raises SettingError for a model without experts, or a number out of range."""
    layer = spec.layers[0]
    if layer.num_experts < 1:
        raise SettingError(
            f"expert_slots is {num_slots!r}, and {spec.family} has no experts to leave on disk: leave it out."
        )
    least, most = layer.experts_per_token, layer.num_experts
    if isinstance(num_slots, bool) or not isinstance(num_slots, int) or not least <= num_slots <= most:
        raise SettingError(
            f"expert_slots is {num_slots!r}: each token uses {least} of the {most} experts in a layer, so it must be a whole "
            f"number from {least} to {most}."
        )
    return num_slots


class Streaming:
    """Which parameters of a checkpoint stay on disk, and how a model gets what reads them instead.

    on_disk: names of parameters that are not to be loaded: the experts' packed matrices and, where the head has a matrix
    of its own and `embedding_on_disk` allows it, the embedding. Raises CheckpointError when the checkpoint has its
    experts in a form that cannot be read in place.

    policy, writes: see `SlotTable` and `Writing`. padded_down_rows: rows of the down slots; as many as those of a
    resident model's matrices when it is None, so that both go through the same kernel.
    """

    def __init__(
        self,
        contents: Contents,
        checkpoint: Checkpoint,
        num_slots: int,
        *,
        embedding_on_disk: bool = True,
        policy: PolicyFactory = LeastRecentlyUsed,
        writes: Writes | None = None,
        padded_down_rows: int | None = None,
    ) -> None:
        self._num_slots, self._policy, self._writes = num_slots, policy, writes
        self._padded_down_rows = padded_down_rows
        self._entries = _expert_entries(contents, checkpoint)
        self._embedding = _embedding_entry(contents, checkpoint) if embedding_on_disk else None
        self.on_disk = {*self._entries, *(() if self._embedding is None else (EMBEDDING,))}

    @property
    def slot_bytes(self) -> int:
        """Bytes in memory that one more slot in every layer takes."""
        return sum(entry.nbytes // entry.shape[0] for entry in self._entries.values())

    @property
    def embedding_bytes(self) -> int:
        """Bytes that are not in memory because the embedding stays on disk."""
        return 0 if self._embedding is None else self._embedding.nbytes

    def attach(
        self,
        model: GptOss,
        weights: Sequence[tuple[str, mx.array]],
        packings: Mapping[str, Quantization],
        dtype: mx.Dtype,
    ) -> list[tuple[str, mx.array]]:
        """Give the model its residency, and back those of `weights` that are still to be put into its parameter tree.

        packings: module -> how it is packed. dtype: the type that the model computes in.
        """
        named = dict(weights)
        entries = [*self._entries.values(), *([] if self._embedding is None else [self._embedding])]
        files = {file: RecordFile(file) for file in dict.fromkeys(entry.file for entry in entries)}
        write, lock, read_back = Writing(self._writes), threading.RLock(), ReadBack()
        reader, tile = RecordReader(buffers=write.courier), model.choices.rows_in_a_tile
        layers = []
        for i, block in enumerate(model.layers):
            experts, parts = cast(Experts, block.mlp.experts), []
            for projection in PROJECTIONS:
                module = f"model.layers.{i}.mlp.experts.{projection}"
                weight, scales = (self._part(f"{module}.{part}", files, write, tile) for part in PARTS)
                parts += [weight, scales]
                packing, bias = packings[module], named.pop(f"{module}.bias")
                experts[projection] = QuantizedExpertLinear(
                    weight.array, scales.array, None, bias, packing.group_size, packing.bits, packing.mode
                )
            table = SlotTable(self._num_slots, self._policy)
            bank = ExpertBank(parts, table, experts.num_experts, reader, write)
            layers.append(StreamedExperts(experts, bank, lock, read_back))
            block.mlp.experts = layers[-1]
        if self._embedding is not None:
            file, module = files[self._embedding.file], EMBEDDING.removesuffix(".weight")
            model.model.embed_tokens = StreamedEmbedding(
                file, self._embedding, dtype, packings.get(module), reader, lock
            )
        model.residency = Residency(
            layers, tuple(files.values()), reader, write.way, lock, read_back, self._embedding is not None
        )
        weakref.finalize(model, _close, reader, model.residency.files)
        return list(named.items())

    def _part(self, name: str, files: Mapping[Path, RecordFile], write: Writing, tile: int) -> Part:
        entry = self._entries[name]
        num_experts, rows = entry.shape[:2]
        nbytes = entry.nbytes // num_experts
        dtype = mx.uint32 if name.endswith(".weight") else mx.uint8
        padded = (self._padded_down_rows or rows + -rows % tile) if ".down_proj." in name else rows
        stored = Stored(name, files[entry.file], entry.start, nbytes)
        return Part(stored, write((self._num_slots, padded, nbytes // rows // dtype.size), dtype))


def _expert_entries(contents: Contents, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Parameter -> its tensor, for the packed expert matrices. Raises CheckpointError when one cannot be read in place."""
    found: dict[str, TensorEntry] = {}
    for name in contents.spec.parameter_shapes():
        if ".experts." not in name or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        for part in PARTS:
            parameter = contents.parameters.get(f"{module}.{part}")
            if parameter is None or parameter.dtype not in ("U32", "U8") or f"{module}.biases" in contents.parameters:
                raise _not_in_place(contents, "has them in another form than MXFP4")
            if len(parameter.sources) != 1:
                raise _not_in_place(contents, "keeps gate and up apart")
            if not isinstance(checkpoint, SafetensorsCheckpoint):
                raise _not_in_place(contents, "is not made of safetensors files on this disk")
            found[parameter.name] = checkpoint.entries[parameter.sources[0]]
    return found


def _embedding_entry(contents: Contents, checkpoint: Checkpoint) -> TensorEntry | None:
    """The embedding's tensor, None where it has to be in memory: as the head too, or because it is stored packed."""
    parameter = contents.parameters[EMBEDDING]
    if contents.spec.tied_head or parameter.dtype not in _STORED_TYPES:
        return None
    return checkpoint.entries[parameter.sources[0]]


def _not_in_place(contents: Contents, why: str) -> CheckpointError:
    return CheckpointError(
        f"This checkpoint's experts (layout {contents.layout}) cannot be read in place, because it {why}: convert it once, "
        "`python convert.py SOURCE DESTINATION --quantize mxfp4`, and load the result, or take OpenAI's own files."
    )


def _close(reader: RecordReader, files: Sequence[RecordFile]) -> None:
    reader.close()
    for file in files:
        file.close()
