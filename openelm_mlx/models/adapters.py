"""Adapters of a model: one in training (`attach`, `trained_adapter`, `detach`), and those that it serves (`added`).

What an adapter is stands in low_rank.py, the modules that apply it in adapter_sites.py, how a pass chooses one in
adapter_sets.py, and how served ones are put side by side in adapter_stacks.py. Nothing is evaluated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checks import is_number, whole_number
from ..errors import CheckpointError, SettingError
from ..files import shown
from .adapter_sets import AdapterSet, Served
from .adapter_sites import (
    Adapted,
    AdaptedEmbedding,
    AdaptedExperts,
    AdaptedLinear,
    LowRank,
    module_at,
    put_module,
)
from .adapter_stacks import site_pairs, with_adapter
from .adapter_targets import Target, default_targets, no_match, select_targets, targets_of
from .base import LanguageModel
from .low_rank import Adapter, Pair, factor, new_pair

KINDS = ("lora", "dora")
LARGEST_RANK = 4096


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter to train. Raises SettingError for what is out of range.

    kind: "lora" or "dora". targets: patterns (`Target.matches`); None: every matrix of the layers outside experts and router.
    layers: their numbers; None: all. alpha: the factor is alpha / rank, alpha / sqrt(rank) with use_rslora; None: twice the
    rank. rank_pattern, alpha_pattern: pattern -> what holds for its targets instead; the first one that matches.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"kind is {shown(self.kind)}: choose {' or '.join(KINDS)}.")
        whole_number("rank", self.rank, high=LARGEST_RANK)
        for pattern, rank in self.rank_pattern.items():
            whole_number(f"rank_pattern[{shown(pattern)}]", rank, high=LARGEST_RANK)
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{shown(p)}]": a for p, a in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not (alpha is None and name == "alpha") and not (is_number(alpha) and 0 < alpha < 1e6):
                raise SettingError(f"{name} is {shown(alpha)}: it must be a number above 0.")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise SettingError(f"dropout is {shown(self.dropout)}: it must be a number from 0 to below 1.")
        if self.targets is not None and not self.targets:
            raise SettingError("targets is empty: name what is to be adapted, or leave it out.")

    def rank_of(self, target: Target) -> int:
        return next((rank for pattern, rank in self.rank_pattern.items() if target.matches(pattern)), self.rank)

    def scale_of(self, target: Target) -> float:
        """The factor of a target's pair."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        alpha = next((each for pattern, each in self.alpha_pattern.items() if target.matches(pattern)), alpha)
        return factor(alpha, self.rank_of(target), self.use_rslora)


# --- the adapter in training ------------------------------------------------------------------------------------------


def selected_targets(model: LanguageModel, config: AdapterConfig) -> list[Target]:
    """What `config` adapts in this model, in the order of the forward pass. Raises SettingError for what is not there."""
    targets = targets_of(model.spec)
    count = len(model.spec.layers)
    for layer in config.layers or ():
        whole_number("layers", layer, low=0, high=count - 1, whose="the model's last layer, ")
    patterns = default_targets(model.spec) if config.targets is None else config.targets
    found = select_targets(targets.values(), patterns, config.layers)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(each.matches(pattern) for each in found):
            raise no_match(pattern, found)
    if config.kind == "dora":
        refused = next((each for each in found if each.num_experts or each.is_embedding), None)
        if refused is not None:
            what = "experts" if refused.num_experts else "an embedding"
            raise SettingError(
                f"DoRA beside {what} ({refused.name}) can be stored in no format of adapters: leave it out of targets, or use "
                'kind="lora".'
            )
    return found


def attach(model: LanguageModel, config: AdapterConfig, initial: Adapter | None = None) -> list[str]:
    """Put a new adapter beside the matrices that `config` names, and freeze everything else.

    initial: begin with its pairs instead; `config` says nothing but the dropout then. Returns the names of its parameters,
    which are what `model.trainable_parameters()` has from now on. The model's output is unchanged, bit for bit, until they are.
    Raises SettingError where something that was asked for is not there, an adapter is in training
    already, or a part of the model is not in this machine's memory.
    """
    if _attached(model) is not None:
        raise SettingError("The model has an adapter in training already: take it off first, with `detach`.")
    _check_is_here(model)
    if initial is None:
        pairs = _new_pairs(selected_targets(model, config), config)
        dora = config.kind == "dora"
    else:
        check_belongs(initial, model.spec)
        every = targets_of(model.spec)
        pairs, dora = {name: (every[name], pair) for name, pair in initial.pairs.items()}, False
    freezing = [(module, set(module._no_grad)) for module in model.modules()]
    model.freeze()
    names = []
    by_site: dict[str, dict[str, LowRank]] = {}
    for target, pair in pairs.values():
        site = put_site(model, target)
        if dora and pair.magnitude is None:
            assert isinstance(site, AdaptedLinear)
            pair = replace(pair, magnitude=site.norms(pair, target))
        low_rank = LowRank(target, pair, config.dropout)
        by_site.setdefault(target.site, {})[target.part] = low_rank
        names += [f"{target.site}.adapter.{target.part}.{key}" for key in low_rank.parameters()]
    for path, parts in by_site.items():
        module_at(model, path).adapter = parts
    model.train(model.training)
    model.attached = Attached(config, tuple(by_site), freezing, initial)
    model.num_updates += 1
    return names


