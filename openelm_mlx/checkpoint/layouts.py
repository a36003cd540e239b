"""Checkpoint layouts: which names each of them gives to tensors, and how a model's parameters are made from these tensors.

The canonical names are those of Apple's Hugging Face files; mlx-lm, mlx-community and this library use them too.

    layout      written by                                names                     rows   head when not tied
    apple-hf    apple/OpenELM-* on Hugging Face           transformer.layers.0...   32000  lm_head (and an unused classifier)
    mlx-lm      mlx-lm, mlx-community, this library       the same, + .scales ...   32000  lm_head
    corenet     CoreNet's training (.pt)                  layers.0...               32128  classifier
    apple-mlx   Apple's converter (mlx_examples/open_elm) layers.0..., + .scales    32128  classifier
    corenet-adapters  CoreNet's LoRA and DoRA training    layers.0...base_layer, lora_A.lora, lora_B.lora, ...

gpt-oss has a table of its own, gpt_oss_layouts.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, ConfigError
from ..files import shown
from ..models.low_rank import factor
from ..specs import ModelSpec
from .cuts import Cut, read_cut
from .gpt_oss_layouts import gpt_oss_contents
from .patterns import fits
from .quantize import Quantization, stored_quantization
from .reader import Checkpoint, TensorEntry

FLOAT_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

# Canonical name -> CoreNet's (and Apple's MLX) name; Apple's Hugging Face files and mlx-lm use the canonical one.
OPENELM_CORENET_NAMES = {
    "transformer.token_embeddings": "token_embeddings",
    "transformer.layers.{i}.attn_norm": "layers.{i}.attn_norm",
    "transformer.layers.{i}.attn.qkv_proj": "layers.{i}.attn.qkv_proj",
    "transformer.layers.{i}.attn.q_norm": "layers.{i}.attn.q_norm",
    "transformer.layers.{i}.attn.k_norm": "layers.{i}.attn.k_norm",
    "transformer.layers.{i}.attn.out_proj": "layers.{i}.attn.out_proj",
    "transformer.layers.{i}.ffn_norm": "layers.{i}.ffn_norm",
    "transformer.layers.{i}.ffn.proj_1": "layers.{i}.ffn.proj_1",
    "transformer.layers.{i}.ffn.proj_2": "layers.{i}.ffn.proj_2",
    "transformer.norm": "norm",
    "lm_head": "classifier",
}
# Apple's Hugging Face class leaves a second, unused head in untied files.
OPENELM_UNUSED = ("transformer.classifier.weight",)


@dataclass(frozen=True)
class Parameter:
    """How one parameter of the model is made: from which of the checkpoint's tensors, and by which function.

    name: canonical, e.g. "transformer.norm.weight". make: the arrays of `sources`, in order -> the parameter;
    None when the one source is it. dtype: safetensors' name of the stored type. cut: what a machine keeps of it that shares
    the model with others; shape is the shape of that then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    make: Callable[..., mx.array] | None = None
    cut: Cut | None = None

    @property
    def module(self) -> str:
        """The path of the module that has this parameter."""
        return self.name.rpartition(".")[0]

    def read(self, checkpoint: Checkpoint) -> mx.array:
        """The parameter, lazy: nothing is read before it is evaluated, but for long parts of a tensor (cuts.py)."""
        if self.cut is not None:
            return read_cut(checkpoint, self.sources, self.make, self.cut)
        arrays = [checkpoint.read(source) for source in self.sources]
        return arrays[0] if self.make is None else self.make(*arrays)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: the model's spec, the layout's name, and the parameters by canonical name.

    quantized: module path -> how its weight is packed, for modules that are.
    """

    spec: ModelSpec
    layout: str
    parameters: dict[str, Parameter]
    quantized: dict[str, Quantization]


def understand(checkpoint: Checkpoint, config: Mapping[str, Any], spec: ModelSpec) -> Contents:
    """Match the checkpoint's tensors with the parameters that `spec` has, by headers alone.

    Raises CheckpointError for a tensor that is missing, unknown, or has another shape or type than the config says.
    """
    if spec.family == "gpt_oss":
        return _understand_gpt_oss(checkpoint, config, spec)
    if any(".base_layer." in name for name in checkpoint.entries):
        return _understand_adapters(checkpoint, config, spec)
    return _understand_openelm(checkpoint, config, spec)


def _understand_openelm(checkpoint: Checkpoint, config: Mapping[str, Any], spec: ModelSpec) -> Contents:
    entries = dict(checkpoint.entries)
    for name in OPENELM_UNUSED:
        entries.pop(name, None)
    has_prefix = any(name.startswith("transformer.") for name in entries)
    is_quantized = any(name.endswith(".scales") for name in entries)
    layout = ("mlx-lm" if is_quantized else "apple-hf") if has_prefix else ("apple-mlx" if is_quantized else "corenet")
    parameters: dict[str, Parameter] = {}
    quantized: dict[str, Quantization] = {}
    for name, shape in spec.parameter_shapes().items():
        module = name.removesuffix(".weight")
        stored = module if has_prefix else corenet_name(module)
        expected: Mapping[str, tuple[str | None, tuple[int, ...]]] = {"weight": (None, shape)}
        if f"{stored}.scales" in entries:
            quantization = stored_quantization(config, stored, shape, entries)
            quantized[module] = quantization
            expected = quantization.parts(shape, entries[f"{stored}.scales"].dtype)
        for part, (dtype, part_shape) in expected.items():
            entry = entries.pop(f"{stored}.{part}", None)
            found = _checked(entry, f"{stored}.{part}", part_shape, dtype, checkpoint)
            parameters[f"{module}.{part}"] = Parameter(f"{module}.{part}", part_shape, found.dtype, (found.name,))
    _refuse_leftovers(entries, checkpoint)
    return Contents(spec, layout, parameters, quantized)


def _understand_gpt_oss(checkpoint: Checkpoint, config: Mapping[str, Any], spec: ModelSpec) -> Contents:
    found = gpt_oss_contents(checkpoint.entries, config, spec)
    parameters: dict[str, Parameter] = {}
    for name, assembly in found.assemblies.items():
        sources = [
            _checked(checkpoint.entries.get(source.name), source.name, source.shape, source.dtype, checkpoint)
            for source in assembly.sources
        ]
        dtype = assembly.dtype or sources[0].dtype
        parameters[name] = Parameter(name, assembly.shape, dtype, tuple(s.name for s in sources), assembly.make)
    used = {source for parameter in parameters.values() for source in parameter.sources}
    _refuse_leftovers({name: entry for name, entry in checkpoint.entries.items() if name not in used}, checkpoint)
    return Contents(spec, found.layout, parameters, found.quantized)


# --- LoRA and DoRA --------------------------------------------------------------------------------------------------


def _understand_adapters(checkpoint: Checkpoint, config: Mapping[str, Any], spec: ModelSpec) -> Contents:
    """CoreNet's adapter checkpoints (corenet/modeling/layers/lora): base and adapters, merged as they are read.

    The adapter of the embedding changes the model's input only: a tied head goes on using the plain embedding, so the
    merged model has a head of its own.
    """
    entries = dict(checkpoint.entries)
    adapts_embedding = "token_embeddings.lora_embedding_A.lora" in entries
    merged_spec = dataclasses.replace(spec, tied_head=spec.tied_head and not adapts_embedding)
    parameters: dict[str, Parameter] = {}
    for name, shape in merged_spec.parameter_shapes().items():
        stored = corenet_name(name.removesuffix(".weight"))
        if name == "lm_head.weight" and spec.tied_head:
            base = f"{corenet_name('transformer.token_embeddings')}.base_layer.weight"
            entry = _checked(entries.get(base), base, shape, None, checkpoint)
            parameters[name] = Parameter(name, shape, entry.dtype, (base,))
            continue
        parameters[name] = _merged_parameter(name, shape, stored, entries, config, checkpoint)
    used = {source for parameter in parameters.values() for source in parameter.sources}
    _refuse_leftovers({name: entry for name, entry in entries.items() if name not in used}, checkpoint)
    return Contents(merged_spec, "corenet-adapters", parameters, {})


def _merged_parameter(
    name: str,
    shape: tuple[int, ...],
    stored: str,
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
) -> Parameter:
    base = f"{stored}.base_layer.weight"
    if base not in entries:
        entry = _checked(entries.get(f"{stored}.weight"), f"{stored}.weight", shape, None, checkpoint)
        return Parameter(name, shape, entry.dtype, (entry.name,))
    entry = _checked(entries[base], base, shape, None, checkpoint)
    embedding = f"{stored}.lora_embedding_A.lora" in entries
    pair = (
        ("lora_embedding_A.lora", "lora_embedding_B.lora")
        if embedding
        else ("lora_A.lora.weight", "lora_B.lora.weight")
    )
    rank_source = entries.get(f"{stored}.{pair[0]}")
    if rank_source is None or not rank_source.shape:
        return Parameter(name, shape, entry.dtype, (base,))
    rank = rank_source.shape[0]
    rows, columns = shape
    pair_shapes = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
    sources = [base]
    for part, part_shape in zip(pair, pair_shapes, strict=True):
        sources.append(_checked(entries.get(f"{stored}.{part}"), f"{stored}.{part}", part_shape, None, checkpoint).name)
    scale = adapter_scale(config, stored, rank)
    magnitude = f"{stored}.lora_magnitude_vector.lora"
    if magnitude in entries:
        sources.append(_checked(entries[magnitude], magnitude, (rows,), None, checkpoint).name)
        return Parameter(name, shape, entry.dtype, tuple(sources), lambda w, a, b, m: merge_dora(w, a, b, m, scale))
    if embedding:
        # Stored transposed: A (r, vocab), B (D, r).
        return Parameter(name, shape, entry.dtype, tuple(sources), lambda w, a, b: merge_lora(w, b.T, a.T, scale))
    return Parameter(name, shape, entry.dtype, tuple(sources), lambda w, a, b: merge_lora(w, a, b, scale))


def merge_lora(weight: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """W + scale * B A. weight (out, in), a (r, in), b (out, r). Computed in float32, rounded once."""
    delta = b.astype(mx.float32) @ a.astype(mx.float32)
    return (weight.astype(mx.float32) + scale * delta).astype(weight.dtype)


def merge_dora(weight: mx.array, a: mx.array, b: mx.array, magnitude: mx.array, scale: float) -> mx.array:
    """magnitude * V / |V| by rows, V = W + scale * B A (arXiv 2402.09353, eq. 5). magnitude (out,)."""
    v = merge_lora(weight.astype(mx.float32), a, b, scale)
    norm = mx.linalg.norm(v, axis=1, keepdims=True)
    return (magnitude.astype(mx.float32)[:, None] * v / norm).astype(weight.dtype)


def adapter_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r (or alpha / sqrt(r)) of a module's adapter, named as CoreNet does. Raises ConfigError, CheckpointError."""
    params = adapter_settings(config, module)
    if params.get("r") not in (None, rank):
        raise CheckpointError(
            f"The adapter of {module} has rank {rank} and its config says {shown(params['r'])}: the config belongs to "
            "another checkpoint."
        )
    alpha = params.get("lora_alpha", rank)
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise ConfigError(f"The config's lora_alpha of {module} is {shown(alpha)}: it must be a number above 0.")
    return factor(alpha, rank, bool(params.get("use_rslora")))


