"""Which tensors of a gpt-oss checkpoint each parameter is made from, in every layout in circulation.

The canonical names are those of the Hugging Face files, with two exceptions: q, k and v are one `qkv_proj`, as in
OpenAI's original files, and expert matrices are modules with a `weight` (and `scales` where packed), gate and up
alternating.

    layout          written by                         attention   experts
    openai-hf       openai/gpt-oss-* on Hugging Face   q, k, v     MXFP4 gate_up_proj_blocks + _scales
    openai-original their folder original/             qkv         MXFP4 mlp1_weight.blocks + .scales
    hf-dense        dequantized repositories           q, k, v     gate_up_proj (E, in, out), or named _blocks
    mlx-lm          mlx-lm, mlx-community              q, k, v     gate_proj and up_proj apart, packed or not
    openelm-mlx     this library                       qkv_proj    gate_up_proj.weight + .scales

MXFP4 blocks are viewed as MLX's packed words, not converted: four successive bytes are one uint32. Nothing here reads a
tensor; a `make` is applied to arrays when their parameter is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..specs import ModelSpec
from .quantize import PARTS, Quantization, stored_quantization, wider
from .reader import TensorEntry

MXFP4 = Quantization(4, 32, "mxfp4")

# Canonical name -> name in OpenAI's original files; `.blocks` and `.scales` follow on the two expert matrices.
ORIGINAL_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.layers.{i}.input_layernorm.weight": "block.{i}.attn.norm.scale",
    "model.layers.{i}.self_attn.qkv_proj.weight": "block.{i}.attn.qkv.weight",
    "model.layers.{i}.self_attn.qkv_proj.bias": "block.{i}.attn.qkv.bias",
    "model.layers.{i}.self_attn.sinks": "block.{i}.attn.sinks",
    "model.layers.{i}.self_attn.o_proj.weight": "block.{i}.attn.out.weight",
    "model.layers.{i}.self_attn.o_proj.bias": "block.{i}.attn.out.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "block.{i}.mlp.norm.scale",
    "model.layers.{i}.mlp.router.weight": "block.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.router.bias": "block.{i}.mlp.gate.bias",
    "model.layers.{i}.mlp.experts.gate_up_proj.weight": "block.{i}.mlp.mlp1_weight",
    "model.layers.{i}.mlp.experts.gate_up_proj.bias": "block.{i}.mlp.mlp1_bias",
    "model.layers.{i}.mlp.experts.down_proj.weight": "block.{i}.mlp.mlp2_weight",
    "model.layers.{i}.mlp.experts.down_proj.bias": "block.{i}.mlp.mlp2_bias",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that must be in the checkpoint: its shape, and its safetensors type (None: any floating one)."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class Assembly:
    """How one parameter is made from the checkpoint's tensors.

    make: the arrays of `sources`, in order -> the parameter; None when the one source is it. dtype: the parameter's, by
    safetensors' name; None when it is that of its sources.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    make: Callable[..., mx.array] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class GptOssContents:
    """What a gpt-oss checkpoint holds: its layout, its parameters by canonical name, the packing of packed modules."""

    layout: str
    assemblies: dict[str, Assembly]
    quantized: dict[str, Quantization]


def gpt_oss_contents(entries: Mapping[str, TensorEntry], config: Mapping[str, Any], spec: ModelSpec) -> GptOssContents:
    """What each parameter is made of in a checkpoint with these tensors.

    The caller checks that every source is there, with its shape and type. Raises CheckpointError for names of an unknown
    layout, ConfigError for packed weights without a description.
    """
    layout = gpt_oss_layout(entries)
    assemblies: list[Assembly] = []
    quantized: dict[str, Quantization] = {}
    for name, shape in spec.parameter_shapes().items():
        module = name.rpartition(".")[0]
        if ".experts." in name and layout in ("openai-hf", "openai-original"):
            assemblies += _mxfp4_expert(layout, name, shape)
            quantized[module] = MXFP4
        elif ".experts." in name and layout == "hf-dense":
            assemblies.append(_dense_expert(name, shape, entries))
        else:
            assemblies += _from_modules(layout, name, shape, spec, entries, config, quantized)
    return GptOssContents(layout, {assembly.name: assembly for assembly in assemblies}, quantized)


