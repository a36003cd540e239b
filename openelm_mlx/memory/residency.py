"""Experts that are not all in memory: a fixed number of slots a layer, filled from the checkpoint's files when needed.

Each layer has one array a tensor (packed words and scales of gate_up and of down) with a slot for an expert along its
first axis. The arrays are made once and stay; an expert is read straight into its slot, through a NumPy view of the
array's own memory, by several threads. Kernels are given slot numbers where a resident model gives expert numbers.
Router, attention and the experts' biases are in memory as ever.

Why a slot is never overwritten under a kernel that reads it
------------------------------------------------------------
MLX is lazy and keeps no watch over memory that is written from outside, so the order of reads by kernels and writes by
threads is ours to keep. Four rules do it:

1. Kernels read a bank through `feed_forward` alone, and every result of it is noted as a reader of the bank before
   anything else can happen to it. Results of one bank's calls do not depend on each other: a chunk's router does
   not wait for the experts of the chunk before in the same layer, and what the last layer computed for a chunk that
   only fills the cache may never be wanted. So nothing is inferred from other values having arrived.
2. Before a slot is overwritten, `fence` evaluates all noted readers, which ends when their kernels have ended.
3. Writers are joined before the call that asked for them returns, however it ends (`records.finish`). A graph that reads
   the slots is built after that, so it is built on bytes that are there.
4. A slot that holds an expert of the call that is being served is never chosen for another one (`SlotTable.place`), and
   a slot is named resident only when all its bytes have come. An error in between frees it.

A reader is struck from the notes without being evaluated in one place alone, `forget_newest`, by the step that has
built it, found it wrong and holds the only way to it. Within one model the work of different threads is kept apart by
`Residency.exclusive`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..checkpoint.layouts import Contents
from ..checkpoint.quantize import NOT_A_SCALE, Quantization
from ..checkpoint.reader import Checkpoint, SafetensorsCheckpoint, TensorEntry
from ..errors import CheckpointError, SettingError
from ..models.gpt_oss import GptOss
from ..models.moe import SORT_FROM_ROUTES, TILE_FROM_ROWS, Experts, QuantizedExpertLinear, rows_in_a_tile, uses_tiles
from ..specs import ModelSpec
from .records import Record, RecordFile, RecordReader
from .slots import LeastRecentlyUsed, PolicyFactory, SlotTable, rounds_of

Writes = Literal["view", "copy"]

EMBEDDING = "model.embed_tokens.weight"
PROJECTIONS = ("gate_up_proj", "down_proj")
PARTS = ("weight", "scales")
# Results that wait for a fence are small (a token's); larger ones are evaluated at once.
LARGEST_PENDING_ROUTES = SORT_FROM_ROUTES
MOST_PENDING = 16


@dataclass
class LayerStatistics:
    """What one layer's slots did. hits and misses count experts asked for, each once a call; bytes_read in bytes.

    seconds_waited: for reads, from asking to the last byte. read_backs: times that the host waited for a choice of experts.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0
    read_backs: int = 0
    evictions: int = 0


class Statistics(NamedTuple):
    """Sums over all layers, since loading or the last `reset_statistics`; `layers` has each."""

    hits: int
    misses: int
    bytes_read: int
    seconds_waited: float
    read_backs: int
    evictions: int
    layers: tuple[LayerStatistics, ...]

    @property
    def hit_rate(self) -> float:
        """Hits over experts asked for; 0 when none was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class Stored(NamedTuple):
    """One tensor of a layer's experts in its file: expert e is `nbytes` bytes from `start + e * nbytes`."""

    name: str
    file: RecordFile
    start: int
    nbytes: int


class Part:
    """One array of a bank, (S, rows, columns) with S slots, and how bytes come into a slot of it.

    rows may be more than an expert has: its bytes then fill the first of them.
    """

    def __init__(self, stored: Stored, shape: tuple[int, ...], dtype: mx.Dtype, num_slots: int, writes: Writes) -> None:
        self.stored = stored
        self.array = mx.zeros((num_slots, *shape), dtype)
        mx.eval(self.array)  # a view needs memory that exists
        self.view = memory_of(self.array) if writes == "view" else None
        self._record = np.zeros(shape, _NUMPY_TYPES[dtype]) if self.view is None else None

    def target(self, slot: int) -> memoryview:
        """Where an expert's bytes have to be put: the slot itself, or the one record that is copied into it."""
        place = self._record if self.view is None else self.view[slot]
        assert place is not None
        return cast(memoryview, place.data).cast("B")[: self.stored.nbytes]

    def settle(self, slot: int) -> None:
        """Bring what is in the record into the array. In place: nothing else holds the array, as a fence came before."""
        if self._record is not None:
            self.array[slot] = mx.array(self._record)


