"""What a model is, without arrays: its layers' shapes, its parameters' names and shapes, its bytes of cache.

`spec_from_config` reads every spelling of a config in circulation and gives one `ModelSpec`. The models, the caches, the
checkpoint readers and the memory planner read only that. Nothing here imports mlx or touches a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerSpec:
    """The shape of one transformer layer. `window` is the number of keys a query sees (None: all of them)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that one cached token takes in this layer: a key and a value for each kv head."""
        return 2 * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class ModelSpec:
    """A model's whole shape: what every room of the library needs to know of it, and nothing of its weights.

    vocab_size: rows of the embedding. usable_vocab_size: ids below it are real tokens; CoreNet pads 32,000 ids to
    32,128 rows, and the rows beyond were never trained. `size` is the release's name for it ("270M"), or None.
    """

    family: str
    vocab_size: int
    usable_vocab_size: int
    hidden_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    tied_head: bool
    norm_eps: float
    rope_theta: float
    qk_norm: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    size: str | None = None

    def parameter_shapes(self) -> Shapes:
        """Canonical name -> shape of every parameter, in the order of the forward pass."""
        return _FAMILIES[self.family].parameter_shapes(self)

    def num_parameters(self) -> int:
        """How many numbers the model has, by its shapes alone."""
        return sum(_product(shape) for shape in self.parameter_shapes().values())

    def kv_cache_bytes(self, num_tokens: int, itemsize: int = 2, batch_size: int = 1) -> int:
        """Bytes of keys and values for `num_tokens` cached tokens; a layer with a window keeps at most that many."""
        return batch_size * sum(
            layer.kv_bytes_per_token(itemsize) * (num_tokens if layer.window is None else min(num_tokens, layer.window))
            for layer in self.layers
        )


def spec_from_config(config: Config) -> ModelSpec:
    """The model that a config describes: Apple's or mlx-lm's config.json, CoreNet's YAML, or Apple's MLX config.json.

    Raises ConfigError for an unknown family, a missing field, or a value that no such model can have.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"The model's config is a {type(config).__name__}, not an object with named fields.")
    for family in _FAMILIES.values():
        if family.recognises(config):
            return family.spec_from_config(config)
    raise ConfigError(
        f"The config describes no OpenELM model (model_type is {config.get('model_type')!r}, model_name is "
        f"{config.get('model_name')!r}): only model_type \"openelm\" and CoreNet's \"OpenELM-*\" names are read."
    )


# --- OpenELM ----------------------------------------------------------------------------------------------------------

