"""What a conversion will write, known from the source's headers: every tensor with its old and new name, shape and type.

The output has the canonical names (those of Apple's Hugging Face files, which mlx-lm uses too), the vocabulary's real
rows, and one config.json that both mlx-lm and this library read. CoreNet's padding rows are dropped: they were never
trained, the logits of the real tokens do not depend on them, and without them no sampler of any program can emit one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.apart import apart, gpt_oss_pieces
from ..checkpoint.layouts import FLOAT_TYPES, Contents, Parameter
from ..checkpoint.quantize import PARTS, Quantization, parse_recipe, quantization_of
from ..checkpoint.reader import Checkpoint
from ..checkpoint.safetensors_plan import MAX_FILE_BYTES, OutputFile, OutputTensor, plan_files
from ..errors import ConversionError, SettingError
from ..files import shown
from ..placement import parse_dtype
from ..specs import ModelSpec
from .config import output_config
from .for_swift import check_swift
from .merge import AdapterToMerge, DeltaSums, Merge, MergeReport
from .planned_weight import DTYPE_WORDS, PlannedTensor, PlannedWeight, Shape
from .source_state import source_state

# Programs that a folder can be written for.
TARGETS = ("swift",)

_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
# safetensors' name of a floating type -> the name that users write.
TYPE_WORDS = {name: DTYPE_WORDS[dtype] for name, dtype in FLOAT_TYPES.items()}


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write; `spec` and `config` are the output's. packings: module -> how it is packed there.

    target: the program that it is for, None for this library and mlx-lm.
    """

    spec: ModelSpec
    config: Mapping[str, Any]
    weights: tuple[PlannedWeight, ...]
    files: tuple[OutputFile, ...]
    packings: Mapping[str, Quantization]
    target: str | None = None
    merging: AdapterToMerge | None = None

    @cached_property
    def weight_of(self) -> dict[str, PlannedWeight]:
        """The weight that each output tensor belongs to, by the tensor's name."""
        return {tensor.name: weight for weight in self.weights for tensor in weight.tensors}

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """The output's tensors, in the order of the forward pass."""
        return tuple(tensor for weight in self.weights for tensor in weight.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The floating type of the output, or of what is not packed in it: "bfloat16"."""
        return str(self.config["torch_dtype"])

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config's "quantization"; None when nothing is packed."""
        return self.config.get("quantization")

    def merge_report(self, checkpoint: Checkpoint | None) -> MergeReport | None:
        """What merging keeps of the adapter; None without one. checkpoint: None where its tensors are not here yet."""
        if self.merging is None:
            return None
        report = MergeReport(self.merging.name, len(self.merging.merges))
        if checkpoint is None:
            return report
        found, total = [], DeltaSums()
        for weight in self.weights:
            if weight.merge is not None:
                sums = weight.kept_delta(checkpoint)
                found.append(sums.kept(weight.tensors[0].name))
                total.plus(sums)
        return replace(report, weights=tuple(found), total=total.kept("all"))

    def fingerprint(self, source_files: tuple[Path, ...], source_config: Mapping[str, Any]) -> str:
        """A hash of everything that the written bytes depend on: the plan, the source, and MLX's version."""
        adapter = "" if self.merging is None else self.merging.id
        recipe = [
            (weight.tensors, weight.shape, str(weight.dtype), weight.unpack, weight.pack) for weight in self.weights
        ]
        text = repr(
            [source_state(source_files), recipe, [file.name for file in self.files], version("mlx"), adapter]
        ) + json.dumps(source_config)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_conversion(
    contents: Contents,
    config: Mapping[str, Any],
    quantize: str | int | None = None,
    dtype: str | mx.Dtype | None = None,
    group_size: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    target: str | None = None,
    merging: AdapterToMerge | None = None,
) -> ConversionPlan:
    """Plan the conversion of a checkpoint that is understood; nothing is read.

    quantize: a recipe (see `checkpoint.quantize.parse_recipe`). dtype: what floating tensors become. Without it they
    stay as they are, with two exceptions: OpenELM-3B becomes bfloat16, because float16 overflows in it; and what is
    left plain beside packed weights, scales included, has 16 bits (float16 for OpenELM as in Apple's converter,
    bfloat16 for gpt-oss). A packed source stays packed; an OpenELM one is unpacked when `dtype` is given.
    target: "swift": as mlx-swift-lm reads it, q, k and v and gate and up apart. merging: an adapter that is merged into the
    weights; a packed one that it changes becomes what `dtype` or `quantize` says, and without either is packed again.

    Raises SettingError, and ConversionError for what cannot be done with this source.
    """
    if merging is not None:
        if target is not None:
            raise SettingError(
                "An adapter is merged into a folder of this library's: leave target out, and convert that folder."
            )
        contents = merging.unmerged
    spec = replace(contents.spec, vocab_size=contents.spec.usable_vocab_size)
    shapes = spec.parameter_shapes()
    if target is not None:
        check_target(target)
        check_swift(spec)
        if spec.family == "gpt_oss":
            contents, shapes = apart(contents, gpt_oss_pieces)
    choices = _Choices(contents, spec, shapes, quantize, dtype, group_size, {} if merging is None else merging.merges)
    weights: list[PlannedWeight] = []
    packed: dict[str, Quantization] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        weights += choices.weights(name, shape)
        packing = choices.packing(name, shape)
        if packing is not None:
            packed[module] = packing
    if quantize is not None and not any(weight.pack for weight in weights):
        raise ConversionError(
            f"No weight of this model has columns that are whole groups of {choices.group_size}: choose a smaller group size."
        )
    return ConversionPlan(
        spec=spec,
        config=output_config(config, spec, packed, choices.plain_type(weights)),
        weights=tuple(weights),
        files=plan_files((OutputTensor(t.name, t.dtype, t.shape) for w in weights for t in w.tensors), max_file_bytes),
        packings=packed,
        target=target,
        merging=merging,
    )


def check_target(target: str) -> None:
    """Raise SettingError for a program that nothing is written for."""
    if target not in TARGETS:
        raise SettingError(f'target is {shown(target)}: there is "swift", for apps with mlx-swift-lm.')


class _Choices:
    """The user's options, checked against the source, and what they mean for each parameter."""

    def __init__(
        self,
        contents: Contents,
        spec: ModelSpec,
        shapes: Mapping[str, Shape],
        quantize: str | int | None,
        dtype: str | mx.Dtype | None,
        group_size: int | None,
        merges: Mapping[str, Merge],
    ) -> None:
        self._contents, self._merges = contents, merges
        self._spec = spec
        self._recipe = None if quantize is None else parse_recipe(quantize, group_size)
        self._asked_type = parse_dtype(dtype)
        if quantize is None and group_size is not None:
            raise SettingError(f"group_size {group_size} belongs to a quantization, and there is none: add quantize.")
        if self._overflows_in_float16 and self._asked_type is not None and self._asked_type == mx.float16:
            raise ConversionError(
                "OpenELM-3B cannot be float16: its activations overflow (Apple's MLX README says so); use bfloat16."
            )
        # The experts of gpt-oss are packed in the release itself: they stay so whatever is done to the rest.
        self._repackable = {m for m in contents.quantized if len(shapes[f"{m}.weight"]) == 2}
        if quantize is not None and self._repackable:
            packing = contents.quantized[min(self._repackable)]
            raise ConversionError(
                f"The source is quantized already ({packing.bits} bits), and quantizing it again would add the errors of "
                "both: convert the original weights, or give a dtype instead to unpack these."
            )

    @property
    def group_size(self) -> int | None:
        return None if self._recipe is None else self._recipe[1].group_size

    @property
    def _overflows_in_float16(self) -> bool:
        return self._spec.family == "openelm" and self._spec.size == "3B"

    def weights(self, name: str, shape: Shape) -> list[PlannedWeight]:
        """How one parameter is written: as one weight, or, when it is packed and stays so, its parts as they are."""
        module = name.removesuffix(".weight")
        packing = self._contents.quantized.get(module) if name.endswith(".weight") else None
        if packing is None:
            return [self._plain(name, shape)]
        parts = [
            self._contents.parameters[f"{module}.{part}"]
            for part in PARTS
            if f"{module}.{part}" in self._contents.parameters
        ]
        if name in self._merges:
            return [self._merged(name, shape, parts, packing)]
        if self._is_unpacked(module):
            assert self._asked_type is not None
            tensor = _planned(name, shape, _TYPE_NAMES[self._asked_type], parts)
            return [PlannedWeight(tuple(parts), (tensor,), shape, dtype=self._asked_type, unpack=packing)]
        shapes = {part.name: (shape[0], *part.shape[1:]) for part in parts}
        return [
            PlannedWeight((part,), (_planned(part.name, shapes[part.name], part.dtype, [part]),), shapes[part.name])
            for part in parts
        ]

    def packing(self, name: str, shape: Shape) -> Quantization | None:
        """How the parameter is packed in the output."""
        module = name.removesuffix(".weight")
        is_packed = name.endswith(".weight") and module in self._contents.quantized
        if is_packed and not self._is_made_anew(name):
            return None if self._is_unpacked(module) else self._contents.quantized[module]
        return None if self._recipe is None else quantization_of(self._recipe, self._spec, name, shape)

    def plain_type(self, weights: list[PlannedWeight]) -> str:
        """The most frequent floating type of the output's tensors, by their sizes, in words."""
        types: Counter[str] = Counter()
        for tensor in (tensor for weight in weights for tensor in weight.tensors):
            if tensor.dtype in FLOAT_TYPES:
                types[tensor.dtype] += math.prod(tensor.shape)
        return TYPE_WORDS[types.most_common(1)[0][0]]

    def _is_unpacked(self, module: str) -> bool:
        return self._asked_type is not None and module in self._repackable

    def _is_made_anew(self, name: str) -> bool:
        """Whether a packed weight becomes what was asked for, whatever it was: one that an adapter is merged into."""
        return name in self._merges and (self._asked_type is not None or self._recipe is not None)

    def _plain(self, name: str, shape: Shape) -> PlannedWeight:
        source = self._contents.parameters[name]
        return self._written(name, shape, [source], FLOAT_TYPES[source.dtype])

    def _merged(self, name: str, shape: Shape, parts: list[Parameter], packing: Quantization) -> PlannedWeight:
        """A packed weight that is unpacked, changed, and packed again or not."""
        # Scales of the affine formats have the type that the rest was in.
        stored = next((FLOAT_TYPES[part.dtype] for part in parts if part.dtype in FLOAT_TYPES), mx.bfloat16)
        return replace(self._written(name, shape, parts, stored), unpack=packing)

    def _written(self, name: str, shape: Shape, sources: list[Parameter], stored: mx.Dtype) -> PlannedWeight:
        dtype = self._target_type(stored)
        pack = self.packing(name, shape)
        parts: Mapping[str, tuple[str, Shape]] = {"weight": (_TYPE_NAMES[dtype], shape)}
        if pack is not None:
            parts = pack.parts(shape, _TYPE_NAMES[dtype])
        module, _, last = name.rpartition(".")
        names = {part: name if part == "weight" else f"{module}.{part}" for part in parts}
        assert pack is None or last == "weight"
        tensors = tuple(_planned(names[part], part_shape, kind, sources) for part, (kind, part_shape) in parts.items())
        return PlannedWeight(tuple(sources), tensors, shape, dtype=dtype, pack=pack, merge=self._merges.get(name))

    def _target_type(self, stored: mx.Dtype) -> mx.Dtype:
        if self._asked_type is not None:
            return self._asked_type
        if self._overflows_in_float16:
            return mx.bfloat16
        if self._recipe is not None and stored == mx.float32:
            return mx.float16 if self._spec.family == "openelm" else mx.bfloat16
        return stored


def _planned(name: str, shape: Shape, dtype: str, sources: list[Parameter]) -> PlannedTensor:
    nbytes = OutputTensor(name, dtype, shape).nbytes
    stored = tuple(stored for source in sources for stored in source.sources)
    return PlannedTensor(name, shape, dtype, nbytes, stored, sources[0].shape, sources[0].dtype)
