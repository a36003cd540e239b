"""Adapters as mlx-lm's tuner stores them (mlx_lm/tuner; read and measured with 0.32.2).

lora_a (in, r), lora_b (r, out), and of DoRA m (out,); of experts lora_a (E, r, in), lora_b (E, out, r), gate and up apart.
One factor, `scale`, holds for all; it is the factor itself, and not alpha / r.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, ConfigError, SettingError
from ..files import shown
from ..models.adapter_targets import targets_of
from ..models.low_rank import Adapter, Pair
from ..specs import ModelSpec
from .adapter_tensors import AdapterTensors, Placer, base_of, check_magnitude, number, rounded

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<which>lora_a|lora_b|m)")
# mlx-lm's names of the router in other releases.
_GATE, _UP, _GATE_UP = ".gate_proj", ".up_proj", ".gate_up_proj"


def read_mlx_lm(config: Mapping[str, Any], tensors: AdapterTensors, spec: ModelSpec) -> Adapter:
    """The adapter of mlx-lm's config and tensors. Raises CheckpointError or ConfigError."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(
            f"The adapter's config has fine_tune_type {shown(kind)}: lora and dora are adapters; weights of a full "
            "fine-tune replace the model's own."
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise ConfigError(
            f"The adapter's config has lora_parameters {shown(parameters)}: expected rank and scale by name."
        )
    if "scale" not in parameters:
        raise ConfigError(
            "The adapter's config has no scale in its lora_parameters, the factor of the adapter: add it."
        )
    scale = number(parameters["scale"], "scale")
    placer = Placer(spec, tensors.file)
    found: dict[str, dict[str, mx.array]] = {}
    for name in tensors.names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{tensors.file} has the tensor {shown(name)}, which is no factor of LoRA or DoRA: save the adapter alone."
            )
        part = tensors.take(name, (1,) if match["which"] == "m" else (2, 3))
        found.setdefault(match["module"], {})[match["which"]] = part
    for module, parts in found.items():
        missing = [each for each in ("lora_a", "lora_b") if each not in parts]
        if missing:
            raise CheckpointError(
                f"{tensors.file} has no tensor {module}.{missing[0]}: a part of the adapter is missing."
            )
    for module in [each for each in found if ".experts." in each and each.endswith((_GATE, _UP))]:
        if module in found:
            layer = module.rpartition(".")[0]
            _join_gate_and_up(layer, found, placer)
    for module, parts in found.items():
        placer.put(module, _pair(module, parts, scale, placer, tensors))
    dropout = number(parameters.get("dropout") or 0.0, "dropout", may_be_low=True)
    embedding = next(name for name, target in placer.targets.items() if target.is_embedding)
    # There a tied head is the adapted embedding.
    ties_head = spec.tied_head and embedding in placer.pairs
    base = base_of(tensors.metadata, config.get("model"))
    return Adapter(placer.in_order(), False, min(dropout, 0.99), ties_head, base)


def _pair(module: str, parts: Mapping[str, mx.array], scale: float, placer: Placer, tensors: AdapterTensors) -> Pair:
    a, b, magnitude = parts["lora_a"], parts["lora_b"], parts.get("m")
    if a.ndim != b.ndim:
        raise CheckpointError(f"The factors of {module} in {tensors.file} have {a.ndim} and {b.ndim} dimensions.")
    if a.ndim == 3:
        a, b = mx.contiguous(a.swapaxes(1, 2)), mx.contiguous(b.swapaxes(1, 2))
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise CheckpointError(
            f"The factors of {module} in {tensors.file} are {list(a.shape)} and {list(b.shape)}, which have no rank in common."
        )
    target = placer.targets.get(module)
    if magnitude is not None and target is not None and (target.is_embedding or target.num_experts):
        what = "the embedding" if target.is_embedding else "experts"
        raise CheckpointError(f"{tensors.file} has DoRA beside {what} ({module}): LoRA alone is read there.")
    check_magnitude(module, tensors.file, b.shape[-1], magnitude)
    return Pair(a, b, scale, magnitude)


