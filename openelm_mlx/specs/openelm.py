"""OpenELM: every spelling of its config (Apple's, mlx-lm's, CoreNet's YAML, Apple's MLX), and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..files import shown
from .fields import MOST_LAYERS, integer, numbers, per_layer, positive, required, switch, token, tokens
from .model import Config, LayerSpec, ModelSpec, Shapes, check_layers

# CoreNet's table of released sizes (corenet/modeling/models/language_modeling/general_gpt.py, `gpt_configs`).
_RELEASED_SIZES = {
    "270M": {"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64},
    "450M": {"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64},
    "1.1B": {"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64},
    "3B": {"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128},
}
_RELEASED_COMMON: dict[str, Any] = {
    "num_gqa_groups": 4,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "ffn_multipliers": (0.5, 4.0),
    "qkv_multipliers": (0.5, 1.0),
    "ffn_dim_divisor": 256,
    "rope_freq_constant": 10000,
}
# A constant in Apple's code; no config.json of the family has it.
OPENELM_NORM_EPS = 1e-6


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to a multiple of `divisor`, never below 90 % of it (corenet/utils/math_utils.py)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def layer_multipliers(value: Any, num_layers: int, name: str) -> list[float]:
    """One multiplier a layer, from a number, a (first, last) pair or a list of `num_layers`.

    A pair is spread evenly over the layers and rounded to two decimals, as CoreNet's GPTConfig does.
    """
    if type(value) in (int, float):
        return numbers([value], name) * num_layers
    given = numbers(value, name)
    if len(given) == 2:
        first, last = given
        step = (last - first) / max(num_layers - 1, 1)
        values = [first + i * step for i in range(num_layers - 1)] + [last if num_layers > 1 else first]
        return [round(value, 2) for value in values]
    if len(given) != num_layers:
        raise ConfigError(
            f'The config\'s "{name}" has {len(given)} values for {num_layers} layers: give one number, a pair, '
            "or one value a layer."
        )
    return given


class OpenELM:
    """How OpenELM configs are read, and which parameters such a model has."""

    @staticmethod
    def recognises(config: Config) -> bool:
        return config.get("model_type") == "openelm" or _corenet_model(config) is not None

    @staticmethod
    def spec_from_config(config: Config) -> ModelSpec:
        config = _with_released_values(config)
        _refuse_other_mathematics(config)
        num_layers = integer(config, "num_transformer_layers", most=MOST_LAYERS)
        model_dim = integer(config, "model_dim")
        head_dim = integer(config, "head_dim")
        heads = _query_heads(config, num_layers, model_dim, head_dim)
        kv_heads = _kv_heads(config, heads)
        divisor = integer(config, "ffn_dim_divisor")
        ffn = [
            make_divisible(m * model_dim, divisor)
            for m in layer_multipliers(required(config, "ffn_multipliers"), num_layers, "ffn_multipliers")
        ]
        vocab_size = integer(config, "vocab_size")
        layers = tuple(
            LayerSpec(num_heads=h, num_kv_heads=kv, head_dim=head_dim, intermediate_size=f)
            for h, kv, f in zip(heads, kv_heads, ffn, strict=True)
        )
        check_layers(layers)
        return ModelSpec(
            family="openelm",
            vocab_size=vocab_size,
            # CoreNet's padding token is the first row that is not a word.
            usable_vocab_size=min(
                vocab_size, integer(config, "padding_index") if config.get("padding_index") else vocab_size
            ),
            hidden_size=model_dim,
            context_length=integer(config, "max_context_length"),
            layers=layers,
            tied_head=switch(config, "share_input_output_layers"),
            norm_eps=OPENELM_NORM_EPS,
            rope_theta=positive(config, "rope_freq_constant"),
            qk_norm=switch(config, "normalize_qk_projections"),
            # Apple's configs say 1 and 2; CoreNet's YAML leaves both out, with the same Llama tokenizer.
            bos_token=token(config, "bos_token_id", config.get("bos_token_id", 1), vocab_size),
            eos_tokens=tokens(config, "eos_token_id", 2, vocab_size),
            size=_size_name(num_layers, model_dim),
        )

    @staticmethod
    def keeps_float32(name: str) -> bool:
        return False

    @staticmethod
    def parameter_shapes(spec: ModelSpec) -> Shapes:
        width = spec.hidden_size
        shapes: Shapes = {} if spec.only_layers else {"transformer.token_embeddings.weight": (spec.vocab_size, width)}
        for i, layer in enumerate(spec.layers):
            prefix = f"transformer.layers.{i}"
            qkv_heads = layer.num_heads + 2 * layer.num_kv_heads
            shapes[f"{prefix}.attn_norm.weight"] = (width,)
            shapes[f"{prefix}.attn.qkv_proj.weight"] = (qkv_heads * layer.head_dim, width)
            if spec.qk_norm:
                shapes[f"{prefix}.attn.q_norm.weight"] = (layer.head_dim,)
                shapes[f"{prefix}.attn.k_norm.weight"] = (layer.head_dim,)
            shapes[f"{prefix}.attn.out_proj.weight"] = (width, layer.num_heads * layer.head_dim)
            shapes[f"{prefix}.ffn_norm.weight"] = (width,)
            shapes[f"{prefix}.ffn.proj_1.weight"] = (2 * layer.intermediate_size, width)
            shapes[f"{prefix}.ffn.proj_2.weight"] = (width, layer.intermediate_size)
        if spec.only_layers:
            return shapes
        shapes["transformer.norm.weight"] = (width,)
        if not spec.tied_head:
            shapes["lm_head.weight"] = (spec.vocab_size, width)
        return shapes


def apple_shape(spec: ModelSpec) -> dict[str, Any] | None:
    """The fields by which Apple's own configs give widths and heads, where they give those of this model; else None.

    mlx-swift-lm reads the divisor alone, and computes everything else by Apple's rule.
    """
    common, num_layers = _RELEASED_COMMON, len(spec.layers)
    divisor, groups = int(common["ffn_dim_divisor"]), int(common["num_gqa_groups"])
    ffn = layer_multipliers(common["ffn_multipliers"], num_layers, "ffn_multipliers")
    qkv = layer_multipliers(common["qkv_multipliers"], num_layers, "qkv_multipliers")
    for layer, width, share in zip(spec.layers, ffn, qkv, strict=True):
        heads = make_divisible(spec.hidden_size * share, layer.head_dim * groups) // layer.head_dim
        wanted = (heads, heads // groups, make_divisible(spec.hidden_size * width, divisor))
        if (layer.num_heads, layer.num_kv_heads, layer.intermediate_size) != wanted:
            return None
    if num_layers < 2:
        return None
    return {"ffn_dim_divisor": divisor, "ffn_multipliers": ffn, "qkv_multipliers": list(common["qkv_multipliers"])}


def openelm_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec as Apple's Hugging Face config.json spells it, lists expanded, so that mlx-lm reads it too."""
    # With divisor 1 a width is the multiplier times model_dim, exactly: no rounding rule has to be known.
    exact = {
        "ffn_dim_divisor": 1,
        "ffn_multipliers": [layer.intermediate_size / spec.hidden_size for layer in spec.layers],
    }
    return {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "activation_fn_name": "swish",
        "bos_token_id": spec.bos_token,
        "eos_token_id": spec.eos_tokens[0] if len(spec.eos_tokens) == 1 else list(spec.eos_tokens),
        **(apple_shape(spec) or exact),
        "ffn_with_glu": True,
        "head_dim": spec.layers[0].head_dim,
        "initializer_range": 0.02,
        "max_context_length": spec.context_length,
        "model_dim": spec.hidden_size,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": spec.qk_norm,
        "num_gqa_groups": spec.layers[0].num_heads // spec.layers[0].num_kv_heads,
        "num_kv_heads": [layer.num_kv_heads for layer in spec.layers],
        "num_query_heads": [layer.num_heads for layer in spec.layers],
        "num_transformer_layers": len(spec.layers),
        "rope_freq_constant": spec.rope_theta,
        "rope_max_length": 2 * spec.context_length,
        "share_input_output_layers": spec.tied_head,
        "vocab_size": spec.vocab_size,
    }