def gpt_oss_layout(entries: Mapping[str, TensorEntry]) -> str:
    """The layout's name, from the names of the tensors, and from their types where one name has two meanings."""
    if any(name.startswith("block.") for name in entries):
        return "openai-original"
    if any(".self_attn.qkv_proj." in name for name in entries):
        return "openelm-mlx"
    if any(".experts.gate_proj." in name for name in entries):
        return "mlx-lm"
    for name, entry in entries.items():
        if name.endswith(".experts.gate_up_proj_blocks"):
            # transformers 5 saves a dequantized model under the names of the packed one.
            return "openai-hf" if entry.dtype == "U8" else "hf-dense"
        if name.endswith(".experts.gate_up_proj"):
            return "hf-dense"
    known = "openai/gpt-oss-* (Hugging Face or original), mlx-lm, or this library's"
    raise CheckpointError(f"The checkpoint's config says gpt-oss but none of its tensors has a name of {known} layout.")


def openai_tensors(spec: ModelSpec, layout: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors type, shape) of every tensor of a model in one of OpenAI's own layouts, in the order of use."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in spec.parameter_shapes().items():
        if ".experts." in name:
            assemblies = _mxfp4_expert(layout, name, shape)
        else:
            assemblies = _from_modules("hf" if layout == "openai-hf" else layout, name, shape, spec, {}, {}, {})
        sources = [source for assembly in assemblies for source in assembly.sources]
        tensors += [(source.name, source.dtype or "BF16", source.shape) for source in sources]
    return tensors


# --- experts as OpenAI and transformers store them --------------------------------------------------------------------


def _mxfp4_expert(layout: str, name: str, shape: tuple[int, ...]) -> list[Assembly]:
    """An expert matrix out of blocks (E, rows, groups, 16) and scales (E, rows, groups), or its bias."""
    stored = _original_name(name) if layout == "openai-original" else _hf_expert_name(name)
    if name.endswith(".bias"):
        return [Assembly(name, shape, (StoredTensor(stored, shape),))]
    separator = "." if layout == "openai-original" else "_"
    module = name.removesuffix(".weight")
    (_, weight_shape), (_, scales_shape) = MXFP4.parts(shape, "U8").values()
    blocks = StoredTensor(f"{stored}{separator}blocks", (*scales_shape, 16), "U8")
    scales = StoredTensor(f"{stored}{separator}scales", scales_shape, "U8")
    return [
        Assembly(f"{module}.weight", weight_shape, (blocks,), packed_words, "U32"),
        Assembly(f"{module}.scales", scales_shape, (scales,), None, "U8"),
    ]


def _dense_expert(name: str, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]) -> Assembly:
    """An expert matrix stored as (E, in, out), as transformers does, or as (E, out, in); or its bias."""
    stored = _hf_expert_name(name)
    if name.endswith(".bias"):
        return Assembly(name, shape, (StoredTensor(stored, shape),))
    if f"{stored}_blocks" in entries:
        stored = f"{stored}_blocks"
    if _is_rows_first(name, stored, shape, entries):
        return Assembly(name, shape, (StoredTensor(stored, shape),))
    return Assembly(name, shape, (StoredTensor(stored, (shape[0], shape[2], shape[1])),), transposed)