def _check_is_here(model: LanguageModel) -> None:
    """MLX neither reads a file nor hears another machine in the midst of a gradient."""
    if model.residency is not None:
        raise SettingError(
            "Experts on disk cannot be trained beside: load the model with all of its experts in "
            "memory (a higher memory_limit, no expert_slots)."
        )
    group = None if model.runtime is None else model.runtime.group
    if model.remote is not None or group is not None:
        raise SettingError(
            "A model of several machines cannot be trained: load all of it on this one (no workers, no parallel)."
        )


@dataclass
class Attached:
    """The adapter in training of a model. freezing: what was frozen before."""

    config: AdapterConfig
    sites: tuple[str, ...]
    freezing: list[tuple[nn.Module, set[str]]]
    initial: Adapter | None = None


def _attached(model: LanguageModel) -> Attached | None:
    found: Attached | None = model.attached
    return found


def trained_adapter(model: LanguageModel) -> Adapter:
    """The adapter in training as it is now. Raises SettingError where there is none."""
    attached = _attached(model)
    if attached is None:
        raise SettingError("The model has no adapter in training: put one beside it with `attach`.")
    pairs = {part.target.name: part.pair for site in attached.sites for part in module_at(model, site).trained.values()}
    config, initial = attached.config, attached.initial
    order = [name for name in targets_of(model.spec) if name in pairs]
    rslora = config.use_rslora if initial is None else initial.use_rslora
    return Adapter(
        {name: pairs[name] for name in order}, rslora, config.dropout, initial is not None and initial.ties_head
    )


def detach(model: LanguageModel) -> Adapter:
    """Take the adapter in training off, and return it; what was trainable before is so again."""
    adapter, attached = trained_adapter(model), _attached(model)
    assert attached is not None
    for path in attached.sites:
        site = module_at(model, path)
        del site["adapter"]
        if path not in model.adapters.served.stacks:
            put_module(model, path, site.base)
    for module, frozen in attached.freezing:
        module._no_grad = frozen
    model.attached = None
    model.num_updates += 1
    return adapter


def _new_pairs(targets: Sequence[Target], config: AdapterConfig) -> dict[str, tuple[Target, Pair]]:
    keys = mx.random.split(mx.random.key(config.seed), len(targets))
    return {
        target.name: (target, new_pair(target, config.rank_of(target), config.scale_of(target), keys[i]))
        for i, target in enumerate(targets)
    }


def put_site(model: LanguageModel, target: Target) -> Adapted:
    """The adapting module at a target's place; put there if it is not yet."""
    found = module_at(model, target.site)
    if isinstance(found, Adapted):
        return found
    made: Adapted
    if target.num_experts:
        made = AdaptedExperts(found, target.site, model.adapters)
    elif target.is_embedding:
        made = AdaptedEmbedding(found, target.site, model.adapters)
    else:
        bias_apart = model.choices.bias_apart and model.spec.family == "gpt_oss"
        made = AdaptedLinear(found, target.site, model.adapters, bias_apart)
    made.train(model.training)
    put_module(model, target.site, made)
    return made


def check_belongs(adapter: Adapter, spec: Any) -> None:
    """Raise CheckpointError where an adapter is one of another model: other names, or other shapes."""
    targets = targets_of(spec)
    for name, pair in adapter.pairs.items():
        target = targets.get(name)
        if target is None:
            raise CheckpointError(
                f"The adapter belongs to another model: it has a part for {name}, which this {spec.family} model has not."
            )
        wanted = target.shapes(pair.rank)
        if (pair.a.shape, pair.b.shape) != wanted:
            raise CheckpointError(
                f"The adapter belongs to another model: its factors of {name} are {list(pair.a.shape)} and "
                f"{list(pair.b.shape)}, and this model needs {list(wanted[0])} and {list(wanted[1])}."
            )
        has_rows = not (target.num_experts or target.is_embedding)
        if pair.magnitude is not None and not (has_rows and pair.magnitude.shape == (target.rows,)):
            raise CheckpointError(
                f"The adapter belongs to another model: its magnitudes of {name} are {list(pair.magnitude.shape)}, and this "
                f"model needs {[target.rows] if has_rows else 'none there'}."
            )


# --- adapters that are served -----------------------------------------------------------------------------------------


def added(model: LanguageModel, name: str, id: str, adapter: Adapter, kept: Any = None) -> Served:
    """The set of the model's adapters with one more; lazy. `model.adapters.served` is to be set to it once it is evaluated.

    Modules are put beside the model's matrices at once; they add nothing before. kept: see `Served`. Raises CheckpointError
    where the adapter is one of another model.
    """
    check_belongs(adapter, model.spec)
    targets, gains = targets_of(model.spec), {}
    for each, pair in adapter.pairs.items():
        site = put_site(model, targets[each])
        if pair.magnitude is not None:
            assert isinstance(site, AdaptedLinear)
            gains[each] = pair.magnitude.astype(mx.float32) / site.norms(pair, targets[each]) - 1.0
    return with_adapter(model.adapters.served, name, id, adapter, site_pairs(targets, adapter, gains), kept)


__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterSet",
    "added",
    "attach",
    "check_belongs",
    "detach",
    "selected_targets",
    "trained_adapter",
]
