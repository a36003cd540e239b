"""Quantization: MLX's formats, the config that describes them, and recipes for a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx

from ..errors import ConfigError, SettingError
from ..files import shown
from ..specs import ModelSpec
from .reader import TensorEntry

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

# Group sizes and bits of each mode, the default first (MLX documentation, mx.quantize, "Quantization modes").
_GROUP_SIZES: dict[str, tuple[int, ...]] = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_BITS: dict[str, tuple[int, ...]] = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}

# 1 bit is not offered for quantizing, but MLX can read it.
_STORED_BITS = {mode: (*bits, 1) if mode == "affine" else bits for mode, bits in _BITS.items()}

# A scale byte of 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1, E8M0; in nvfp4's E4M3 too).
NOT_A_SCALE = 255

# The tensors of a packed weight, in the order in which mx.quantize gives them.
PARTS = ("weight", "scales", "biases")

RECIPES = ("2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4", "mixed")


@dataclass(frozen=True)
class Quantization:
    """How one weight matrix (rows, columns) is packed: `bits` an element, one scale for `group_size` columns of a row."""

    bits: int
    group_size: int
    mode: Mode = "affine"

    def parts(self, shape: tuple[int, ...], scale_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part name -> (safetensors type, shape) of a packed weight of `shape`; affine scales have type `scale_dtype`."""
        *rows, columns = shape
        scales = (*rows, columns // self.group_size)
        weight = ("U32", (*rows, columns * self.bits // 32))
        if self.mode == "affine":
            return {"weight": weight, "scales": (scale_dtype, scales), "biases": (scale_dtype, scales)}
        return {"weight": weight, "scales": ("U8", scales)}

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the columns of `shape` are whole groups."""
        return len(shape) >= 2 and shape[-1] % self.group_size == 0 and shape[-1] * self.bits % 32 == 0

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """Part name -> array, as `parts` describes them."""
        packed = mx.quantize(weight, group_size=self.group_size, bits=self.bits, mode=self.mode)
        return dict(zip(PARTS, packed, strict=False))

    def dequantize(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The weight that the parts stand for."""
        return mx.dequantize(
            parts["weight"], parts["scales"], parts.get("biases"),
            group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=dtype,
        )  # fmt: skip

    def as_config(self) -> dict[str, Any]:
        """As mlx-lm's config.json spells it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def unpacked(packing: Quantization, parts: Mapping[str, mx.array]) -> mx.array:
    """The float32 weight that packed parts stand for, computed in float32 from scales and biases of any type."""
    widened = {
        part: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        for part, array in parts.items()
    }
    return packing.dequantize(widened, mx.float32)


def stored_quantization(
    config: Mapping[str, Any], module: str, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]
) -> Quantization:
    """How `module` (a path without `.weight`), whose weight is `shape` unpacked, was packed: as mlx-lm reads it.

    `quantization` in the config has settings for the model and may have others by module path. In those, a missing mode
    means affine, whatever the model's is. For a module that is not named, or set to false, the types and shapes of its
    tensors decide. Raises ConfigError when the config has no such settings, or settings that MLX does not support.
    """
    whole = config.get("quantization") or config.get("quantization_config")
    if not isinstance(whole, Mapping):
        raise ConfigError(
            f'The weights of {module} are quantized but the config has no "quantization": config.json does not belong '
            "to these weights."
        )
    settings = whole.get(module)
    if isinstance(settings, Mapping):
        return _checked(settings, module)
    default = _checked({"mode": whole.get("quant_method"), **whole}, module)
    return _inferred(shape, entries.get(f"{module}.weight"), entries.get(f"{module}.scales")) or default


def _checked(settings: Mapping[str, Any], module: str) -> Quantization:
    """A config's settings, with MLX's defaults for missing ones. Raises ConfigError for what MLX does not support."""
    mode = "affine" if settings.get("mode") is None else settings["mode"]
    if not isinstance(mode, str) or mode not in _BITS:
        raise ConfigError(f"The config's quantization mode {shown(mode)} is not one of {', '.join(_BITS)}.")
    bits, group_size = settings.get("bits", _BITS[mode][0]), settings.get("group_size", _GROUP_SIZES[mode][0])
    if type(bits) is not int or bits not in _STORED_BITS[mode] or group_size not in _GROUP_SIZES[mode]:
        raise ConfigError(
            f"The config's quantization of {module}, {shown(bits)} bits in groups of {shown(group_size)}, is none of {mode}'s."
        )
    return Quantization(bits, int(group_size), cast(Mode, mode))


def _inferred(shape: tuple[int, ...], weight: TensorEntry | None, scales: TensorEntry | None) -> Quantization | None:
    """The packing that these types and shapes belong to, of which there is at most one; None when there is none."""
    if weight is None or scales is None or not weight.shape or not scales.shape:
        return None
    columns = shape[-1]
    modes: tuple[Mode, ...] = ("mxfp4", "mxfp8", "nvfp4") if scales.dtype == "U8" else ("affine",)
    for mode in modes:
        bits = next((each for each in _STORED_BITS[mode] if columns * each == weight.shape[-1] * 32), None)
        group_size = next((each for each in _GROUP_SIZES[mode] if columns == scales.shape[-1] * each), None)
        if bits is not None and group_size is not None:
            return Quantization(bits, group_size, mode)
    return None


def wider(packing: Quantization, bits: int, group_size: int, name: str, part: mx.array) -> mx.array:
    """A part of an affine packed weight, "weight", "scales" or "biases", in more bits and smaller groups: the same numbers.

    part: (..., columns * bits / 32) words, or (..., columns / group_size) scales or biases.
    """
    if name != "weight":
        return mx.repeat(part, packing.group_size // group_size, axis=-1)
    if bits == packing.bits:
        return part
    words = part.reshape(*part.shape[:-1], -1, packing.bits)  # 32 codes are as many words as a code has bits
    mask = mx.array(2**packing.bits - 1, mx.uint32)
    wide: list[mx.array] = [mx.zeros(words.shape[:-1], mx.uint32) for _ in range(bits)]
    for number in range(32):
        word, offset = divmod(number * packing.bits, 32)
        code = words[..., word] >> offset
        if offset + packing.bits > 32:
            code = code | (words[..., word + 1] << (32 - offset))
        code = code & mask
        word, offset = divmod(number * bits, 32)
        wide[word] = wide[word] | (code << offset)
        if offset + bits > 32:
            wide[word + 1] = wide[word + 1] | (code >> (32 - offset))
    return mx.stack(wide, axis=-1).flatten(-2)


def parse_recipe(recipe: str | int, group_size: int | None = None) -> tuple[str, Quantization]:
    """A recipe's name and the quantization of most of its weights.

    recipe: 2, 3, 4, 5, 6 or 8 (affine bits, also "4bit"), "mxfp4", "mxfp8", "nvfp4", or "mixed": 4 bits, with the
    sensitive weights (see `quantization_of`) at 8. group_size: 32, 64 (default) or 128 for affine.
    """
    name = str(recipe).strip().lower().removesuffix("bit").removesuffix("-")
    if name not in RECIPES:
        raise SettingError(f"Quantization {recipe!r} is not known: choose one of {', '.join(RECIPES)}.")
    mode = name if name in _BITS else "affine"
    bits = int(name) if name.isdigit() else _BITS[mode][0]
    if group_size is not None and group_size not in _GROUP_SIZES[mode]:
        allowed = ", ".join(str(size) for size in sorted(_GROUP_SIZES[mode]))
        raise SettingError(f"Group size {group_size} does not exist for {name} quantization: choose {allowed}.")
    return name, Quantization(bits, group_size or _GROUP_SIZES[mode][0], cast(Mode, mode))


def quantization_of(
    recipe: tuple[str, Quantization], spec: ModelSpec, name: str, shape: tuple[int, ...]
) -> Quantization | None:
    """What a recipe does to the parameter `name` of `shape`; None keeps it as it is.

    Norms and other vectors stay, and so do gpt-oss's routers: a rounded router sends tokens to other experts, and all
    routers together are 0.1 % of the model's bytes. "mixed" gives 8 bits to the most sensitive matrices: the embedding
    (which is the head too) and the first and the last eighth of the layers; in OpenELM the first are the narrowest, so
    that costs little.
    """
    recipe_name, quantization = recipe
    if not name.endswith(".weight") or not quantization.fits(shape) or spec.keeps_float32(name):
        return None
    if recipe_name == "mixed" and _is_sensitive(spec, name):
        return Quantization(8, quantization.group_size)
    return quantization


def _is_sensitive(spec: ModelSpec, name: str) -> bool:
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is None:
        return True
    edge = -(-len(spec.layers) // 8)
    return number < edge or number >= len(spec.layers) - edge
