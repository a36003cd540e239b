"""gpt-oss: every spelling of its config (Hugging Face's old and new, mlx-lm's, OpenAI's original), and its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..files import shown
from .fields import MOST_LAYERS, integer, positive, required, switch, tokens
from .model import Config, LayerSpec, ModelSpec, Shapes, YarnSpec, check_layers

_GPT_OSS_SIZES = {(24, 32): "20b", (36, 128): "120b"}
# What OpenAI's original config leaves out (gpt_oss/torch/model.py), and what Hugging Face's class assumes.
_GPT_OSS_NORM_EPS = 1e-5
_GPT_OSS_ROPE_THETA = 150000.0
_GPT_OSS_SWIGLU_LIMIT = 7.0
_GPT_OSS_SWIGLU_ALPHA = 1.702
_GPT_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
# <|return|>, <|endoftext|> and <|call|>; the generation config of the release forgets the last one. A vocabulary of
# another size is Harmony's where the config itself names one of them: a fine-tune's with more rows, or one cut to its tokens.
_HARMONY_VOCAB_SIZE = 201088
_HARMONY_STOPS = (200002, 199999, 200012)


class GptOss:
    """How gpt-oss configs are read, and which parameters such a model has."""

    @staticmethod
    def recognises(config: Config) -> bool:
        if config.get("model_type") is not None:
            return config["model_type"] == "gpt_oss"
        return {"num_experts", "experts_per_token", "swiglu_limit"} <= config.keys()  # OpenAI's original config

    @staticmethod
    def spec_from_config(config: Config) -> ModelSpec:
        # Hugging Face's names, and those of OpenAI's original/config.json where they differ.
        num_layers = integer(config, "num_hidden_layers", most=MOST_LAYERS)
        num_experts = integer(config, "num_local_experts", "num_experts")
        windows = _windows(config, num_layers)
        layers = tuple(
            LayerSpec(
                num_heads=integer(config, "num_attention_heads"),
                num_kv_heads=integer(config, "num_key_value_heads"),
                head_dim=integer(config, "head_dim"),
                intermediate_size=integer(config, "intermediate_size"),
                window=window,
                num_experts=num_experts,
                experts_per_token=integer(config, "num_experts_per_tok", "experts_per_token"),
            )
            for window in windows
        )
        check_layers(layers)
        _check_gpt_oss(config, layers[0])
        vocab_size = integer(config, "vocab_size")
        yarn = _yarn(config)
        named = tokens(config, "eos_token_id", None, vocab_size)
        is_harmony = vocab_size == _HARMONY_VOCAB_SIZE or bool(set(named) & set(_HARMONY_STOPS))
        stops = [token for token in _HARMONY_STOPS if is_harmony and token < vocab_size]
        return ModelSpec(
            family="gpt_oss",
            vocab_size=vocab_size,
            usable_vocab_size=vocab_size,
            hidden_size=integer(config, "hidden_size"),
            context_length=_gpt_oss_context_length(config, yarn),
            layers=layers,
            tied_head=switch(config, "tie_word_embeddings", False),
            norm_eps=positive(config, "rms_norm_eps", _GPT_OSS_NORM_EPS),
            rope_theta=positive(
                _rope_settings(config), "rope_theta", positive(config, "rope_theta", _GPT_OSS_ROPE_THETA)
            ),
            eos_tokens=tuple(dict.fromkeys((*named, *stops))),
            size=_GPT_OSS_SIZES.get((num_layers, num_experts)),
            yarn=yarn,
            swiglu_limit=positive(config, "swiglu_limit", _GPT_OSS_SWIGLU_LIMIT),
            swiglu_alpha=positive(config, "swiglu_alpha", _GPT_OSS_SWIGLU_ALPHA),
        )

    @staticmethod
    def keeps_float32(name: str) -> bool:
        # Gains are multiplied in float32, and routers decide near-ties; both are small.
        return name.endswith("norm.weight") or ".mlp.router." in name

    @staticmethod
    def parameter_shapes(spec: ModelSpec) -> Shapes:
        width = spec.hidden_size
        shapes: Shapes = {} if spec.only_layers else {"model.embed_tokens.weight": (spec.vocab_size, width)}
        for i, layer in enumerate(spec.layers):
            prefix, experts = f"model.layers.{i}", layer.num_experts
            qkv_width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
            shapes[f"{prefix}.input_layernorm.weight"] = (width,)
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (qkv_width, width)
            shapes[f"{prefix}.self_attn.qkv_proj.bias"] = (qkv_width,)
            shapes[f"{prefix}.self_attn.sinks"] = (layer.num_heads,)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, layer.num_heads * layer.head_dim)
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (width,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
            shapes[f"{prefix}.mlp.router.weight"] = (experts, width)
            shapes[f"{prefix}.mlp.router.bias"] = (experts,)
            shapes[f"{prefix}.mlp.experts.gate_up_proj.weight"] = (experts, 2 * layer.intermediate_size, width)
            shapes[f"{prefix}.mlp.experts.gate_up_proj.bias"] = (experts, 2 * layer.intermediate_size)
            shapes[f"{prefix}.mlp.experts.down_proj.weight"] = (experts, width, layer.intermediate_size)
            shapes[f"{prefix}.mlp.experts.down_proj.bias"] = (experts, width)
        if spec.only_layers:
            return shapes
        shapes["model.norm.weight"] = (width,)
        if not spec.tied_head:
            shapes["lm_head.weight"] = (spec.vocab_size, width)
        return shapes


def gpt_oss_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec as Hugging Face's config.json spells it, without a quantization; mlx-lm and transformers read it too."""
    layer = spec.layers[0]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": spec.eos_tokens[0] if len(spec.eos_tokens) == 1 else list(spec.eos_tokens),
        "experts_per_token": layer.experts_per_token,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "layer_types": ["full_attention" if each.window is None else "sliding_attention" for each in spec.layers],
        "max_position_embeddings": spec.context_length,
        "num_attention_heads": layer.num_heads,
        "num_experts_per_tok": layer.experts_per_token,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": layer.num_kv_heads,
        "num_local_experts": layer.num_experts,
        "rms_norm_eps": spec.norm_eps,
        # transformers 5 reads the first, all others (mlx-lm, mlx-swift-lm, llama.cpp) the second and third.
        "rope_parameters": {**(_yarn_config(spec.yarn) or {"rope_type": "default"}), "rope_theta": spec.rope_theta},
        "rope_scaling": _yarn_config(spec.yarn),
        "rope_theta": spec.rope_theta,
        "sliding_window": next((each.window for each in spec.layers if each.window is not None), None),
        "swiglu_alpha": spec.swiglu_alpha,
        "swiglu_limit": spec.swiglu_limit,
        "tie_word_embeddings": spec.tied_head,
        "vocab_size": spec.vocab_size,
    }