def _corenet_model(config: Config) -> Config | None:
    """The part of a CoreNet config that describes the model, at any level; None when this is not a CoreNet config."""
    for part in (config, config.get("base")):
        if isinstance(part, Mapping) and str(part.get("model_name", "")).startswith("OpenELM"):
            return part
    model: Any = config
    for key in ("model", "language_modeling", "general_gpt"):
        model = model.get(key) if isinstance(model, Mapping) else None
    return model if isinstance(model, Mapping) and "model_name" in model else None


def _with_released_values(config: Config) -> dict[str, Any]:
    """The config with what CoreNet's built-in table of sizes adds to a bare model name."""
    model = _corenet_model(config)
    if model is None:
        return dict(config)
    name = str(model["model_name"]).removeprefix("OpenELM-").removesuffix("-Instruct").replace("_", ".")
    size = _RELEASED_SIZES.get(name)
    if size is None and "num_transformer_layers" not in model:
        known = ", ".join(f"OpenELM-{size.replace('.', '_')}" for size in _RELEASED_SIZES)
        raise ConfigError(
            f"The config's model_name {shown(model['model_name'])} is none of the released sizes ({known}) and the config "
            "gives no num_transformer_layers: add the model's numbers to it."
        )
    return {**_RELEASED_COMMON, **(size or {}), **{str(key): value for key, value in model.items()}}


# What the code of every OpenELM release does, whether its config says so or not. With another value it is another model.
_ONE_WAY = {
    "activation_fn_name": ("swish", "silu"),
    "ffn_with_glu": (True,),
    "normalization_layer_name": ("rms_norm",),
    "rope_scaling": (None,),
    "rms_norm_eps": (OPENELM_NORM_EPS,),
}


def _refuse_other_mathematics(config: Config) -> None:
    for name, known in _ONE_WAY.items():
        if config.get(name, known[0]) not in known:
            raise ConfigError(
                f'The config\'s "{name}" is {shown(config[name])}, but every OpenELM has {known[0]!r}: this is another '
                "model, whose answers would be wrong here."
            )


def _query_heads(config: Config, num_layers: int, model_dim: int, head_dim: int) -> list[int]:
    if config.get("num_query_heads") is not None:
        return per_layer(config, "num_query_heads", num_layers)
    groups = 2 if config.get("num_gqa_groups") is None else integer(config, "num_gqa_groups")
    divisor = head_dim * groups
    multipliers = layer_multipliers(required(config, "qkv_multipliers"), num_layers, "qkv_multipliers")
    return [make_divisible(model_dim * m, divisor) // head_dim for m in multipliers]


def _kv_heads(config: Config, heads: list[int]) -> list[int]:
    if config.get("num_kv_heads") is not None:
        return per_layer(config, "num_kv_heads", len(heads))
    # "Groups" are query heads to a kv head, so the ratio is the same in every layer.
    groups = 1 if config.get("num_gqa_groups") is None else integer(config, "num_gqa_groups")
    return [h // groups for h in heads]


def _size_name(num_layers: int, model_dim: int) -> str | None:
    for name, size in _RELEASED_SIZES.items():
        if (size["num_transformer_layers"], size["model_dim"]) == (num_layers, model_dim):
            return name
    return None