def _join_gate_and_up(layer: str, found: dict[str, dict[str, mx.array]], placer: Placer) -> None:
    """Two pairs of one fused matrix as one: with one first factor where both have the same, else with ranks added."""
    target = placer.targets.get(f"{layer}{_GATE_UP}")
    if target is None:
        raise placer.other_model(layer)
    sides = [found.pop(f"{layer}{each}", None) for each in (_GATE, _UP)]
    there = next(each for each in sides if each is not None)
    a = [None if each is None else each["lora_a"] for each in sides]
    b = [None if each is None else each["lora_b"] for each in sides]
    for each in (*a, *b):
        if each is not None and (each.ndim != 3 or each.shape[0] != target.num_experts):
            raise placer.other_model(f"{layer}{_GATE}")
    if a[0] is not None and a[1] is not None and a[0].shape == a[1].shape and bool(mx.array_equal(a[0], a[1]).item()):
        joined, rows = a[0], [b[0], b[1]]
    else:
        joined = mx.concatenate([each for each in a if each is not None], axis=1)
        rows = _side_by_side(b)
    if any(each is not None and each.shape[1] * 2 != target.rows for each in b):
        raise placer.other_model(f"{layer}{_GATE}")
    zeros = mx.zeros_like(next(each for each in rows if each is not None))
    gate, up = (zeros if each is None else each for each in rows)
    # Rows alternate: gate 0, up 0, gate 1, up 1, ...
    fused = mx.stack([gate, up], axis=2).reshape(target.num_experts, target.rows, -1)
    found[target.name] = {**there, "lora_a": joined, "lora_b": fused}


def _side_by_side(b: list[mx.array | None]) -> list[mx.array | None]:
    """Gate's and up's second factors (E, I, r), for first factors that stand one after the other."""
    gate, up = b
    if gate is None or up is None:
        return b
    return [
        mx.pad(gate, [(0, 0), (0, 0), (0, up.shape[-1])]),
        mx.pad(up, [(0, 0), (0, 0), (gate.shape[-1], 0)]),
    ]


# --- writing ----------------------------------------------------------------------------------------------------------


def mlx_lm_files(adapter: Adapter, spec: ModelSpec) -> tuple[bytes, dict[str, mx.array]]:
    """What mlx-lm's two files hold: the config, and the tensors by name. Raises SettingError for what it cannot say."""
    targets = targets_of(spec)
    dora = {name for name, pair in adapter.pairs.items() if pair.magnitude is not None}
    if dora and len(dora) < len(adapter.pairs):
        other = next(name for name in adapter.pairs if name not in dora)
        raise SettingError(f"mlx-lm has DoRA beside all matrices or none, and {other} has LoRA: write it as PEFT's.")
    embedding = next(name for name, target in targets.items() if target.is_embedding)
    if spec.tied_head and embedding in adapter.pairs and not adapter.ties_head:
        raise SettingError(
            "In mlx-lm the tied head takes the embedding's adapter too, and in this adapter it does not: write it as PEFT's."
        )
    scale, rank = (
        Counter(getattr(pair, key) for pair in adapter.pairs.values()).most_common(1)[0][0] for key in ("scale", "rank")
    )
    tensors: dict[str, mx.array] = {}
    for name, pair in adapter.pairs.items():
        # One factor for all: what another one has more goes into its second factor.
        b = pair.b if pair.scale == scale else pair.b * (pair.scale / scale)
        parts = {name: (pair.a, b)}
        if targets[name].num_experts:
            a, b = pair.a.swapaxes(1, 2), b.swapaxes(1, 2)
            parts = {name: (a, b)}
            if name.endswith(_GATE_UP):
                layer = name.removesuffix(_GATE_UP)
                parts = {f"{layer}{_GATE}": (a, b[:, ::2]), f"{layer}{_UP}": (a, b[:, 1::2])}
        for module, factors in parts.items():
            for which, factor in zip(("lora_a", "lora_b"), factors, strict=True):
                tensors[f"{module}.{which}"] = mx.contiguous(factor)
            if pair.magnitude is not None:
                tensors[f"{module}.m"] = pair.magnitude
    layers = [each.layer for name, each in targets.items() if name in adapter.pairs and each.layer is not None]
    modules = {name.rpartition(".")[0] for name in tensors}
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": len(spec.layers) - min(layers, default=len(spec.layers)),
        "lora_parameters": {
            "rank": rank,
            "scale": rounded(scale) if rounded(scale) == scale else scale,
            "dropout": adapter.dropout,
            "keys": sorted({re.sub(r"^.*?layers\.\d+\.", "", module) for module in modules}),
        },
    }
    if adapter.base.get("name"):
        config["model"] = adapter.base["name"]
    return json.dumps(config, indent=2).encode() + b"\n", tensors
