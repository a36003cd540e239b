"""Random weights in a released shape, as our model and as mlx-lm's with the very same numbers in its own layout.

No checkpoint is needed: the numbers are drawn on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoint.quantize import Quantization
from ..checkpoint.released import released_gpt_oss_config, released_openelm_config
from ..errors import SettingError
from ..models import build_model
from ..specs import gpt_oss_config, openelm_config, spec_from_config
from ..weights import pad_expert_rows

if TYPE_CHECKING:
    from ..models import Model

SHAPES = ("gpt-oss-20b", "openelm-270m", "openelm-450m", "openelm-1.1b", "openelm-3b")


def shape_config(shape: str, num_layers: int | None = None) -> dict[str, Any]:
    """The config of a released shape, perhaps with fewer layers. Raises SettingError for an unknown name."""
    if shape not in SHAPES:
        raise SettingError(f"There is no shape {shape!r}: choose among {', '.join(SHAPES)}.")
    is_gpt_oss = shape.startswith("gpt-oss")
    config = (
        released_gpt_oss_config("20b")
        if is_gpt_oss
        else released_openelm_config(shape.removeprefix("openelm-").upper())
    )
    spec = spec_from_config(config)
    num_layers = len(spec.layers) if num_layers is None else num_layers
    if not 1 <= num_layers <= len(spec.layers):
        raise SettingError(
            f"{shape} has {len(spec.layers)} layers: give --layers from 1 to {len(spec.layers)}, not {num_layers}."
        )
    if is_gpt_oss:
        return {**config, "num_hidden_layers": num_layers}
    return openelm_config(replace(spec, layers=spec.layers[:num_layers]))


def random_pair(
    config: Mapping[str, Any], bits: int | None = None, theirs: bool = True, ours: bool = True
) -> tuple[Model, Any]:
    """Our model and mlx-lm's (None unless `theirs`) with the same random weights, in bfloat16, or quantized to `bits`.

    ours: False leaves our model without weights, so that only mlx-lm's are in memory.
    """
    spec = spec_from_config(config)
    model = build_model(spec)
    packings = _pack(model, bits)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        weights[name] = _random_like(name, array, spec.keeps_float32(name))
        mx.eval(weights[name])  # one at a time: drawing needs twice its size
    other = mlx_lm_model(config, spec, weights, packings, ours) if theirs else None
    if not ours:
        return model, other
    # Not strict: padded rows are not in the empty model's shapes.
    model.load_weights(list(pad_expert_rows(weights, model.choices.rows_in_a_tile).items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model, other


def _pack(model: Model, bits: int | None) -> dict[str, Quantization]:
    """Quantize gpt-oss's experts as released, and with `bits` all other matrices but routers; return module -> packing."""
    packings: dict[str, Quantization] = {}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if ".experts." in path:
            packings[path] = Quantization(4, 32, "mxfp4")
        elif bits is not None and hasattr(module, "to_quantized") and not path.endswith("router"):
            packings[path] = Quantization(bits, 64)
        return packings[path].as_config() if path in packings else False

    if bits is not None or model.spec.family == "gpt_oss":
        nn.quantize(model, class_predicate=choose)
    return packings


def _random_like(name: str, array: mx.array, is_float32: bool) -> mx.array:
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 256, (*array.shape[:-1], 4 * array.shape[-1])).astype(mx.uint8).view(mx.uint32)
    if array.dtype == mx.uint8:  # MXFP4's exponents; 2^-7 and 2^-8 give 2,880 columns ordinary sums
        return mx.random.randint(119, 121, array.shape).astype(mx.uint8)
    dtype = mx.float32 if is_float32 else mx.bfloat16
    if name.endswith("norm.weight"):
        return mx.ones(array.shape, dtype)
    if name.endswith(".scales"):
        return mx.full(array.shape, 0.002, dtype)
    if name.endswith(".biases"):
        return mx.full(array.shape, -0.015, dtype)
    scale = 0.1 if array.ndim == 1 or name.endswith(".bias") else array.shape[-1] ** -0.5
    return (mx.random.normal(array.shape, mx.bfloat16) * scale).astype(dtype)


def mlx_lm_model(
    config: Mapping[str, Any],
    spec: Any,
    weights: dict[str, mx.array],
    packings: Mapping[str, Quantization],
    keeps: bool,
    float32_as: mx.Dtype = mx.bfloat16,
) -> Any:
    """mlx-lm's model with these weights; unless `keeps`, they are removed from the dictionary one by one.

    float32_as: the type that mlx-lm's model has where ours has float32.
    """
    try:
        from mlx_lm.utils import _get_classes
    except ImportError as error:
        raise SettingError("Comparing with mlx-lm needs mlx-lm: pip install 'openelm_mlx[bench]'.") from error
    spelled = gpt_oss_config(spec) if spec.family == "gpt_oss" else dict(config)
    model_class, arguments_class = _get_classes(spelled)
    model: Any = model_class(arguments_class.from_dict(spelled))
    theirs: dict[str, mx.array] = {}
    for our_name in list(weights):
        array = weights[our_name] if keeps else weights.pop(our_name)
        for name, part in _their_parts(our_name, array, spec):
            theirs[name] = part.astype(float32_as) if part.dtype == mx.float32 else part
            mx.eval(theirs[name])
        del array
    nn.quantize(model, class_predicate=lambda path, _: _their_packing(path, packings, theirs))
    model.load_weights(list(theirs.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _their_parts(name: str, array: mx.array, spec: Any) -> Iterator[tuple[str, mx.array]]:
    """mlx-lm stores q, k and v separately, and gate and up."""
    if spec.family == "gpt_oss" and ".qkv_proj." in name:
        layer = spec.layers[0]
        ends = [layer.num_heads * layer.head_dim, (layer.num_heads + layer.num_kv_heads) * layer.head_dim]
        for part, piece in zip(("q_proj", "k_proj", "v_proj"), mx.split(array, ends, axis=0), strict=True):
            yield name.replace("qkv_proj", part), piece
    elif ".gate_up_proj." in name:
        for part, start in (("gate_proj", 0), ("up_proj", 1)):
            yield name.replace("gate_up_proj", part), mx.contiguous(array[:, start::2])
    else:
        yield name, array


def _their_packing(
    path: str, packings: Mapping[str, Quantization], weights: Mapping[str, mx.array]
) -> bool | dict[str, Any]:
    if f"{path}.scales" not in weights:
        return False
    ours = path.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")
    for part in ("q_proj", "k_proj", "v_proj"):
        ours = ours.replace(f".{part}", ".qkv_proj") if ours not in packings else ours
    return packings[ours].as_config()