_NUMPY_TYPES = {mx.uint32: np.uint32, mx.uint8: np.uint8}


def memory_of(array: mx.array) -> np.ndarray | None:
    """An evaluated array's own memory as a NumPy array that can be written; None where NumPy gave a copy instead.

    NumPy 1 copies without a word what it cannot view: two views of one array have one address, two copies have not.
    """
    try:
        view, again = np.array(array, copy=False), np.array(array, copy=False)
    except (ValueError, TypeError, BufferError):
        return None
    is_memory = view.ctypes.data == again.ctypes.data and view.flags.writeable and view.flags.c_contiguous
    return view if is_memory else None


def views_work() -> bool:
    """Whether, on this machine and backend, a NumPy view is an array's memory and the next kernel sees what it writes."""
    for dtype, kind in _NUMPY_TYPES.items():
        array = mx.zeros((4, 64), dtype)
        mx.eval(array)
        view = memory_of(array)
        if view is None:
            return False
        before = mx.sum(array).item()
        view[2] = np.arange(64, dtype=kind)
        if (before, mx.sum(array).item()) != (0, 63 * 32):
            return False
    return True


def chosen_writes(asked: Writes | None = None) -> Writes:
    """How slots are written: as asked, else through views where they work, else by copies of one expert at a time.

    MLX's CUDA backend answers a view by moving the whole array to managed memory, from where its kernels read it at
    another speed: copies are the default there.
    """
    if asked == "copy":
        return "copy"
    if asked is None and mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu):
        return "copy"
    return "view" if views_work() else "copy"


class ExpertBank:
    """The slots of one layer: which experts are in them, and how the others get there."""

    def __init__(self, parts: Sequence[Part], table: SlotTable, num_experts: int, reader: RecordReader) -> None:
        self.parts, self.table, self.num_experts = parts, table, num_experts
        self.statistics = LayerStatistics()
        self._read = reader
        self._readers: list[mx.array] = []
        self._device_table: mx.array | None = None

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
        placed = self.table.place(wanted)
        self.statistics.hits += len(wanted) - len(placed)
        self.statistics.misses += len(placed)
        self.statistics.evictions = self.table.evictions
        if placed:
            self._device_table = None
            self._fetch(placed)
        self.table.use(wanted)

    def slots(self, experts: np.ndarray) -> np.ndarray:
        """The slot of each of `experts`, all resident. Any shape, uint32."""
        lookup = np.zeros(self.num_experts, np.uint32)
        for expert, slot in self.table.slot_of.items():
            lookup[expert] = slot
        return lookup[experts]

    def device_table(self) -> mx.array:
        """(E,) uint32: the slot of each expert, and any slot for one that is not resident."""
        if self._device_table is None:
            self._device_table = mx.array(self.slots(np.arange(self.num_experts)))
        return self._device_table

    def note(self, reader: mx.array) -> None:
        """`reader` is computed from the slots as they are now: to be evaluated before one is overwritten."""
        self._readers.append(reader)
        if len(self._readers) > MOST_PENDING:
            newest = self._readers.pop()
            self.fence()  # most have long been computed, and are only kept alive by this list
            self._readers.append(newest)

    def forget_newest(self) -> None:
        """The last reader noted has not been computed and never will be: its result was dropped by who made it."""
        self._readers.pop()

    def fence(self) -> None:
        """Wait for every kernel that reads the slots."""
        readers, self._readers = self._readers, []
        mx.eval(readers)

    def dispatch(self) -> None:
        """Start what reads the slots, so that a fence in another thread has only to wait for it."""
        mx.async_eval(self._readers)

    def _fetch(self, placed: Sequence[tuple[int, int]]) -> None:
        started = time.perf_counter()
        try:
            self.fence()
            started = time.perf_counter()
            if all(part.view is not None for part in self.parts):
                self._read.read([record for expert, slot in placed for record in self._records(expert, slot)])
            else:
                self._fetch_by_copies(placed)
            self._check_scales(placed)
        except BaseException:
            self.table.release(placed)
            raise
        self.table.arrived(placed)
        self.statistics.bytes_read += len(placed) * sum(part.stored.nbytes for part in self.parts)
        self.statistics.seconds_waited += time.perf_counter() - started

    def _fetch_by_copies(self, placed: Sequence[tuple[int, int]]) -> None:
        for expert, slot in placed:
            self._read.read(self._records(expert, slot))
            for part in self.parts:
                part.settle(slot)
            self._check_scales([(expert, slot)])
            mx.eval([part.array for part in self.parts])  # before the record is filled again

    def _records(self, expert: int, slot: int) -> list[Record]:
        return [
            Record(part.stored.file, part.stored.start + expert * part.stored.nbytes, part.target(slot))
            for part in self.parts
        ]

    def _check_scales(self, placed: Sequence[tuple[int, int]]) -> None:
        """A resident model refuses scales that stand for no number when it is loaded; here they are seen when read."""
        for expert, slot in placed:
            for part in self.parts:
                if part.stored.name.endswith("scales"):
                    scales = np.frombuffer(part.target(slot), np.uint8)
                    if scales.max() == NOT_A_SCALE:
                        raise CheckpointError(
                            f"The scales of expert {expert} in {part.stored.name} have a byte of 255, which stands for no "
                            f"number (NaN): {part.stored.file.path} is damaged; download or copy it again."
                        )


