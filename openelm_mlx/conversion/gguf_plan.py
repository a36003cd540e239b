"""Planning a GGUF file: the type of each tensor, and what it is made from.

llama.cpp needs vectors, biases and routers in float32. Matrices keep their type, packed ones if GGUF has a type for the
same numbers; they are rounded only when a type was requested.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.apart import apart, gpt_oss_pieces, openelm_pieces
from ..checkpoint.gguf_blocks import TYPES, GgmlType, carrier, to_blocks
from ..checkpoint.gguf_file import ALIGNMENT
from ..checkpoint.gguf_names import gguf_name
from ..checkpoint.gguf_writer import GgufOutputTensor, gguf_package
from ..checkpoint.layouts import FLOAT_TYPES, Contents, Parameter
from ..checkpoint.quantize import NOT_A_SCALE, PARTS, Quantization
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, ConversionError, SettingError
from ..files import shown
from ..specs import ModelSpec, YarnSpec
from .planned_weight import PlannedTensor, PlannedWeight, rows_in_a_slice
from .source_state import source_state

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
_SWIGLU = (7.0, 1.702)
_VOCABULARY = ("token_embd.weight", "output.weight")
_CUTS = {"openelm": openelm_pieces, "gpt_oss": gpt_oss_pieces}


@dataclass(frozen=True)
class GgufWeight:
    """One tensor of the file. weight: what it is made from. kind: its GGUF type.

    packing: the source's, if its codes are taken unchanged. was_free: no type was requested for it.
    """

    weight: PlannedWeight
    kind: GgmlType
    packing: Quantization | None = None
    was_free: bool = False

    @property
    def tensor(self) -> PlannedTensor:
        return self.weight.tensors[0]

    @property
    def is_exact(self) -> bool:
        """Whether the file has exactly the source's numbers."""
        if self.packing is not None or self.kind.name == "F32":
            return True
        if self.weight.unpack is not None:
            return self.weight.unpack.mode != "affine" and self.kind.name == "BF16"
        return self.kind.safetensors == self.weight.sources[0].dtype

    @property
    def is_unpacked(self) -> bool:
        """Whether packed groups become float32 because no GGUF type can hold them."""
        return self.weight.unpack is not None and self.kind.name == "F32" and self.was_free

    def pieces(self, checkpoint: Checkpoint) -> Iterator[bytes | memoryview]:
        """The tensor's bytes, some rows at a time, padded to the alignment. Raises the errors of `PlannedWeight.slices`."""
        rows = self._carried(checkpoint) if self.packing is not None else self._rounded(checkpoint)
        count = 0
        for piece in rows:
            count += len(piece)
            yield piece
        yield bytes(-count % ALIGNMENT)

    def _rounded(self, checkpoint: Checkpoint) -> Iterator[memoryview]:
        for (array,) in self.weight.slices(checkpoint):
            if self.kind.safetensors is not None:
                data = np.array(mx.contiguous(array).view(mx.uint8), copy=False)
            elif self.kind.name == "MXFP4":  # rounded by MLX, as `convert` does for folders
                packing = self.kind.packing
                assert packing is not None
                parts = packing.quantize(array)
                data = to_blocks(self.kind, np.array(parts["weight"]), np.array(parts["scales"]), None, packing)
            else:
                gguf = gguf_package()
                numbers = np.array(array.astype(mx.float32))
                data = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[self.kind.name])
            yield np.ascontiguousarray(data).reshape(-1).data

    def _carried(self, checkpoint: Checkpoint) -> Iterator[memoryview]:
        assert self.packing is not None
        arrays = self.weight.read(checkpoint)
        step = rows_in_a_slice(self.tensor.shape)
        for start in range(0, self.tensor.shape[0], step):
            # Padding rows after the last one are left out.
            stop = min(start + step, self.tensor.shape[0])
            words, *others = [array[start:stop] for array in arrays]
            scales, *biases = [_numbers(each) for each in others]
            bad = scales == NOT_A_SCALE if scales.dtype == np.uint8 else ~np.isfinite(scales)
            if np.any(bad) or any(not np.all(np.isfinite(each)) for each in biases):
                raise CheckpointError(
                    f"The scales of {self.weight.sources[0].name} contain NaN or infinity: the file is damaged; "
                    "download or copy it again."
                )
            blocks = to_blocks(self.kind, np.array(words), scales, biases[0] if biases else None, self.packing)
            yield np.ascontiguousarray(blocks).reshape(-1).data