def _is_rows_first(name: str, stored: str, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a layer's experts are stored as (E, out, in): what its gate_up says, or its down when that is square.

    The down projection of both releases is square, so its shape does not tell.
    """
    is_down = ".down_proj." in name
    hidden, intermediate = shape[1:] if is_down else (shape[2], shape[1] // 2)
    for part, rows, columns in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
        entry = entries.get(stored.replace("down_proj" if is_down else "gate_up_proj", part))
        if entry is not None and rows != columns:
            return entry.shape[1:] == (rows, columns)
    return False


def packed_words(blocks: mx.array) -> mx.array:
    """MXFP4 blocks (E, rows, groups, 16) uint8 -> MLX's words (E, rows, groups * 4) uint32: the same bytes."""
    return blocks.view(mx.uint32).flatten(-2)


def transposed(weight: mx.array) -> mx.array:
    """(E, in, out) -> (E, out, in), a view."""
    return weight.swapaxes(-1, -2)


def _hf_expert_name(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(".weight") else f"{name.removesuffix('.bias')}_bias"


# --- modules stored whole, or in pieces -------------------------------------------------------------------------------


def _from_modules(
    layout: str,
    name: str,
    shape: tuple[int, ...],
    spec: ModelSpec,
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    quantized: dict[str, Quantization],
) -> list[Assembly]:
    """A parameter stored as it is, or whose rows are several modules' rows; where it is packed, all its parts."""
    module, _, part = name.rpartition(".")
    if layout == "openai-original":
        return [Assembly(name, shape, (StoredTensor(_original_name(name), shape),))]
    paths = _stored_modules(layout, module)
    if part != "weight" or not any(f"{path}.scales" in entries for path in paths):
        return [_joined(name, shape, [f"{path}.{part}" for path in paths], spec)]
    pieces = [
        _Piece.of(path, each, config, entries)
        for path, each in zip(paths, _piece_shapes(shape, len(paths), spec), strict=True)
    ]
    packings = [piece.packing for piece in pieces if piece.packing is not None]
    alike = len(packings) == len(pieces) and len({piece.scale_type for piece in pieces}) == 1
    if not alike or any(piece.has_global_scale for piece in pieces):
        return [_unpacked_and_joined(name, shape, pieces)]
    if len(set(packings)) == 1:
        quantized[module] = packings[0]
        return [
            _joined(f"{module}.{each}", part_shape, [f"{path}.{each}" for path in paths], spec, dtype)
            for each, (dtype, part_shape) in packings[0].parts(shape, pieces[0].scale_type).items()
        ]
    if all(packing.mode == "affine" for packing in packings):
        quantized[module] = _widest(packings)
        return [_widened_and_joined(module, each, shape, paths, packings, pieces[0].scale_type, spec) for each in PARTS]
    return [_unpacked_and_joined(name, shape, pieces)]


@dataclass(frozen=True)
class _Piece:
    """A module that holds some of a parameter's rows: its path, the shape of its weight, and its packing, if any.

    scale_type: the type of its scales; of the weight itself where it is not packed.
    """

    path: str
    shape: tuple[int, ...]
    packing: Quantization | None
    scale_type: str
    has_global_scale: bool

    @staticmethod
    def of(path: str, shape: tuple[int, ...], config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> _Piece:
        scales, weight = entries.get(f"{path}.scales"), entries.get(f"{path}.weight")
        packing = None if scales is None else stored_quantization(config, path, shape, entries)
        kind = (scales or weight or _NOTHING).dtype
        return _Piece(path, shape, packing, kind, f"{path}.global_scale" in entries)

    @property
    def parts(self) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """Part -> (safetensors type if only one is accepted, shape)."""
        if self.packing is None:
            return {"weight": (None, self.shape)}
        kinds: dict[str, tuple[str | None, tuple[int, ...]]] = {
            part: (kind if kind in ("U32", "U8") else None, shape)
            for part, (kind, shape) in self.packing.parts(self.shape, self.scale_type).items()
        }
        return kinds | ({"global_scale": (None, self.shape[:1])} if self.has_global_scale else {})


_NOTHING = TensorEntry("", "BF16", (), Path(), 0, 0)


def _widest(packings: list[Quantization]) -> Quantization:
    """The affine packing that can represent every number of these."""
    return Quantization(max(each.bits for each in packings), min(each.group_size for each in packings))


def _widened_and_joined(
    module: str,
    part: str,
    shape: tuple[int, ...],
    paths: list[str],
    packings: list[Quantization],
    scale_type: str,
    spec: ModelSpec,
) -> Assembly:
    """A part of pieces with different bits or groups (a mixed recipe gives v more than q and k), all in the widest packing."""
    target = _widest(packings)
    pieces = zip(paths, packings, _piece_shapes(shape, len(paths), spec), strict=True)
    stored = [(path, packing.parts(piece, scale_type)[part]) for path, packing, piece in pieces]
    packed_type = "U32" if part == "weight" else None
    sources = tuple(StoredTensor(f"{path}.{part}", piece, packed_type) for path, (_, piece) in stored)
    join = _JOINS[len(paths)]
    assert join is not None

    def make(*arrays: mx.array) -> mx.array:
        return join(*(wider(p, target.bits, target.group_size, part, a) for p, a in zip(packings, arrays, strict=True)))

    return Assembly(f"{module}.{part}", target.parts(shape, scale_type)[part][1], sources, make, packed_type)


def _joined(
    name: str, shape: tuple[int, ...], sources: list[str], spec: ModelSpec, dtype: str | None = None
) -> Assembly:
    packed_type = dtype if dtype in ("U32", "U8") else None
    shapes = _piece_shapes(shape, len(sources), spec)
    pieces = tuple(StoredTensor(source, each, packed_type) for source, each in zip(sources, shapes, strict=True))
    return Assembly(name, shape, pieces, _JOINS[len(sources)], packed_type)


def _unpacked_and_joined(name: str, shape: tuple[int, ...], pieces: list[_Piece]) -> Assembly:
    """Pieces that no single packing can represent (some not packed, or in two modes), unpacked into one matrix."""
    part_names = [list(piece.parts) for piece in pieces]
    sources = [
        StoredTensor(f"{piece.path}.{part}", part_shape, kind)
        for piece in pieces
        for part, (kind, part_shape) in piece.parts.items()
    ]
    # float32 if any piece is float32, so that nothing is rounded; else 16 bits, with bfloat16's range.
    kind = "F32" if any(piece.scale_type == "F32" for piece in pieces) else "BF16"
    dtype = mx.float32 if kind == "F32" else mx.bfloat16

    def make(*arrays: mx.array) -> mx.array:
        rest = iter(arrays)
        matrices = []
        for piece, names in zip(pieces, part_names, strict=True):
            parts = {part: next(rest) for part in names}
            plain = parts["weight"] if piece.packing is None else unpacked(piece.packing, parts)
            matrices.append(plain.astype(dtype))
        join = _JOINS[len(matrices)]
        return matrices[0] if join is None else join(*matrices)

    return Assembly(name, shape, tuple(sources), make, kind)


def unpacked(packing: Quantization, parts: Mapping[str, mx.array]) -> mx.array:
    """A packed weight in float32."""
    wide = {
        name: part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part
        for name, part in parts.items()
    }
    factor = wide.pop("global_scale", None)
    weight = packing.dequantize(wide, mx.float32)
    if factor is None:
        return weight
    # (E,): the largest number of each expert, which is stored as 448 (E4M3) times 6 (E2M1).
    return weight * (factor / (448 * 6)).reshape(-1, *[1] * (weight.ndim - 1))


def joined_rows(*pieces: mx.array) -> mx.array:
    """The rows of q, then k's, then v's."""
    return mx.concatenate(list(pieces), axis=0)


def interleaved_rows(gate: mx.array, up: mx.array) -> mx.array:
    """gate 0, up 0, gate 1, up 1, ... of each expert. Both (E, rows, ...) -> (E, 2 * rows, ...)"""
    return mx.stack([gate, up], axis=2).flatten(1, 2)


_JOINS: dict[int, Callable[..., mx.array] | None] = {1: None, 2: interleaved_rows, 3: joined_rows}


def _stored_modules(layout: str, module: str) -> list[str]:
    if layout == "openelm-mlx":
        return [module]
    if module.endswith(".qkv_proj"):
        return [module.removesuffix("qkv_proj") + each for each in ("q_proj", "k_proj", "v_proj")]
    if module.endswith(".gate_up_proj"):
        return [module.removesuffix("gate_up_proj") + each for each in ("gate_proj", "up_proj")]
    return [module]


def _piece_shapes(shape: tuple[int, ...], count: int, spec: ModelSpec) -> list[tuple[int, ...]]:
    """The shapes of a parameter's pieces: one; gate and up, half the rows of each expert; or q, k and v."""
    if count == 1:
        return [shape]
    if count == 2:
        return [(shape[0], shape[1] // 2, *shape[2:])] * 2
    layer = spec.layers[0]
    return [(heads * layer.head_dim, *shape[1:]) for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)]


def _original_name(name: str) -> str:
    number = next((part for part in name.split(".") if part.isdigit()), "")
    return ORIGINAL_NAMES[name.replace(f".{number}.", ".{i}.", 1)].format(i=number)
