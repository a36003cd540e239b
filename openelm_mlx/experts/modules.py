"""The modules that replace experts and embedding in a model whose experts stay on disk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.quantize import Quantization
from ..checkpoint.reader import TensorEntry
from ..models.groups import groups_on_host, make_groups
from ..models.moe import Experts, Routes
from ..models.routing_ways import KERNEL, SORTED, UNSORTED, fewest_rows, rows_at_once, uses_tiles
from .bank import ExpertBank, Lock
from .records import HostTarget, Record, RecordFile, RecordReader
from .slots import rounds_of
from .writable import cuda_driver


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
            way = self.experts.way_for(chosen.shape)
            is_grouped = way not in (KERNEL, UNSORTED)
            rounds = rounds_of(chosen.ravel().tolist(), self.bank.table, is_grouped)
            if is_grouped or len(rounds) > 1:
                return self._by_blocks(x, chosen, rounds, way)
            self.bank.require(rounds[0])
            outputs = self.compute_from_slots(x, expert_indices, self.bank.device_table())
            mx.async_eval(outputs)
            self.bank.note(outputs)
            return outputs

    def compute_from_slots(self, x: mx.array, expert_indices: mx.array, table: mx.array) -> mx.array:
        """The chosen experts' outputs, from the slots in the bank's `table`: correct if all of them are resident then."""
        way, slots = self.experts.way_for(expert_indices.shape), table[expert_indices]
        if way == KERNEL:
            return self.experts.by_kernel(x, expert_indices, slots)
        if way in (UNSORTED, SORTED):  # without tiles, which need more routes, both are the same kernel
            return self.experts.feed_forward(x[..., None, :], Routes(expert_indices, slots))
        groups = make_groups(expert_indices, way, self.bank.num_slots, slots)
        return self.experts.of_groups(x.reshape(-1, x.shape[-1]), groups).reshape(*expert_indices.shape, -1)

    def _by_blocks(self, x: mx.array, chosen: np.ndarray, blocks: list[list[int]], way: str) -> mx.array:
        """Routes grouped by expert, experts in blocks that fit into the slots: each expert is read at most once.

        A row's result depends only on the kernel, not on the rows that are computed with it.
        """
        routes = chosen.ravel()
        rows = x.reshape(-1, x.shape[-1])
        tiles = way == SORTED and uses_tiles(routes.size, self.bank.num_experts)
        most = rows_at_once(routes.size, self.bank.num_experts, self.bank.num_slots)
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
                if way in (KERNEL, UNSORTED, SORTED):
                    for part in (slice(start, start + most) for start in range(0, len(mine), most)):
                        pieces.append(self._block(rows, routes, mine[part], slots[part], way, tiles, chosen.shape[-1]))
                else:
                    pieces.append(self._groups(rows, routes, mine, slots, way, chosen.shape[-1]))
                positions.append(mine)
                if following is not None:
                    # Read the next block while this one is computed, if possible into the slots of earlier blocks.
                    self.bank.begin(following)
        finally:
            self.bank.abandon()
        back = np.argsort(np.concatenate(positions)).astype(np.uint32)
        outputs = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return outputs[mx.array(back)].reshape(*chosen.shape, -1)

    def _block(
        self, rows: mx.array, routes: np.ndarray, mine: np.ndarray, slots: np.ndarray, way: str, tiles: bool, k: int
    ) -> mx.array:
        """The outputs (n, hidden_size) of the n routes `mine`, ordered by slot; dispatched, not waited for."""
        count = len(mine)
        if tiles:
            # The bank has fewer experts than the model, so by itself it could fall below the threshold for tiles.
            filler = max(0, fewest_rows(self.bank.num_slots) - count)
            mine = np.concatenate([mine, np.repeat(mine[-1:], filler)])
            slots = np.concatenate([slots, np.repeat(slots[-1:], filler)])
        numbers = mx.array((mine // k).astype(np.uint32))
        experts = mx.array(routes[mine].astype(np.uint32))
        if way == KERNEL:
            outputs = self.experts.by_kernel(rows[numbers], experts[:, None], mx.array(slots)[:, None]).squeeze(-2)
        else:
            outputs = self.experts.feed_forward(rows[numbers], Routes(experts, mx.array(slots), numbers, tiles))[:count]
        return self._started(outputs, slots)

    def _groups(
        self, rows: mx.array, routes: np.ndarray, mine: np.ndarray, slots: np.ndarray, way: str, k: int
    ) -> mx.array:
        """As `_block`, for routes that are multiplied in groups of one expert each."""
        groups = groups_on_host(mine // k, routes[mine], slots, way, routes.size // k, self.bank.num_slots)
        return self._started(self.experts.of_groups(rows, groups), slots)

    def _started(self, outputs: mx.array, slots: np.ndarray) -> mx.array:
        """`outputs`, dispatched, and noted as a pending read of these slots."""
        # A pending read stays in memory until the fence, so it is one number that depends on all outputs.
        mark = outputs[:1, :1] + 0
        mx.async_eval(outputs, mark)
        self.bank.note(mark, set(slots.tolist()))
        return outputs


class StreamedEmbedding:
    """An embedding table that stays on disk; only the rows of the given tokens are read, (...,) -> (..., hidden_size).

    The numbers are those of `nn.Embedding`, or of `nn.QuantizedEmbedding` if rows are packed (`packing`).
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
        ids = np.array(tokens)  # waits for them: a streamed model cannot run a token ahead
        rows, where = np.unique(ids, return_inverse=True)
        data = np.empty((len(rows), self._row_bytes), np.uint8)
        with self._lock:  # experts are in the same files, which only one reading at a time may reopen
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
    """Reads the routers' choices back to the host, which evaluates everything they depend on."""

    def __init__(self) -> None:
        driver, self._results = cuda_driver(), None
        if driver is not None:
            from .cuda_driver import Results

            self._results = Results(driver)

    def __call__(self, choices: Sequence[mx.array]) -> list[np.ndarray]:
        """Each of the choices, uint32, of any shapes."""
        if self._results is not None and self._results.has_room(choices):
            return self._results.on_host(choices)
        mx.eval(choices)
        return [np.array(each) for each in choices]
