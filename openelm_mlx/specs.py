"""What a model is, without arrays: its layers' shapes, its parameters' names and shapes, its bytes of cache.

`spec_from_config` reads every spelling of a config in circulation and gives one `ModelSpec`. The models, the caches,
the checkpoint readers and the memory planner read only that. Nothing here imports mlx or touches a disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, SettingError
from .files import shown

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

    def kv_bytes_per_token(self, itemsize: int = 2, kv_bits: int | None = None) -> int:
        """Bytes that one cached token takes in this layer: a key and a value for each kv head.

        kv_bits: None for numbers of `itemsize` bytes, or 8: then the layers without a window keep a byte a number and
        for each group of them a scale and a bias in float32.
        """
        per_head = self.head_dim * itemsize
        if kv_bits is not None and self.window is None:
            per_head = self.head_dim * kv_bits // 8 + self.head_dim // kv_group_size(self.head_dim) * 8
        return 2 * self.num_kv_heads * per_head

    def parameters_per_expert(self, hidden_size: int) -> int:
        """Numbers in one of the layer's experts: gate and up, down, and their biases."""
        return 3 * self.intermediate_size * hidden_size + 2 * self.intermediate_size + hidden_size


@dataclass(frozen=True)
class YarnSpec:
    """How rotary frequencies are stretched to a longer context (YaRN, arXiv 2309.00071, sections 3.2 to 3.4).

    A pair of dimensions that turns at least `beta_fast` times within the original context keeps its frequency, one that
    turns at most `beta_slow` times is slowed down by `factor`, and those between are blended. truncate: the two bounds
    are rounded to whole pairs, as the first YaRN code did and gpt-oss does not. concentration: on sine and cosine.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    concentration: float = 1.0


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
    yarn: YarnSpec | None = None
    # gpt-oss's activation: gate and up are clamped at the limit, alpha is the slope inside the sigmoid.
    swiglu_limit: float = math.inf
    swiglu_alpha: float = 1.0

    def parameter_shapes(self) -> Shapes:
        """Canonical name -> shape of every parameter, in the order of the forward pass."""
        return _FAMILIES[self.family].parameter_shapes(self)

    def keeps_float32(self, name: str) -> bool:
        """Whether the parameter is float32 in memory whatever type the others have: the model computes with it so."""
        return _FAMILIES[self.family].keeps_float32(name)

    def num_parameters(self) -> int:
        """How many numbers the model has, by its shapes alone."""
        return sum(_product(shape) for shape in self.parameter_shapes().values())

    def num_active_parameters(self) -> int:
        """How many of them one token is computed with: no lookup in an embedding, no expert that was not chosen.

        The head counts; so OpenAI counts too (arXiv 2508.10925, table 1).
        """
        lookup = 0 if self.tied_head else self.vocab_size * self.hidden_size
        idle = sum(
            (layer.num_experts - layer.experts_per_token) * layer.parameters_per_expert(self.hidden_size)
            for layer in self.layers
        )
        return self.num_parameters() - lookup - idle

    def kv_cache_bytes(
        self, num_tokens: int, itemsize: int = 2, batch_size: int = 1, kv_bits: int | None = None
    ) -> int:
        """Bytes of keys and values for `num_tokens` cached tokens; a layer with a window keeps at most that many.

        What is allocated for them is this for `kv_places(num_tokens)`, and a whole ring in a layer with a window.
        """
        return batch_size * sum(
            layer.kv_bytes_per_token(itemsize, kv_bits)
            * (num_tokens if layer.window is None else min(num_tokens, layer.window))
            for layer in self.layers
        )


# Keys and values are allocated by at least so many tokens: an allocation and a copy for each token would cost more than
# the attention over them.
KV_STEP = 256

# A few queries over quantized keys have their scores in memory, so many bytes of them at a time.
KV_SCORES_BYTES = 64 * 2**20


def kv_places(num_tokens: int, context_length: int | None = None) -> int:
    """For how many tokens a cache that keeps everything has places when it holds `num_tokens`.

    Multiples of 256 up to 2,048, then of a quarter of the power of two below, up to the context: at most a quarter is
    empty, and all the copies while growing to n tokens together move fewer than 6 n (steps of 256 would move n^2 / 512).
    """
    step = max(KV_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    places = -(-num_tokens // step) * step
    if context_length is None or num_tokens > context_length + KV_STEP:
        return places
    # Drafts that are checked at the very end of the context may lie a few tokens past it.
    return min(places, -(-max(context_length, num_tokens) // KV_STEP) * KV_STEP)


def checked_kv_bits(spec: ModelSpec, kv_bits: int | None, window: int | None = None) -> int | None:
    """8, or None when keys and values stay as they are (also asked for by 16).

    window: of the layers that have none of their own. Raises SettingError for other numbers, for heads that cannot be
    packed, and when no layer keeps all of its keys, so that there is nothing worth packing.
    """
    if kv_bits in (None, 16) and not isinstance(kv_bits, bool):
        return None
    if kv_bits != 8:
        raise SettingError(
            f"kv_bits is {kv_bits!r}: 8 halves the memory of keys and values, and 16 leaves them as they are; fewer bits "
            "change the answers."
        )
    full = [layer for layer in spec.layers if layer.window is None]
    if window is not None or not full:
        raise SettingError(
            "kv_bits=8 is for layers that keep all keys, and with a sliding window none does: leave out one of the two."
        )
    for layer in full:
        kv_group_size(layer.head_dim)
    return 8


def kv_group_size(head_dim: int) -> int:
    """How many numbers of a quantized key or value share a scale: the larger of MLX's groups that divides a head.

    Raises SettingError when none does.
    """
    for group_size in (64, 32):
        if head_dim % group_size == 0:
            return group_size
    raise SettingError(
        f"The keys and values of this model cannot be quantized: a head has {head_dim} numbers, and MLX packs them by 32 "
        "or 64. Leave out kv_bits (--kv-bits)."
    )


def spec_from_config(config: Config) -> ModelSpec:
    """The model that a config describes.

    Read are Apple's or mlx-lm's config.json, CoreNet's YAML, Apple's MLX config.json, and for gpt-oss the config.json
    of Hugging Face (old and new spelling), of mlx-lm, and of OpenAI's original/ folder.

    Raises ConfigError for an unknown family, a missing field, or a value that no such model can have.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"The model's config is a {type(config).__name__}, not an object with named fields.")
    for family in _FAMILIES.values():
        if family.recognises(config):
            return family.spec_from_config(config)
    raise ConfigError(
        f"The config describes no OpenELM or gpt-oss model (model_type is {shown(config.get('model_type'))}, model_name is "
        f'{shown(config.get("model_name"))}): model_type "openelm" and "gpt_oss", CoreNet\'s "OpenELM-*" names and '
        "OpenAI's original config are read."
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
    if type(value) in (int, float):
        return _numbers([value], name) * num_layers
    numbers = _numbers(value, name)
    if len(numbers) == 2:
        first, last = numbers
        step = (last - first) / max(num_layers - 1, 1)
        values = [first + i * step for i in range(num_layers - 1)] + [last if num_layers > 1 else first]
        return [round(value, 2) for value in values]
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
        _refuse_other_mathematics(config)
        num_layers = _integer(config, "num_transformer_layers", most=_MOST_LAYERS)
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
            usable_vocab_size=min(
                vocab_size, _integer(config, "padding_index") if config.get("padding_index") else vocab_size
            ),
            hidden_size=model_dim,
            context_length=_integer(config, "max_context_length"),
            layers=layers,
            tied_head=_switch(config, "share_input_output_layers"),
            norm_eps=OPENELM_NORM_EPS,
            rope_theta=_positive(config, "rope_freq_constant"),
            qk_norm=_switch(config, "normalize_qk_projections"),
            # Apple's configs say 1 and 2; CoreNet's YAML leaves both out, with the same Llama tokenizer.
            bos_token=_token(config, "bos_token_id", config.get("bos_token_id", 1), vocab_size),
            eos_tokens=_tokens(config, "eos_token_id", 2, vocab_size),
            size=_size_name(num_layers, model_dim),
        )

    @staticmethod
    def keeps_float32(name: str) -> bool:
        return False

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
            f"The config's model_name {shown(model['model_name'])} is none of the released sizes ({known}) and the config "
            "gives no num_transformer_layers: add the model's numbers to it."
        )
    return {**_RELEASED_COMMON, **(size or {}), **{str(key): value for key, value in model.items()}}