class StreamedExperts:
    """`RoutedExperts` over a bank: bit for bit what the resident `Experts` compute.

    experts: the layer's own arithmetic with the bank's arrays as weights.
    """

    def __init__(self, experts: Experts, bank: ExpertBank) -> None:
        self.experts, self.bank = experts, bank
        self.is_skipped = False
        # Choices of experts that the host has not seen, when it looks at several layers' at once; None: it looks at each.
        self.unseen: list[mx.array] | None = None
        self.on_choice: Any = None

    def __call__(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        if self.is_skipped:
            return mx.zeros((*expert_indices.shape, x.shape[-1]), x.dtype)
        if self.unseen is not None:
            return self._by_device_table(x, expert_indices, self.unseen)
        mx.eval(expert_indices)  # the host needs them to know what to read
        self.bank.statistics.read_backs += 1
        chosen = np.array(expert_indices)
        if self.on_choice is not None:
            self.on_choice(chosen)
        is_grouped = chosen.size >= SORT_FROM_ROUTES
        rounds = rounds_of(chosen.ravel().tolist(), self.bank.table, is_grouped)
        if is_grouped or len(rounds) > 1:
            return self._by_blocks(x, chosen, rounds)
        self.bank.require(rounds[0])
        outputs = self.experts.feed_forward(x[..., None, :], expert_indices, mx.array(self.bank.slots(chosen)))
        self.bank.note(outputs)
        return outputs

    def _by_device_table(self, x: mx.array, expert_indices: mx.array, unseen: list[mx.array]) -> mx.array:
        """With the slots that the device looks up itself: right if all experts turn out to have been resident."""
        unseen.append(expert_indices)
        slots = self.bank.device_table()[expert_indices]
        outputs = self.experts.feed_forward(x[..., None, :], expert_indices, slots)
        self.bank.note(outputs)
        return outputs

    def _by_blocks(self, x: mx.array, chosen: np.ndarray, blocks: list[list[int]]) -> mx.array:
        """Routes grouped by expert, experts taken in blocks that fit: each expert is read at most once.

        A row's result does not depend on which rows are computed with it, only on the kernel.
        """
        routes = chosen.ravel()
        rows = x.reshape(-1, x.shape[-1])
        tiles = uses_tiles(routes.size, self.bank.num_experts)
        pieces: list[mx.array] = []
        positions: list[np.ndarray] = []
        for block in blocks:
            self.bank.require(block)
            mine = np.flatnonzero(np.isin(routes, block))
            slots = self.bank.slots(routes[mine])
            order = np.argsort(slots, kind="stable")
            mine, slots = mine[order], slots[order]
            pieces.append(self._block(rows, routes, mine, slots, tiles, chosen.shape[-1]))
            positions.append(mine)
        back = np.argsort(np.concatenate(positions)).astype(np.uint32)
        outputs = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return outputs[mx.array(back)].reshape(*chosen.shape, -1)

    def _block(
        self, rows: mx.array, routes: np.ndarray, mine: np.ndarray, slots: np.ndarray, tiles: bool, k: int
    ) -> mx.array:
        """The outputs (n, hidden_size) of the n routes `mine`, whose slots do not decrease."""
        count = len(mine)
        if (
            tiles
        ):  # the bank has fewer experts than the model, and could be below the tiles' threshold where that is not
            filler = max(0, max(SORT_FROM_ROUTES, TILE_FROM_ROWS * self.bank.num_slots) - count)
            mine = np.concatenate([mine, np.repeat(mine[-1:], filler)])
            slots = np.concatenate([slots, np.repeat(slots[-1:], filler)])
        inputs = rows[mx.array((mine // k).astype(np.uint32))]
        experts = mx.array(routes[mine].astype(np.uint32))
        outputs = self.experts.feed_forward(inputs, experts, mx.array(slots), sorted_slots=tiles)[:count]
        self.bank.note(outputs)
        if count > LARGEST_PENDING_ROUTES:
            self.bank.fence()  # not kept waiting: its inputs would be kept, too
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
    ) -> None:
        self._file, self._entry, self._dtype, self._packing, self._read = file, entry, dtype, packing, reader
        self._row_bytes = entry.nbytes // entry.shape[0]

    def __call__(self, tokens: mx.array) -> mx.array:
        ids = np.array(tokens)  # waits for them: a streamed model is never a token ahead
        rows, where = np.unique(ids, return_inverse=True)
        data = np.empty((len(rows), self._row_bytes), np.uint8)
        self._read.read(
            [
                Record(self._file, self._entry.start + int(row) * self._row_bytes, memoryview(data[i]))
                for i, row in enumerate(rows)
            ]
        )
        table = mx.array(data).view(_STORED_TYPES[self._entry.dtype]).astype(self._dtype)
        if self._packing is not None:
            table = self._packing.dequantize(self._packing.quantize(table), self._dtype)
        return table[mx.array(where.reshape(ids.shape).astype(np.uint32))]


_STORED_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass
class Residency:
    """What a model with streamed experts has more than another one: its layers' banks, files and threads.

    pace: what the decode step has learned about misses, kept from one answer to the next.
    """

    layers: list[StreamedExperts]
    files: tuple[RecordFile, ...]
    reader: RecordReader
    writes: Writes
    embedding_on_disk: bool = False
    pace: Any = None
    _lock: Any = field(default_factory=threading.RLock)

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

    def statistics(self) -> Statistics:
        """What happened since loading, or since `reset_statistics`."""
        layers = tuple(bank.statistics for bank in self.banks)
        return Statistics(
            sum(layer.hits for layer in layers),
            sum(layer.misses for layer in layers),
            sum(layer.bytes_read for layer in layers),
            sum(layer.seconds_waited for layer in layers),
            sum(layer.read_backs for layer in layers),
            sum(layer.evictions for layer in layers),
            layers,
        )

    def reset_statistics(self) -> None:
        """Count anew."""
        for bank in self.banks:
            bank.statistics = LayerStatistics()
            bank.table.evictions = 0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else in the slots until the block is left, and nothing unstarted in them afterwards.

        A chunk of a prompt or one step of an answer: two threads may each have an answer under way from one model.
        """
        with self._lock:
            try:
                yield
            finally:
                for bank in self.banks:
                    bank.dispatch()

    @contextmanager
    def cache_only(self) -> Iterator[None]:
        """Within the block the last layer's experts are not read: only keys and values are wanted, which need none."""
        last = self.layers[-1]
        last.is_skipped = True
        try:
            yield
        finally:
            last.is_skipped = False

    @contextmanager
    def unseen_choices(self) -> Iterator[list[mx.array]]:
        """Within the block layers choose among what is resident without asking the host; gives their choices in order."""
        unseen: list[mx.array] = []
        for layer in self.layers:
            layer.unseen = unseen
        try:
            yield unseen
        finally:
            for layer in self.layers:
                layer.unseen = None


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

    policy, writes: see `SlotTable` and `chosen_writes`. padded_down_rows: rows of the down slots; as many as those of a
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
        reader, writes = RecordReader(), chosen_writes(self._writes)
        layers = []
        for i, block in enumerate(model.layers):
            experts, parts = cast(Experts, block.mlp.experts), []
            for projection in PROJECTIONS:
                module = f"model.layers.{i}.mlp.experts.{projection}"
                weight, scales = (self._part(f"{module}.{part}", files, writes) for part in PARTS)
                parts += [weight, scales]
                packing, bias = packings[module], named.pop(f"{module}.bias")
                experts[projection] = QuantizedExpertLinear(
                    weight.array, scales.array, None, bias, packing.group_size, packing.bits, packing.mode
                )
            bank = ExpertBank(parts, SlotTable(self._num_slots, self._policy), experts.num_experts, reader)
            layers.append(StreamedExperts(experts, bank))
            block.mlp.experts = layers[-1]
        if self._embedding is not None:
            file, module = files[self._embedding.file], EMBEDDING.removesuffix(".weight")
            model.model.embed_tokens = StreamedEmbedding(file, self._embedding, dtype, packings.get(module), reader)
        model.residency = Residency(layers, tuple(files.values()), reader, writes, self._embedding is not None)
        weakref.finalize(model, _close, reader, model.residency.files)
        return list(named.items())

    def _part(self, name: str, files: Mapping[Path, RecordFile], writes: Writes) -> Part:
        entry = self._entries[name]
        num_experts, rows = entry.shape[:2]
        nbytes = entry.nbytes // num_experts
        dtype = mx.uint32 if name.endswith(".weight") else mx.uint8
        padded = (self._padded_down_rows or rows + -rows % rows_in_a_tile()) if ".down_proj." in name else rows
        stored = Stored(name, files[entry.file], entry.start, nbytes)
        return Part(stored, (padded, nbytes // rows // dtype.size), dtype, self._num_slots, writes)


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