def _windows(config: Config, num_layers: int) -> list[int | None]:
    """Each layer's window; without `layer_types` every other layer slides, beginning with the first."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise ConfigError(
            f'The config\'s "layer_types" is {shown(kinds)}: it must hold {num_layers} times "sliding_attention" or '
            '"full_attention", one a layer.'
        )
    return [integer(config, "sliding_window") if kind == "sliding_attention" else None for kind in kinds]


def _check_gpt_oss(config: Config, layer: LayerSpec) -> None:
    if layer.experts_per_token > layer.num_experts:
        raise ConfigError(
            f"The config asks for {layer.experts_per_token} experts a token and has only {layer.num_experts}: "
            "one of the two numbers is wrong."
        )
    if layer.head_dim % 2:
        raise ConfigError(
            f"The config's head_dim is {layer.head_dim}: it must be even, rotary embedding rotates pairs."
        )
    if config.get("attention_bias", True) is not True:
        raise ConfigError('The config\'s "attention_bias" is not true: gpt-oss has a bias on q, k, v and o.')


def _gpt_oss_context_length(config: Config, yarn: YarnSpec | None) -> int:
    if config.get("max_position_embeddings") is not None:
        return integer(config, "max_position_embeddings")
    initial = integer(config, "initial_context_length")
    length = initial if yarn is None else int(initial * yarn.factor)
    return integer({"initial_context_length": length}, "initial_context_length")


def _rope_settings(config: Config) -> Config:
    """The settings of rotary embedding under one name, whichever of the four spellings the config has.

    transformers 5 writes `rope_parameters` (theta inside), earlier versions `rope_scaling`, OpenAI's original config
    five numbers; a Hugging Face config with none of them means its class's default, and null means no scaling.
    """
    if config.get("rope_scaling_factor") is not None:
        return {
            "rope_type": "yarn" if positive(config, "rope_scaling_factor") > 1 else "default",
            "factor": config["rope_scaling_factor"],
            "beta_fast": required(config, "rope_ntk_beta"),
            "beta_slow": required(config, "rope_ntk_alpha"),
            "truncate": False,
        }
    settings = config.get("rope_parameters") or config.get("rope_scaling", _GPT_OSS_YARN) or {}
    if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
        raise ConfigError(
            f"The config's rotary settings are {shown(settings)}: only one set of numbers for all layers is supported."
        )
    return settings


def _yarn(config: Config) -> YarnSpec | None:
    settings = _rope_settings(config)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f'The config\'s rotary scaling is {shown(kind)}: gpt-oss has "yarn", or "default" for none.')
    factor = positive(settings, "factor")
    names = {"original_max_position_embeddings": settings, "initial_context_length": config}
    original = next((integer(where, name) for name, where in names.items() if where.get(name)), None)
    return YarnSpec(
        factor=factor,
        original_context_length=integer(config, "initial_context_length") if original is None else original,
        beta_fast=positive(settings, "beta_fast", 32.0),
        beta_slow=positive(settings, "beta_slow", 1.0),
        truncate=switch(settings, "truncate", True),
        concentration=positive(settings, "attention_factor", 0.1 * math.log(factor) + 1.0),
    )


def _yarn_config(yarn: YarnSpec | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
        "attention_factor": yarn.concentration,
    }
