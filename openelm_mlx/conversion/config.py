"""The config.json of a converted folder: read by mlx-lm, Hugging Face's tools and this library alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..checkpoint.quantize import Quantization
from ..specs import ModelSpec, apple_shape, gpt_oss_config, openelm_config, spec_from_config

_CONFIGS = {"openelm": openelm_config, "gpt_oss": gpt_oss_config}
# auto_map names Python files that are not needed and do not come along; the others are written anew.
_DROPPED_FIELDS = ("auto_map", "_name_or_path", "quantization", "quantization_config", "dtype", "torch_dtype")

_BOTH_SPELLINGS = ("experts_per_token", "num_experts_per_tok", "rope_parameters", "rope_scaling", "rope_theta")


def output_config(
    config: Mapping[str, Any], spec: ModelSpec, packed: Mapping[str, Quantization], dtype: str
) -> dict[str, Any]:
    """The output's config.json: the source's own fields where it is of the Hugging Face kind, and what the spec says."""
    canonical = _CONFIGS[spec.family](spec)
    written = dict(canonical)
    if config.get("model_type") == spec.family:
        kept = {name: value for name, value in config.items() if name not in _DROPPED_FIELDS}
        written |= kept
        if spec_from_config({**kept, "vocab_size": spec.vocab_size}) != spec or not _has_lists(kept, spec):
            written |= canonical
    # Where two spellings are in use, both are written with the same value.
    if spec.family == "gpt_oss":
        written |= {name: canonical[name] for name in _BOTH_SPELLINGS}
    written |= apple_shape(spec) or {} if spec.family == "openelm" else {}
    written |= {"vocab_size": spec.vocab_size, "torch_dtype": dtype}
    if packed:
        # mlx-lm reads the first, Hugging Face's tools show the second.
        written["quantization"] = written["quantization_config"] = _quantization_config(packed)
    assert spec_from_config(written) == spec
    return written


def _quantization_config(packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """Module -> packing, as mlx-lm's config.json spells it: the most frequent one, and the modules that differ."""
    common = Counter(packed.values()).most_common(1)[0][0]
    exceptions = {module: packing.as_config() for module, packing in packed.items() if packing != common}
    return {**common.as_config(), **exceptions}


def _has_lists(config: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Whether the config gives OpenELM's per-layer numbers one by one: mlx-lm cannot spread a pair over the layers."""
    names = ("num_query_heads", "num_kv_heads", "ffn_multipliers") if spec.family == "openelm" else ()
    return all(isinstance(config.get(name), list) and len(config[name]) == len(spec.layers) for name in names)