# CoreNet's table of released sizes (corenet/modeling/models/language_modeling/general_gpt.py, `gpt_configs`).
_RELEASED_SIZES = {
    "270M": {"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64},
    "450M": {"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64},
    "1.1B": {"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64},
    "3B": {"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128},
}
_RELEASED_COMMON = {
    "num_gqa_groups": 4,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "ffn_multipliers": (0.5, 4.0),
    "qkv_multipliers": (0.5, 1.0),
    "ffn_dim_divisor": 256,
    "rope_freq_constant": 10000,
}
# Apple's code has it as a constant; no config.json of the family names it.
OPENELM_NORM_EPS = 1e-6


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to a multiple of `divisor`, never below 90 % of it (corenet/utils/math_utils.py)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def layer_multipliers(value: Any, num_layers: int, name: str) -> list[float]:
    """One multiplier a layer, from a number, a (first, last) pair or a list of `num_layers`.

    A pair is spread evenly over the layers and rounded to two decimals, as CoreNet's GPTConfig does.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [float(value)] * num_layers
    numbers = _numbers(value, name)
    if len(numbers) == 2:
        first, last = numbers
        step = (last - first) / max(num_layers - 1, 1)
        return [round(first + i * step if i < num_layers - 1 or num_layers == 1 else last, 2) for i in range(num_layers)]
    if len(numbers) != num_layers:
        raise ConfigError(
            f'The config\'s "{name}" has {len(numbers)} values for {num_layers} layers: give one number, a pair, '
            "or one value a layer."
        )
    return numbers


class _OpenELM:
    """How OpenELM configs are read, and which parameters such a model has."""

    @staticmethod
    def recognises(config: Config) -> bool:
        return config.get("model_type") == "openelm" or _corenet_model(config) is not None

    @staticmethod
    def spec_from_config(config: Config) -> ModelSpec:
        config = _with_released_values(config)
        num_layers = _integer(config, "num_transformer_layers")
        model_dim = _integer(config, "model_dim")
        head_dim = _integer(config, "head_dim")
        heads = _query_heads(config, num_layers, model_dim, head_dim)
        kv_heads = _kv_heads(config, heads)
        divisor = _integer(config, "ffn_dim_divisor")
        ffn = [
            make_divisible(m * model_dim, divisor)
            for m in layer_multipliers(_required(config, "ffn_multipliers"), num_layers, "ffn_multipliers")
        ]
        vocab_size = _integer(config, "vocab_size")
        layers = tuple(
            LayerSpec(num_heads=h, num_kv_heads=kv, head_dim=head_dim, intermediate_size=f)
            for h, kv, f in zip(heads, kv_heads, ffn, strict=True)
        )
        _check_layers(layers)
        return ModelSpec(
            family="openelm",
            vocab_size=vocab_size,
            # CoreNet's padding token is the first row that is no word.
            usable_vocab_size=min(vocab_size, config.get("padding_index") or vocab_size),
            hidden_size=model_dim,
            context_length=_integer(config, "max_context_length"),
            layers=layers,
            tied_head=bool(_required(config, "share_input_output_layers")),
            norm_eps=OPENELM_NORM_EPS,
            rope_theta=float(_required(config, "rope_freq_constant")),
            qk_norm=bool(_required(config, "normalize_qk_projections")),
            # Apple's configs say 1 and 2; CoreNet's YAML leaves both out, with the same Llama tokenizer.
            bos_token=config.get("bos_token_id", 1),
            eos_tokens=_eos_tokens(config.get("eos_token_id", 2)),
            size=_size_name(num_layers, model_dim),
        )

    @staticmethod
    def parameter_shapes(spec: ModelSpec) -> Shapes:
        width = spec.hidden_size
        shapes: Shapes = {"transformer.token_embeddings.weight": (spec.vocab_size, width)}
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
        shapes["transformer.norm.weight"] = (width,)
        if not spec.tied_head:
            shapes["lm_head.weight"] = (spec.vocab_size, width)
        return shapes


_FAMILIES = {"openelm": _OpenELM}


def openelm_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec as Apple's Hugging Face config.json spells it, lists expanded, so that mlx-lm reads it too."""
    return {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "activation_fn_name": "swish",
        "bos_token_id": spec.bos_token,
        "eos_token_id": spec.eos_tokens[0] if len(spec.eos_tokens) == 1 else list(spec.eos_tokens),
        # With divisor 1 a width is the multiplier times model_dim, exactly: no rounding rule has to be known.
        "ffn_dim_divisor": 1,
        "ffn_multipliers": [layer.intermediate_size / spec.hidden_size for layer in spec.layers],
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
    """The part of a CoreNet config that describes the model, wherever it stands; None when it is no CoreNet config."""
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
            f"The config's model_name {model['model_name']!r} is none of the released sizes ({known}) and the config "
            "gives no num_transformer_layers: add the model's numbers to it."
        )
    return {**_RELEASED_COMMON, **(size or {}), **model}


def _query_heads(config: Config, num_layers: int, model_dim: int, head_dim: int) -> list[int]:
    if config.get("num_query_heads") is not None:
        return _per_layer(config, "num_query_heads", num_layers)
    groups = config.get("num_gqa_groups")
    divisor = head_dim * (2 if groups is None else int(groups))
    multipliers = layer_multipliers(_required(config, "qkv_multipliers"), num_layers, "qkv_multipliers")
    return [make_divisible(model_dim * m, divisor) // head_dim for m in multipliers]


def _kv_heads(config: Config, heads: list[int]) -> list[int]:
    if config.get("num_kv_heads") is not None:
        return _per_layer(config, "num_kv_heads", len(heads))
    # "Groups" are query heads to a kv head, so the ratio is the same in every layer.
    groups = config.get("num_gqa_groups") or 1
    return [h // int(groups) for h in heads]


def _check_layers(layers: tuple[LayerSpec, ...]) -> None:
    for i, layer in enumerate(layers):
        if layer.num_kv_heads < 1 or layer.num_heads % layer.num_kv_heads:
            raise ConfigError(
                f"Layer {i} of the config has {layer.num_heads} query heads for {layer.num_kv_heads} kv heads: "
                "the first must be a multiple of the second."
            )


def _size_name(num_layers: int, model_dim: int) -> str | None:
    for name, size in _RELEASED_SIZES.items():
        if (size["num_transformer_layers"], size["model_dim"]) == (num_layers, model_dim):
            return name
    return None


# --- fields -----------------------------------------------------------------------------------------------------------


def _required(config: Config, name: str) -> Any:
    if config.get(name) is None:
        raise ConfigError(f'The model\'s config has no "{name}": it is incomplete; download or copy config.json again.')
    return config[name]


def _integer(config: Config, name: str) -> int:
    value = _required(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'The config\'s "{name}" is {value!r}: it must be a whole number above 0.')
    return value


def _numbers(value: Any, name: str) -> list[float]:
    is_list = isinstance(value, (list, tuple)) and value
    if not is_list or any(isinstance(v, bool) or not isinstance(v, (int, float)) or v <= 0 for v in value):
        raise ConfigError(f'The config\'s "{name}" is {value!r}: it must be a number, or a list of numbers, above 0.')
    return [float(v) for v in value]


def _per_layer(config: Config, name: str, num_layers: int) -> list[int]:
    value = config[name]
    values = value if isinstance(value, (list, tuple)) else [value] * num_layers
    if len(values) != num_layers or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ConfigError(
            f'The config\'s "{name}" is {value!r}: it must hold {num_layers} whole numbers above 0, one a layer.'
        )
    return list(values)


def _eos_tokens(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(int(v) for v in values if v is not None)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
