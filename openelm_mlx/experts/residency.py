"""Expert streaming: which parameters stay on disk, and the modules that read them when needed. Rules are in bank.py."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..checkpoint.layouts import Contents
from ..checkpoint.quantize import Quantization
from ..checkpoint.reader import Checkpoint, SafetensorsCheckpoint, TensorEntry
from ..checks import is_whole
from ..errors import CheckpointError, SettingError
from ..files import shown
from ..models.gpt_oss import GptOss
from ..models.moe import Experts, QuantizedExpertLinear
from ..specs import ModelSpec
from .bank import PARTS, PROJECTIONS, ExpertBank, Lock, Part, Stored
from .modules import _STORED_TYPES, ReadBack, StreamedEmbedding, StreamedExperts
from .pace import Pace
from .records import RecordFile, RecordReader
from .slots import LeastRecentlyUsed, PolicyFactory, SlotTable
from .statistics import ExpertStatistics, LayerStatistics
from .writable import Allocator, WriteMode

EMBEDDING = "model.embed_tokens.weight"


@dataclass
class Residency:
    """What a model with streamed experts has in addition: its layers' banks, files and threads.

    lock: held during work over several layers, such as a prompt's chunk or a decode step; each layer takes it anyway.
    pace: what the decode step has learned about misses, kept from one answer to the next.
    """

    layers: list[StreamedExperts]
    files: tuple[RecordFile, ...]
    reader: RecordReader
    writes: WriteMode
    lock: Lock
    read_back: ReadBack
    embedding_on_disk: bool = False
    pace: Pace = field(default_factory=Pace)

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
        """Hits, misses and reads since loading, or since `reset_statistics`, over all answers of this model."""
        return ExpertStatistics.of(bank.statistics for bank in self.banks)

    def reset_statistics(self) -> None:
        """Start counting from zero."""
        for bank in self.banks:
            bank.statistics = LayerStatistics()
            bank.table.evictions = 0


# --- loading ----------------------------------------------------------------------------------------------------------


def checked_slots(spec: ModelSpec, num_slots: int) -> int:
    """The number of slots a layer, checked. Raises SettingError for a model without experts, or a number out of range."""
    layer = spec.layers[0]
    if layer.num_experts < 1:
        raise SettingError(
            f"expert_slots is {shown(num_slots)}, and {spec.family} has no experts to leave on disk: leave it out."
        )
    least, most = layer.experts_per_token, layer.num_experts
    if not is_whole(num_slots) or not least <= num_slots <= most:
        raise SettingError(
            f"expert_slots is {shown(num_slots)}: each token uses {least} of the {most} experts in a layer, so it must "
            f"be a whole number from {least} to {most}."
        )
    return num_slots


class Streaming:
    """Which parameters of a checkpoint stay on disk, and giving a model the modules that read them.

    on_disk: names of parameters that are not loaded: the experts' packed matrices and, if the head has a matrix of its own
    and `embedding_on_disk` allows it, the embedding. Raises CheckpointError when the experts are stored in a form that
    cannot be read in place.

    policy, writes: see `SlotTable` and `Allocator`. padded_down_rows: rows of the down slots; None: as many as in a
    resident model's matrices, so that both use the same kernel.
    """

    def __init__(
        self,
        contents: Contents,
        checkpoint: Checkpoint,
        num_slots: int,
        *,
        embedding_on_disk: bool = True,
        policy: PolicyFactory = LeastRecentlyUsed,
        writes: WriteMode | None = None,
        padded_down_rows: int | None = None,
    ) -> None:
        self._num_slots, self._policy, self._writes = num_slots, policy, writes
        self._padded_down_rows = padded_down_rows
        self._entries = _expert_entries(contents, checkpoint)
        self._embedding = _embedding_entry(contents, checkpoint) if embedding_on_disk else None
        self.on_disk = {*self._entries, *(() if self._embedding is None else (EMBEDDING,))}

    def attach(
        self,
        model: GptOss,
        weights: Sequence[tuple[str, mx.array]],
        packings: Mapping[str, Quantization],
        dtype: mx.Dtype,
    ) -> tuple[Residency, list[tuple[str, mx.array]]]:
        """Give the model modules that read experts. Returns its residency, and those of `weights` that still have to be loaded
        into its parameter tree.

        packings: module -> how it is packed. dtype: the type that the model computes in.
        """
        named = dict(weights)
        entries = [*self._entries.values(), *([] if self._embedding is None else [self._embedding])]
        files = {file: RecordFile(file) for file in dict.fromkeys(entry.file for entry in entries)}
        allocator, lock, read_back = Allocator(self._writes), threading.RLock(), ReadBack()
        reader, tile = RecordReader(buffers=allocator.courier), model.choices.rows_in_a_tile
        layers = []
        for i, block in enumerate(model.layers):
            experts, parts = cast(Experts, block.mlp.experts), []
            for projection in PROJECTIONS:
                module = f"model.layers.{i}.mlp.experts.{projection}"
                weight, scales = (self._part(f"{module}.{part}", files, allocator, tile) for part in PARTS)
                parts += [weight, scales]
                packing, bias = packings[module], named.pop(f"{module}.bias")
                experts[projection] = QuantizedExpertLinear(
                    weight.array, scales.array, None, bias, packing.group_size, packing.bits, packing.mode
                )
            table = SlotTable(self._num_slots, self._policy)
            bank = ExpertBank(parts, table, experts.num_experts, reader, allocator)
            experts.eval()  # it leaves the module tree, whose mode it would follow
            layers.append(StreamedExperts(experts, bank, lock, read_back))
            block.mlp.experts = layers[-1]
        if self._embedding is not None:
            file, module = files[self._embedding.file], EMBEDDING.removesuffix(".weight")
            model.model.embed_tokens = StreamedEmbedding(
                file, self._embedding, dtype, packings.get(module), reader, lock
            )
        residency = Residency(
            layers, tuple(files.values()), reader, allocator.way, lock, read_back, self._embedding is not None
        )
        weakref.finalize(model, _close, reader, residency.files)
        return residency, list(named.items())

    def _part(self, name: str, files: Mapping[Path, RecordFile], allocator: Allocator, tile: int) -> Part:
        entry = self._entries[name]
        num_experts, rows = entry.shape[:2]
        nbytes = entry.nbytes // num_experts
        dtype = mx.uint32 if name.endswith(".weight") else mx.uint8
        padded = (self._padded_down_rows or rows + -rows % tile) if ".down_proj." in name else rows
        stored = Stored(name, files[entry.file], entry.start, nbytes)
        return Part(stored, allocator.allocate((self._num_slots, padded, nbytes // rows // dtype.size), dtype))


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
                raise _not_in_place(contents, "does not store them in MXFP4")
            if len(parameter.sources) != 1:
                raise _not_in_place(contents, "stores gate and up separately")
            if not isinstance(checkpoint, SafetensorsCheckpoint):
                raise _not_in_place(contents, "does not consist of safetensors files on this disk")
            found[parameter.name] = checkpoint.entries[parameter.sources[0]]
    return found


def _embedding_entry(contents: Contents, checkpoint: Checkpoint) -> TensorEntry | None:
    """The embedding's tensor; None if it has to be in memory, because it is the head too, or is stored packed."""
    if contents.spec.tied_head or contents.spec.only_layers:
        return None
    parameter = contents.parameters[EMBEDDING]
    if parameter.dtype not in _STORED_TYPES:
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