@dataclass(frozen=True)
class GgufPlan:
    """The contents of a GGUF file to be written. spec: the source's."""

    spec: ModelSpec
    weights: tuple[GgufWeight, ...]

    @cached_property
    def weight_of(self) -> dict[str, GgufWeight]:
        """The tensors by their names in the file."""
        return {weight.tensor.name: weight for weight in self.weights}

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(weight.tensor for weight in self.weights)

    @property
    def outputs(self) -> tuple[GgufOutputTensor, ...]:
        """The same as the writer wants them."""
        return tuple(GgufOutputTensor(t.name, t.dtype, t.shape) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """Type -> number of tensors, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors).most_common())

    @property
    def main_type(self) -> str:
        """The type of most of the matrices' numbers."""
        count: Counter[str] = Counter()
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                count[tensor.dtype] += math.prod(tensor.shape)
        return count.most_common(1)[0][0]

    def fingerprint(self, source_files: Sequence[Path], header: bytes) -> str:
        """A hash of everything that the written bytes depend on: header, plan, source files, versions of mlx and gguf."""
        from importlib.metadata import version

        recipe = [(w.tensor, str(w.weight.dtype), w.weight.unpack, w.packing) for w in self.weights]
        text = repr([source_state(source_files), recipe, version("mlx"), version("gguf")])
        return hashlib.sha256(header + text.encode()).hexdigest()


def plan_gguf(
    contents: Contents,
    checkpoint: Checkpoint | None,
    gguf_type: str | None = None,
    gguf_experts: str | None = None,
) -> GgufPlan:
    """Plan a GGUF file.

    checkpoint: to check whether scales of packed groups fit float16; None assumes that they do. gguf_type: for matrices;
    None keeps their numbers. gguf_experts: for gpt-oss's experts; None keeps MXFP4, and means `gguf_type` for others.

    Raises SettingError for unknown types, ConversionError for a model that llama.cpp cannot run and for a type that a
    matrix cannot have.
    """
    asked = _checked_type("gguf_type", gguf_type)
    experts = _checked_type("gguf_experts", gguf_experts)
    if experts is not None and contents.spec.family != "gpt_oss":
        raise SettingError(f"gguf_experts is {gguf_experts}, and OpenELM has no experts: leave it out.")
    _check_llama_cpp(contents.spec)
    cut, shapes = apart(contents, _CUTS[contents.spec.family])
    usable = contents.spec.usable_vocab_size
    weights = []
    for name, shape in shapes.items():
        # Padding rows of a vocabulary were never trained, and other programs would treat them as tokens.
        rows = (usable, *shape[1:]) if gguf_name(contents.spec.family, name) in _VOCABULARY else shape
        weights.append(_weight(name, rows, cut, checkpoint, experts if ".experts." in name else None, asked))
    return GgufPlan(contents.spec, tuple(weights))


def _weight(
    name: str,
    shape: tuple[int, ...],
    contents: Contents,
    checkpoint: Checkpoint | None,
    experts: GgmlType | None,
    asked: GgmlType | None,
) -> GgufWeight:
    module = name.removesuffix(".weight")
    packing = contents.quantized.get(module) if name.endswith(".weight") else None
    names = (
        [name]
        if packing is None
        else [f"{module}.{part}" for part in PARTS if f"{module}.{part}" in contents.parameters]
    )
    parts = tuple(contents.parameters[each] for each in names)
    exact = _exact_type(parts, packing, checkpoint)
    kind = _chosen(name, shape, packing, exact, experts, asked)
    if not kind.fits(shape):
        raise ConversionError(
            f"{name} has {shape[-1]:,} columns, which {kind.name} cannot hold: it has blocks of {kind.block}; choose f32, f16 "
            "or bf16."
        )
    title = gguf_name(contents.spec.family, name)
    stored = tuple(source for part in parts for source in part.sources)
    planned = PlannedTensor(title, shape, kind.name, kind.nbytes(shape), stored, parts[0].shape, parts[0].dtype)
    if packing is not None and kind == exact and kind.bits is not None:
        return GgufWeight(PlannedWeight(parts, (planned,), shape), kind, packing)
    dtype = mx.float32 if kind.safetensors is None else FLOAT_TYPES[kind.safetensors]
    return GgufWeight(
        PlannedWeight(parts, (planned,), shape, dtype=dtype, unpack=packing), kind, was_free=(experts or asked) is None
    )


def _chosen(
    name: str,
    shape: tuple[int, ...],
    packing: Quantization | None,
    exact: GgmlType,
    experts: GgmlType | None,
    asked: GgmlType | None,
) -> GgmlType:
    """The type of one tensor."""
    if len(shape) == 1 or name.endswith(".bias") or ".mlp.router." in name:
        return TYPES["F32"]
    if experts is not None:
        return experts
    if ".experts." in name and packing is not None and packing.mode == "mxfp4":
        return TYPES["MXFP4"]  # as the model was trained, unless --gguf-experts says otherwise
    return exact if asked is None else asked


def _exact_type(parts: Sequence[Parameter], packing: Quantization | None, checkpoint: Checkpoint | None) -> GgmlType:
    """The smallest type that holds a weight exactly."""
    if packing is None:
        return next(kind for kind in TYPES.values() if kind.safetensors == parts[0].dtype)
    if packing.mode != "affine":
        # 8-bit and 4-bit floats times a power of two or an 8-bit float fit bfloat16 exactly.
        return carrier(packing, np.ones(1, np.float32), None) or TYPES["BF16"]
    scales = biases = np.ones(1, np.float32)
    if checkpoint is not None:
        read = [part.read(checkpoint).astype(mx.float32) for part in parts[1:]]
        scales, biases = (np.array(each) for each in read)
    return carrier(packing, scales, biases) or TYPES["F32"]


def _checked_type(option: str, value: str | None) -> GgmlType | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in GGUF_TYPES:
        raise SettingError(f"{option} is {shown(value)}: choose {', '.join(GGUF_TYPES)}.")
    return TYPES[value.upper()]


def _check_llama_cpp(spec: ModelSpec) -> None:
    """Raise ConversionError if the model differs from what is hard-coded in llama.cpp for its family."""
    reason = _openelm_reason(spec) if spec.family == "openelm" else _gpt_oss_reason(spec)
    if reason is not None:
        raise ConversionError(f"llama.cpp cannot run this model: {reason}. Convert it to a folder instead.")


def _openelm_reason(spec: ModelSpec) -> str | None:
    if not spec.tied_head:
        return "its OpenELM uses the embedding as output head, and this model has an untied head"
    if not spec.qk_norm:
        return "its OpenELM normalizes queries and keys, and this model does not"
    return None


def _gpt_oss_reason(spec: ModelSpec) -> str | None:
    if spec.tied_head:
        return "its gpt-oss needs an untied output head, and this model's head is its embedding"
    if any((layer.window is None) != bool(i % 2) for i, layer in enumerate(spec.layers)):
        return "its gpt-oss has a sliding window in every other layer from the first on, and this model in other layers"
    if (spec.swiglu_limit, spec.swiglu_alpha) != _SWIGLU:
        return "its activation has limit 7 and slope 1.702, and this model has other values"
    if spec.yarn is not None and not _is_usual(spec.yarn):
        return "its YaRN has the usual concentration and bounds, and this model has other values"
    return None


def _is_usual(yarn: YarnSpec) -> bool:
    usual = 0.1 * math.log(yarn.factor) + 1.0
    return math.isclose(yarn.concentration, usual, rel_tol=1e-6) and (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


def _numbers(array: mx.array) -> np.ndarray[Any, Any]:
    return np.array(array if array.dtype == mx.uint8 else array.astype(mx.float32))
