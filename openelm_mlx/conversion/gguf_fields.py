"""The metadata of a GGUF file: the model's shape under llama.cpp's keys, tokenizer, chat template, origin, licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.gguf_names import ARCHITECTURES
from ..errors import CheckpointError, TokenizerError
from ..files import read_bytes, read_object
from ..specs import ModelSpec
from ..text import jinja
from ..text.chat import OPENELM_INSTRUCT
from ..text.gguf_vocabulary import CHAT_TEMPLATE, vocabulary_of
from ..text.tokenizer import Tokenizer
from .card import licence_files

# Keys of this library; other programs ignore them.
TEMPLATE_NAME = "openelm_mlx.chat_template"
LICENCES = "openelm_mlx.licences"
# llama.cpp's numbers for a file's main type (enum llama_ftype).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38,
}  # fmt: skip


def gguf_fields(
    spec: ModelSpec,
    tokenizer: Tokenizer | None,
    template: str | None,
    main_type: str,
    name: str,
    repo: str | None,
    folder: Path,
) -> dict[str, Any]:
    """Key -> value, without the architecture. template: the name of OpenELM's template. folder: with the source's licence."""
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name.split("/")[-1],
        "general.description": f"Converted from {name} by openelm_mlx {__version__}",
        "general.file_type": _FILE_TYPES[main_type],
        "general.quantization_version": 2,
    }
    if repo is not None:
        fields["general.source.url"] = f"https://huggingface.co/{repo}"
    shape = _openelm(spec) if spec.family == "openelm" else _gpt_oss(spec)
    fields |= {f"{ARCHITECTURES[spec.family]}.{key}": value for key, value in shape.items()}
    if tokenizer is not None:
        text = _template(spec, tokenizer, template)
        vocabulary = vocabulary_of(tokenizer).padded(spec.usable_vocab_size)
        fields |= vocabulary.fields(for_chat=text is not None)
        if text is not None:
            fields[CHAT_TEMPLATE] = text
    if template is not None:
        fields[TEMPLATE_NAME] = template
    licences = [(path.name, read_bytes(path, CheckpointError)) for path in licence_files(folder)]
    if licences:
        fields[LICENCES] = [part for title, text in licences for part in (title.encode(), text)]
    return fields


def _openelm(spec: ModelSpec) -> dict[str, Any]:
    head_dim = spec.layers[0].head_dim
    return {
        "block_count": len(spec.layers),
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": [layer.intermediate_size for layer in spec.layers],
        "attention.head_count": [layer.num_heads for layer in spec.layers],
        "attention.head_count_kv": [layer.num_kv_heads for layer in spec.layers],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(spec.rope_theta),
        "vocab_size": spec.usable_vocab_size,
    }


def _gpt_oss(spec: ModelSpec) -> dict[str, Any]:
    layer = spec.layers[0]
    shape: dict[str, Any] = {
        "block_count": len(spec.layers),
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": layer.intermediate_size,
        "expert_feed_forward_length": layer.intermediate_size,
        "expert_count": layer.num_experts,
        "expert_used_count": layer.experts_per_token,
        "attention.head_count": layer.num_heads,
        "attention.head_count_kv": layer.num_kv_heads,
        "attention.key_length": layer.head_dim,
        "attention.value_length": layer.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "attention.sliding_window": next(each.window for each in spec.layers if each.window is not None),
        "rope.dimension_count": layer.head_dim,
        "rope.freq_base": float(spec.rope_theta),
        "vocab_size": spec.usable_vocab_size,
    }
    if spec.yarn is not None:
        shape |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(spec.yarn.factor),
            "rope.scaling.original_context_length": spec.yarn.original_context_length,
            "rope.scaling.yarn_beta_fast": float(spec.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(spec.yarn.beta_slow),
        }
    return shape


def _template(spec: ModelSpec, tokenizer: Tokenizer, template: str | None) -> str | None:
    """The chat template in Jinja for other programs; None for a base model."""
    if spec.family == "openelm":
        return jinja.OPENELM_INSTRUCT if template == OPENELM_INSTRUCT else None
    files: Mapping[str, Path] = {path.name: path for path in tokenizer.files}
    if "chat_template.jinja" in files:
        return read_bytes(files["chat_template.jinja"], TokenizerError).decode("utf-8", "replace")
    config = read_object(files["tokenizer_config.json"], TokenizerError) if "tokenizer_config.json" in files else {}
    stored = config.get("chat_template")
    return stored if isinstance(stored, str) and stored else jinja.HARMONY
