"""Adapters as Hugging Face's PEFT stores them (peft/tuners/lora; read and measured with 0.21.2).

A module's name in the file is `base_model.model.` and its path in Hugging Face's model. A (r, in), B (out, r).

Experts (`target_parameters`) are wrapped once a matrix, one wrapper inside the other, so that a name says the nesting and
not the matrix; the shapes tell. A is (E * r, in), expert after expert, and B (out, r * E), in which the expert runs fastest.
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
from ..models.adapter_targets import Target, targets_of
from ..models.low_rank import Adapter, Pair, factor
from ..specs import ModelSpec
from .adapter_tensors import AdapterTensors, Placer, alpha_of, base_of, number, plain_pair, whole
from .patterns import fits

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?P<which>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?!weight$)\w+)?(?:\.weight)?"
)

# Settings that change what an adapter computes, and are not read here; with the value that means "not so".
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "lora_bias": (False, None), "modules_to_save": (None, []), "fan_in_fan_out": (False, None),
    "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "use_qalora": (False, None),
    "use_bdlora": (None, False), "alora_invocation_tokens": (None, []), "exclude_modules": (),
}  # fmt: skip
# These train beside weights that they have changed, so that the adapter does not fit the base as it was.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_peft(config: Mapping[str, Any], tensors: AdapterTensors, spec: ModelSpec) -> Adapter:
    """The adapter of PEFT's config and tensors. Raises CheckpointError or ConfigError."""
    _refuse_settings(config)
    placer, use_rslora = Placer(spec, tensors.file), bool(config.get("use_rslora", False))
    found: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(
                f"{tensors.file} has the tensor {shown(name)}, which is no factor of LoRA or DoRA: save the adapter alone."
            )
        found.setdefault(match["module"], {})[match["which"]] = name
    for module, parts in found.items():
        is_experts = re.sub(r"(\.base_layer)+$", "", module).endswith(".experts")
        name, pair = (_experts_pair if is_experts else _pair)(module, parts, tensors, placer)
        placer.put(name, _with_factor(config, name, pair, use_rslora))
    tensors.refuse_leftovers()
    dropout = number(config.get("lora_dropout") or 0.0, "lora_dropout", may_be_low=True)
    base = base_of(tensors.metadata, config.get("base_model_name_or_path"))
    return Adapter(placer.in_order(), use_rslora, min(dropout, 0.99), base=base)


def _pair(module: str, parts: Mapping[str, str], tensors: AdapterTensors, placer: Placer) -> tuple[str, Pair]:
    """The pair of one matrix, without its factor."""
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    prefix = "embedding_" if is_embedding else ""
    a, b = (tensors.take(parts.get(f"{prefix}{each}", f"{module}.lora_{prefix}{each}"), (2,)) for each in "AB")
    magnitude = None
    if "magnitude_vector" in parts:
        magnitude = tensors.take(parts["magnitude_vector"], (1, 2)).flatten()
        target = placer.targets.get(module)
        if target is not None and target.is_embedding:
            raise CheckpointError(
                f"{tensors.file} has DoRA beside the embedding, which every library computes in its own way: train it with "
                "LoRA there."
            )
    return module, plain_pair(module, tensors.file, a, b, magnitude)


def _experts_pair(module: str, parts: Mapping[str, str], tensors: AdapterTensors, placer: Placer) -> tuple[str, Pair]:
    """The pair of one matrix of all experts: which one, its shapes tell."""
    layer = re.sub(r"(\.base_layer)+$", "", module)
    names = [f"{layer}.{each}" for each in ("gate_up_proj", "down_proj")]
    if names[0] not in placer.targets:
        raise placer.other_model(layer)
    if "magnitude_vector" in parts:
        raise CheckpointError(f"{tensors.file} has DoRA beside experts ({layer}): LoRA alone is read there.")
    a, b = (tensors.take(parts.get(each, f"{module}.lora_{each}"), (2,)) for each in "AB")
    for target in (placer.targets[name] for name in names):
        count = target.num_experts
        if a.shape[0] % count == 0 and a.shape[1] == target.columns and b.shape == (target.rows, a.shape[0]):
            rank = a.shape[0] // count
            of_each = a.reshape(count, rank, target.columns).swapaxes(1, 2)
            back = b.reshape(target.rows, rank, count).transpose(2, 1, 0)
            if target.name in placer.pairs:
                raise CheckpointError(f"{tensors.file} has two adapters of {target.name}: the file is damaged.")
            return target.name, Pair(mx.contiguous(of_each), mx.contiguous(back), 1.0)
    raise CheckpointError(
        f"{tensors.file} belongs to another model: its factors of {module} are {list(a.shape)} and {list(b.shape)}, which fit "
        f"neither matrix of this model's {placer.targets[names[0]].num_experts} experts."
    )


