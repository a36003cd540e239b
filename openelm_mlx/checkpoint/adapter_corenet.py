"""Adapters as Apple's CoreNet stores them (corenet/modeling/layers/lora): one PyTorch file that holds base and adapters.

A matrix that is adapted has its own weights under `base_layer`; A (r, in) and B (out, r) as PEFT's, of the embedding A
(r, vocab_size) and B (hidden_size, r). Factors are in the YAML of the run, by regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checks import is_whole
from ..errors import CheckpointError, SettingError
from ..files import shown
from ..models.adapter_targets import targets_of
from ..models.low_rank import Adapter, Pair
from ..outputs import output_file, write_output
from ..specs import ModelSpec
from .adapter_tensors import Placer, alpha_of, plain_pair
from .layouts import adapter_scale, adapter_settings, canonical_name, corenet_name
from .reader import Checkpoint, open_checkpoint, read_config
from .torch_writer import torch_file

_PARTS = re.compile(r"(?P<module>.+)\.lora_(?P<which>A|B|embedding_A|embedding_B|magnitude_vector)\.\w+(?:\.weight)?")


def read_corenet(place: Path, spec: ModelSpec) -> Adapter:
    """The adapters of CoreNet's checkpoint, a file or a folder; the base in it is not read. Raises CheckpointError."""
    checkpoint, config = open_checkpoint(place), read_config(place)
    if spec.family != "openelm":
        raise CheckpointError(
            f"{place} belongs to another model: CoreNet's are OpenELM, and this one is {spec.family}."
        )
    placer = Placer(spec, checkpoint.files[0])
    found: dict[str, dict[str, str]] = {}
    for tensor in checkpoint.entries:
        match = _PARTS.fullmatch(tensor)
        if match is not None:
            found.setdefault(match["module"], {})[match["which"]] = tensor
    use_rslora, dropout = False, 0.0
    for stored, parts in found.items():
        name = canonical_name(stored)
        if name is None:
            raise placer.other_model(stored)
        pair = _pair(stored, parts, checkpoint, placer)
        if placer.target(name).is_embedding:
            if pair.magnitude is not None:
                raise CheckpointError(f"{checkpoint.files[0]} has DoRA beside the embedding: LoRA alone is read there.")
            if pair.a.shape[0] > spec.vocab_size >= spec.usable_vocab_size:  # rows beyond are never a token
                pair = Pair(pair.a[: spec.vocab_size], pair.b, pair.scale)
        placer.put(name, Pair(pair.a, pair.b, adapter_scale(config, stored, pair.rank), pair.magnitude))
        settings = adapter_settings(config, stored)
        use_rslora = use_rslora or bool(settings.get("use_rslora"))
        given = settings.get("lora_dropout", 0.0)
        dropout = max(dropout, given) if isinstance(given, float) and 0 <= given < 1 else dropout
    return Adapter(placer.in_order(), use_rslora, dropout)


def _pair(stored: str, parts: Mapping[str, str], checkpoint: Checkpoint, placer: Placer) -> Pair:
    """One pair, without its factor."""
    prefix = "embedding_" if "embedding_A" in parts or "embedding_B" in parts else ""
    arrays = []
    for each, dimensions in ((f"{prefix}A", 2), (f"{prefix}B", 2), ("magnitude_vector", 1)):
        name = parts.get(each)
        if name is None:
            if each == "magnitude_vector":
                continue
            raise CheckpointError(
                f"{checkpoint.files[0]} has no lora_{each} of {stored}: a part of the adapter is missing."
            )
        entry = checkpoint.entries[name]
        if len(entry.shape) != dimensions or entry.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"Tensor {shown(name)} of {checkpoint.files[0]} is {entry.dtype} {list(entry.shape)}: a factor has "
                f"{dimensions} dimensions of floating numbers."
            )
        arrays.append(checkpoint.read(name))
    a, b, *magnitude = arrays
    return plain_pair(stored, checkpoint.files[0], a, b, magnitude[0] if magnitude else None)


def write_corenet(
    file: str | Path,
    adapter: Adapter,
    spec: ModelSpec,
    base: Iterable[tuple[str, mx.array]],
    model_config: Mapping[str, Any],
) -> Path:
    """Write `file`, a .pt that holds base and adapters as CoreNet's training saves them, and its YAML beside it.

    base: our name -> the base's weight, of every parameter. model_config: CoreNet's fields of the model. Raises
    DestinationError where the files exist, SettingError for another family or name.
    """
    path = Path(file)
    if spec.family != "openelm" or path.suffix != ".pt":
        what = f"the family is {spec.family}" if spec.family != "openelm" else f"the file is {shown(path.name)}"
        raise SettingError(
            f"CoreNet's adapters are OpenELM's, in a file that ends in .pt, and {what}: take another format."
        )
    targets = targets_of(spec)
    vocabulary = model_config.get("vocab_size", spec.vocab_size)
    # CoreNet's embedding has rows beyond the vocabulary, which are never a token.
    more = vocabulary - spec.vocab_size if is_whole(vocabulary) and vocabulary > spec.vocab_size else 0
    tensors: dict[str, mx.array] = {}
    for name, array in base:
        module, _, part = name.rpartition(".")
        if module in ("transformer.token_embeddings", "lm_head"):
            array = mx.pad(array, [(0, more), (0, 0)])
        stored = corenet_name(module)
        tensors[f"{stored}.base_layer.{part}" if module in adapter.pairs else f"{stored}.{part}"] = array
    entries = []
    for name, pair in adapter.pairs.items():
        stored, embedding = corenet_name(name), targets[name].is_embedding
        middle, end = ("embedding_", "") if embedding else ("", ".weight")
        a = mx.pad(pair.a.T, [(0, 0), (0, more)]) if embedding else pair.a.T
        tensors[f"{stored}.lora_{middle}A.lora{end}"] = mx.contiguous(a)
        tensors[f"{stored}.lora_{middle}B.lora{end}"] = mx.contiguous(pair.b.T)
        if pair.magnitude is not None:
            tensors[f"{stored}.lora_magnitude_vector.lora"] = pair.magnitude
        params = {
            "adapter_name": "lora",
            "r": pair.rank,
            "lora_alpha": alpha_of(pair, adapter.use_rslora),
            "lora_dropout": adapter.dropout,
            "init_lora_weights": True,
            "use_rslora": adapter.use_rslora,
            "use_dora": pair.magnitude is not None,
        }
        regex = re.escape(stored) + "$"
        entries.append({"regex": regex, "module_type": "embedding" if embedding else "linear", "params": params})
    config = {"base": dict(model_config), "lora": {"config": entries}}
    # JSON is YAML, and needs no library to be written.
    write_output(path.with_suffix(".yaml"), json.dumps(config, indent=2) + "\n", "The adapter's config")
    with output_file(path, "The adapter") as stream:
        torch_file(stream, tensors)
    return path