# What the code of every OpenELM release does, whether its config says so or not. Another value is another model.
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
                f'The config\'s "{name}" is {shown(config[name])} and OpenELM is only known with {known[0]!r}: this is another '
                "model, whose answers would be wrong here."
            )


def _query_heads(config: Config, num_layers: int, model_dim: int, head_dim: int) -> list[int]:
    if config.get("num_query_heads") is not None:
        return _per_layer(config, "num_query_heads", num_layers)
    groups = 2 if config.get("num_gqa_groups") is None else _integer(config, "num_gqa_groups")
    divisor = head_dim * groups
    multipliers = layer_multipliers(_required(config, "qkv_multipliers"), num_layers, "qkv_multipliers")
    return [make_divisible(model_dim * m, divisor) // head_dim for m in multipliers]


def _kv_heads(config: Config, heads: list[int]) -> list[int]:
    if config.get("num_kv_heads") is not None:
        return _per_layer(config, "num_kv_heads", len(heads))
    # "Groups" are query heads to a kv head, so the ratio is the same in every layer.
    groups = 1 if config.get("num_gqa_groups") is None else _integer(config, "num_gqa_groups")
    return [h // groups for h in heads]


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


# --- gpt-oss ----------------------------------------------------------------------------------------------------------

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


class _GptOss:
    """How gpt-oss configs are read, and which parameters such a model has."""

    @staticmethod
    def recognises(config: Config) -> bool:
        if config.get("model_type") is not None:
            return config["model_type"] == "gpt_oss"
        return {"num_experts", "experts_per_token", "swiglu_limit"} <= config.keys()  # OpenAI's original config

    @staticmethod
    def spec_from_config(config: Config) -> ModelSpec:
        # Hugging Face's names, and those of OpenAI's original/config.json where they differ.
        num_layers = _integer(config, "num_hidden_layers", most=_MOST_LAYERS)
        num_experts = _integer(config, "num_local_experts", "num_experts")
        windows = _windows(config, num_layers)
        layers = tuple(
            LayerSpec(
                num_heads=_integer(config, "num_attention_heads"),
                num_kv_heads=_integer(config, "num_key_value_heads"),
                head_dim=_integer(config, "head_dim"),
                intermediate_size=_integer(config, "intermediate_size"),
                window=window,
                num_experts=num_experts,
                experts_per_token=_integer(config, "num_experts_per_tok", "experts_per_token"),
            )
            for window in windows
        )
        _check_layers(layers)
        _check_gpt_oss(config, layers[0])
        vocab_size = _integer(config, "vocab_size")
        yarn = _yarn(config)
        named = _tokens(config, "eos_token_id", None, vocab_size)
        is_harmony = vocab_size == _HARMONY_VOCAB_SIZE or bool(set(named) & set(_HARMONY_STOPS))
        stops = [token for token in _HARMONY_STOPS if is_harmony and token < vocab_size]
        return ModelSpec(
            family="gpt_oss",
            vocab_size=vocab_size,
            usable_vocab_size=vocab_size,
            hidden_size=_integer(config, "hidden_size"),
            context_length=_gpt_oss_context_length(config, yarn),
            layers=layers,
            tied_head=_switch(config, "tie_word_embeddings", False),
            norm_eps=_positive(config, "rms_norm_eps", _GPT_OSS_NORM_EPS),
            rope_theta=_positive(
                _rope_settings(config), "rope_theta", _positive(config, "rope_theta", _GPT_OSS_ROPE_THETA)
            ),
            eos_tokens=tuple(dict.fromkeys((*named, *stops))),
            size=_GPT_OSS_SIZES.get((num_layers, num_experts)),
            yarn=yarn,
            swiglu_limit=_positive(config, "swiglu_limit", _GPT_OSS_SWIGLU_LIMIT),
            swiglu_alpha=_positive(config, "swiglu_alpha", _GPT_OSS_SWIGLU_ALPHA),
        )

    @staticmethod
    def keeps_float32(name: str) -> bool:
        # Gains are multiplied in float32, and routers decide near-ties; both are small.
        return name.endswith("norm.weight") or ".mlp.router." in name

    @staticmethod
    def parameter_shapes(spec: ModelSpec) -> Shapes:
        width = spec.hidden_size
        shapes: Shapes = {"model.embed_tokens.weight": (spec.vocab_size, width)}
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
    return [_integer(config, "sliding_window") if kind == "sliding_attention" else None for kind in kinds]


def _check_gpt_oss(config: Config, layer: LayerSpec) -> None:
    if layer.experts_per_token > layer.num_experts:
        raise ConfigError(
            f"The config asks for {layer.experts_per_token} experts a token and has only {layer.num_experts}: "
            "one of the two numbers is wrong."
        )
    if layer.head_dim % 2:
        raise ConfigError(f"The config's head_dim is {layer.head_dim}: rotary embedding turns pairs, it must be even.")
    if config.get("attention_bias", True) is not True:
        raise ConfigError('The config\'s "attention_bias" is not true: gpt-oss has a bias on q, k, v and o.')


def _gpt_oss_context_length(config: Config, yarn: YarnSpec | None) -> int:
    if config.get("max_position_embeddings") is not None:
        return _integer(config, "max_position_embeddings")
    initial = _integer(config, "initial_context_length")
    length = initial if yarn is None else int(initial * yarn.factor)
    return _integer({"initial_context_length": length}, "initial_context_length")


def _rope_settings(config: Config) -> Config:
    """The settings of rotary embedding under one name, whichever of the four spellings the config has.

    transformers 5 writes `rope_parameters` (theta inside), earlier versions `rope_scaling`, OpenAI's original config
    five numbers; a Hugging Face config with none of them means its class's default, and null means no scaling.
    """
    if config.get("rope_scaling_factor") is not None:
        return {
            "rope_type": "yarn" if _positive(config, "rope_scaling_factor") > 1 else "default",
            "factor": config["rope_scaling_factor"],
            "beta_fast": _required(config, "rope_ntk_beta"),
            "beta_slow": _required(config, "rope_ntk_alpha"),
            "truncate": False,
        }
    settings = config.get("rope_parameters") or config.get("rope_scaling", _GPT_OSS_YARN) or {}
    if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
        raise ConfigError(
            f"The config's rotary settings are {shown(settings)}: one set of numbers for all layers is read."
        )
    return settings


def _yarn(config: Config) -> YarnSpec | None:
    settings = _rope_settings(config)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f'The config\'s rotary scaling is {shown(kind)}: gpt-oss has "yarn", or "default" for none.')
    factor = _positive(settings, "factor")
    names = {"original_max_position_embeddings": settings, "initial_context_length": config}
    original = next((_integer(where, name) for name, where in names.items() if where.get(name)), None)
    return YarnSpec(
        factor=factor,
        original_context_length=_integer(config, "initial_context_length") if original is None else original,
        beta_fast=_positive(settings, "beta_fast", 32.0),
        beta_slow=_positive(settings, "beta_slow", 1.0),
        truncate=_switch(settings, "truncate", True),
        concentration=_positive(settings, "attention_factor", 0.1 * math.log(factor) + 1.0),
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


_FAMILIES: dict[str, type[_OpenELM] | type[_GptOss]] = {"openelm": _OpenELM, "gpt_oss": _GptOss}


# --- fields -----------------------------------------------------------------------------------------------------------

# Far above any model: what lies beyond would only be time and memory lost before an error.
_MOST_LAYERS = 4096
_LARGEST_WHOLE = 2**31
_LARGEST_NUMBER = 1e12
_MOST_STOPS = 1000


def _required(config: Config, *names: str) -> Any:
    """The field of the first of `names` that the config has: one thing under its different spellings."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ConfigError(f'The model\'s config has no "{names[0]}": it is incomplete; download or copy config.json again.')


def _integer(config: Config, *names: str, most: int = _LARGEST_WHOLE) -> int:
    value = _required(config, *names)
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f'The config\'s "{names[0]}" is {shown(value)}: it must be a whole number, 1 to {most:,}.')
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a number above 0 that a model can have: no NaN, no infinity, nothing absurd."""
    return type(value) in (int, float) and 0 < value <= _LARGEST_NUMBER


def _numbers(value: Any, name: str) -> list[float]:
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= _MOST_LAYERS
    if not is_list or not all(map(_is_number, value)):
        raise ConfigError(
            f'The config\'s "{name}" is {shown(value)}: it must be a number, or a list of numbers, above 0.'
        )
    return [float(v) for v in value]


def _per_layer(config: Config, name: str, num_layers: int) -> list[int]:
    value = config[name]
    values = value if isinstance(value, (list, tuple)) else [value] * num_layers
    if len(values) != num_layers or any(type(v) is not int or not 1 <= v <= _LARGEST_WHOLE for v in values):
        raise ConfigError(
            f'The config\'s "{name}" is {shown(value)}: it must hold {num_layers} whole numbers above 0, one a layer.'
        )
    return list(values)


def _positive(config: Config, name: str, default: float | None = None) -> float:
    """A number above 0; null and a field that is not there are the default, where there is one."""
    value = default if default is not None and config.get(name) is None else _required(config, name)
    if not _is_number(value):
        raise ConfigError(f'The config\'s "{name}" is {shown(value)}: it must be a number above 0.')
    return float(value)


def _switch(config: Config, name: str, default: bool | None = None) -> bool:
    value = default if default is not None and config.get(name) is None else _required(config, name)
    if not isinstance(value, bool):
        raise ConfigError(f'The config\'s "{name}" is {shown(value)}: it must be true or false.')
    return value


def _token(config: Config, name: str, value: Any, vocab_size: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ConfigError(
            f'The config\'s "{name}" is {shown(config.get(name))}: it must be a token, 0 to {vocab_size - 1}.'
        )
    return value


def _tokens(config: Config, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
    value = config.get(name, default)
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) > _MOST_STOPS:
        raise ConfigError(
            f'The config\'s "{name}" names {len(values):,} tokens: it must name those that end an answer.'
        )
    tokens = [_token(config, name, v, vocab_size) for v in values]
    return tuple(token for token in tokens if token is not None)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