def _with_factor(config: Mapping[str, Any], name: str, pair: Pair, use_rslora: bool) -> Pair:
    """The pair with its factor, by the config's rank and alpha. Raises CheckpointError where the rank is another one."""
    rank = _of_pattern(config, "rank_pattern", name, whole(config, "r", 8))
    if rank != pair.rank:
        raise CheckpointError(
            f"The adapter of {name} has rank {pair.rank} and its config says {shown(rank)}: the two do not belong together."
        )
    alpha = _of_pattern(config, "alpha_pattern", name, config.get("lora_alpha", 8))
    return Pair(pair.a, pair.b, factor(number(alpha, "lora_alpha"), pair.rank, use_rslora), pair.magnitude)


def _of_pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name, as PEFT looks it up."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"The adapter's config has {key} {shown(patterns)}: expected numbers by name.")
    for pattern, value in patterns.items():
        if fits(f"^(?:.*\\.)?(?:{str(pattern)[:900]})$", name):
            return value
    return default


def _refuse_settings(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"The adapter is of PEFT's type {shown(config.get('peft_type'))}: LORA is read (LoRA, DoRA and rsLoRA)."
        )
    for key, harmless in _REFUSED.items():
        if harmless and key in config and config[key] not in harmless:
            raise ConfigError(
                f"The adapter's config has {key} {shown(config[key])}, which changes more than LoRA does and is not read: "
                "train or export the adapter without it."
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"The adapter began with {shown(start)}, which changes the base's own weights: convert it with PEFT to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def peft_files(adapter: Adapter, spec: ModelSpec) -> tuple[bytes, dict[str, mx.array]]:
    """What PEFT's two files hold: the config, and the tensors by name. Raises SettingError for what it cannot say."""
    targets = targets_of(spec)
    plain = next((name for name, pair in adapter.pairs.items() if pair.magnitude is None), None)
    if adapter.is_dora and plain is not None:
        raise SettingError(f"PEFT has DoRA beside all matrices or none, and {plain} has LoRA: write it as CoreNet's.")
    if adapter.ties_head:
        raise SettingError(
            "In PEFT a tied head goes on without the embedding's adapter, and in this one it does not: write it as mlx-lm's."
        )
    tensors: dict[str, mx.array] = {}
    experts = {name.rpartition(".")[0] for name in adapter.pairs if targets[name].num_experts}
    for name, pair in adapter.pairs.items():
        target = targets[name]
        if target.num_experts:
            layer, _, part = name.rpartition(".")
            both = f"{layer}.gate_up_proj" in adapter.pairs and f"{layer}.down_proj" in adapter.pairs
            inner = ".base_layer" if both and part == "gate_up_proj" else ""
            count, columns, rank = pair.a.shape
            tensors[f"{PREFIX}{layer}{inner}.lora_A.weight"] = pair.a.swapaxes(1, 2).reshape(count * rank, columns)
            back = pair.b.transpose(2, 1, 0).reshape(target.rows, rank * count)
            tensors[f"{PREFIX}{layer}{inner}.lora_B.weight"] = back
        elif target.is_embedding:
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = pair.a.T
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = pair.b.T
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.T
            tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.T
        if pair.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    tensors = {name: mx.contiguous(tensor) for name, tensor in tensors.items()}
    config = _config(adapter, targets, bool(experts))
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n", tensors


def _config(adapter: Adapter, targets: Mapping[str, Target], has_experts: bool) -> dict[str, Any]:
    alphas = {name: alpha_of(pair, adapter.use_rslora) for name, pair in adapter.pairs.items()}
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    modules = [name for name in adapter.pairs if not targets[name].num_experts]
    parameters = [name for name in adapter.pairs if targets[name].num_experts]
    return {
        "alpha_pattern": {name.replace(".", r"\."): each for name, each in alphas.items() if each != alpha},
        "base_model_name_or_path": adapter.base.get("name"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        # PEFT refuses dropout beside experts, also when it only reads.
        "lora_dropout": 0.0 if has_experts else adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name.replace(".", r"\."): each for name, each in ranks.items() if each != rank},
        "target_modules": _in_short(modules, targets),
        "target_parameters": _in_short(parameters, targets) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.is_dora,
        "use_rslora": adapter.use_rslora,
    }


def _in_short(names: list[str], targets: Mapping[str, Target]) -> list[str]:
    """The names, or the ends of them where all matrices with this end are meant."""
    found: dict[str, None] = {}
    for name in names:
        target = targets[name]
        end = name if target.layer is None else name.partition(f"layers.{target.layer}.")[2]
        same = [each for each in targets if each == end or each.endswith(f".{end}")]
        found[end if set(same) <= set(names) else name] = None
    return list(found)