def adapter_settings(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of the first entry of the config's adapter list whose pattern fits the module. Raises ConfigError."""
    for entry in _adapter_entries(config):
        if fits(f"^(?:{str(entry.get('regex', ''))[:1000]})", module):
            params = entry.get("params", {})
            if not isinstance(params, Mapping):
                raise ConfigError(
                    f"The config's settings of the adapter of {module} are {shown(params)}: expected numbers by name."
                )
            return params
    raise ConfigError(
        f"The checkpoint has an adapter on {module} and the config names no lora_alpha for it: put CoreNet's adapter "
        'config (the YAML with "lora: config:") beside the weights.'
    )


def _adapter_entries(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    model = config.get("model")
    inner = model.get("language_modeling") if isinstance(model, Mapping) else None
    for parent in (config, model, inner):
        lora = parent.get("lora") if isinstance(parent, Mapping) else None
        if isinstance(lora, Mapping) and isinstance(lora.get("config"), list):
            return [entry for entry in lora["config"] if isinstance(entry, Mapping)]
    return []


# --- checks ---------------------------------------------------------------------------------------------------------


def _checked(
    entry: TensorEntry | None, name: str, shape: tuple[int, ...], dtype: str | None, checkpoint: Checkpoint
) -> TensorEntry:
    files = ", ".join(file.name for file in checkpoint.files[:3])
    if entry is None:
        raise CheckpointError(
            f"The checkpoint ({files}) has no tensor {name}, which the config requires: the two do not belong together, "
            "or a file is missing."
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"Tensor {name} in {entry.file.name} has shape {list(entry.shape)} and the config requires {list(shape)}: "
            "the two do not belong together."
        )
    if entry.dtype != dtype if dtype is not None else entry.dtype not in FLOAT_TYPES:
        wanted = dtype or " or ".join(FLOAT_TYPES)
        raise CheckpointError(f"Tensor {name} in {entry.file.name} has type {entry.dtype}; {wanted} is needed there.")
    return entry


def _refuse_leftovers(entries: Mapping[str, TensorEntry], checkpoint: Checkpoint) -> None:
    # Not of a weight's type: masks and the like, which other programs store too.
    names = sorted(name for name, entry in entries.items() if entry.is_usable)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"The checkpoint ({checkpoint.files[0].name}) has tensors that the config's model does not: "
            f"{', '.join(names[:3])}{more}. The two do not belong together."
        )


def canonical_name(stored: str) -> str | None:
    """Our name of a module that CoreNet names so; None for a module that no OpenELM has."""
    number = next((part for part in stored.split(".") if part.isdigit()), None)
    pattern = stored if number is None else stored.replace(f".{number}.", ".{i}.", 1)
    found = next((ours for ours, theirs in OPENELM_CORENET_NAMES.items() if theirs == pattern), None)
    return None if found is None else found.format(i=number)


def corenet_name(module: str) -> str:
    """CoreNet's name of a module."""
    number = next((part for part in module.split(".") if part.isdigit()), None)
    pattern = module if number is None else module.replace(f".{number}.", ".{i}.", 1)
    return OPENELM_CORENET_NAMES[pattern].format(i=number)
