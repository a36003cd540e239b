"""The shape of a model, without arrays: its layers, the names and shapes of its parameters, the bytes of its cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..errors import ConfigError, SettingError
from ..files import shown
from .cache_bytes import kv_group_size

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

    A pair of dimensions that rotates at least `beta_fast` times within the original context keeps its frequency, one that
    rotates at most `beta_slow` times is slowed down by `factor`, and those in between are blended. truncate: the two bounds
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
    """A model's whole shape: what every part of the library needs to know about it, without its weights.

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
    # A part of a model whose layers lie on several machines: neither embedding nor last norm nor head are here.
    only_layers: bool = field(default=False, repr=False)

    def part(self, start: int, stop: int) -> ModelSpec:
        """The model with layers start ... stop - 1 alone; the first part keeps embedding, last norm and head."""
        return replace(self, layers=self.layers[start:stop], only_layers=start > 0)

    def parameter_shapes(self) -> Shapes:
        """Canonical name -> shape of every parameter, in the order of the forward pass."""
        return FAMILIES[self.family].parameter_shapes(self)

    def keeps_float32(self, name: str) -> bool:
        """Whether the parameter stays float32 whatever type the others have: the model computes with it in float32."""
        return FAMILIES[self.family].keeps_float32(name)

    def num_parameters(self) -> int:
        """How many numbers the model has, by its shapes alone."""
        return sum(_product(shape) for shape in self.parameter_shapes().values())

    def num_active_parameters(self) -> int:
        """How many of them one token is computed with: without embedding lookups and experts that were not chosen.

        The head counts; so OpenAI counts too (arXiv 2508.10925, table 1).
        """
        lookup = 0 if self.tied_head or self.only_layers else self.vocab_size * self.hidden_size
        idle = sum(
            (layer.num_experts - layer.experts_per_token) * layer.parameters_per_expert(self.hidden_size)
            for layer in self.layers
        )
        return self.num_parameters() - lookup - idle

    def kv_cache_bytes(
        self, num_tokens: int, itemsize: int = 2, batch_size: int = 1, kv_bits: int | None = None
    ) -> int:
        """Bytes of keys and values for `num_tokens` cached tokens; a layer with a window keeps at most that many.

        The allocation is this for `kv_capacity(num_tokens)`, plus a whole ring (window and room) in a layer with a window.
        """
        return batch_size * sum(
            layer.kv_bytes_per_token(itemsize, kv_bits)
            * (num_tokens if layer.window is None else min(num_tokens, layer.window))
            for layer in self.layers
        )


class Family(Protocol):
    """One family of models: how its configs are read, and which parameters such a model has."""

    @staticmethod
    def recognises(config: Config) -> bool:
        """Whether a config is one of this family's."""

    @staticmethod
    def spec_from_config(config: Config) -> ModelSpec:
        """The model that a config of this family describes. Raises ConfigError."""

    @staticmethod
    def parameter_shapes(spec: ModelSpec) -> Shapes:
        """Canonical name -> shape of every parameter, in the order of the forward pass."""

    @staticmethod
    def keeps_float32(name: str) -> bool:
        """Whether a parameter is float32 in memory whatever type the others have."""


# Name -> family. The package fills it in.
FAMILIES: dict[str, type[Family]] = {}


def checked_kv_bits(spec: ModelSpec, kv_bits: int | None, window: int | None = None) -> int | None:
    """8, or None when keys and values stay as they are (which 16 means too).

    window: of the layers that have none of their own. Raises SettingError for other numbers, for heads that cannot be
    packed, and when no layer keeps all of its keys, so that there is nothing worth packing.
    """
    if kv_bits in (None, 16) and not isinstance(kv_bits, bool):
        return None
    if kv_bits != 8:
        raise SettingError(
            f"kv_bits is {shown(kv_bits)}: 8 halves the memory of keys and values, and 16 leaves them as they are; fewer bits "
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


def check_layers(layers: tuple[LayerSpec, ...]) -> None:
    """Raise ConfigError where query heads do not share kv heads evenly."""
    for i, layer in enumerate(layers):
        if layer.num_kv_heads < 1 or layer.num_heads % layer.num_kv_heads:
            raise ConfigError(
                f"Layer {i} of the config has {layer.num_heads} query heads for {layer.num_kv_heads} kv heads: "
                "the first must be a multiple of the second."
            )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
