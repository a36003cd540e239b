"""Which matrices of a model can have an adapter beside them, and what they are called.

The names are those of Hugging Face's models, which adapter files use: q, k and v have one each, although gpt-oss computes
them by one matrix here, and an expert matrix stands for all experts of a layer. Shapes only, no arrays.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import SettingError
from ..files import shown
from ..specs import ModelSpec

# What a pattern may be besides names: a whole group of matrices.
ATTENTION, FEED_FORWARD, EXPERTS, ROUTER, EMBEDDING, HEAD = (
    "attention", "feed-forward", "experts", "router", "embedding", "head",
)  # fmt: skip
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """A matrix that can be adapted: y = W x, W (rows, columns), or one such matrix an expert.

    name: as adapter files spell it. site: the path of our module. first_row: where its rows begin among the site's.
    num_experts: 0 for a single matrix. layer: None for embedding and head. group: one of the words above.
    """

    name: str
    site: str
    group: str
    columns: int
    rows: int
    layer: int | None = None
    first_row: int = 0
    num_experts: int = 0

    @property
    def part(self) -> str:
        """The last piece of its name: q_proj, gate_up_proj."""
        return self.name.rpartition(".")[2]

    @property
    def is_embedding(self) -> bool:
        """Whether tokens are looked up in it; its adapter is A (vocab_size, r), B (r, hidden_size)."""
        return self.group == EMBEDDING

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two factors of an adapter, A (columns, r) and B (r, rows); experts have E before them."""
        experts = (self.num_experts,) if self.num_experts else ()
        if self.is_embedding:
            return (self.rows, rank), (rank, self.columns)
        return (*experts, self.columns, rank), (*experts, rank, self.rows)

    def matches(self, pattern: str) -> bool:
        """Whether `pattern` means it: its group, its name, the end of its name from a dot on; * stands for any text."""
        if pattern in (self.group, self.name):
            return True
        if pattern == ALL_LINEAR:
            return self.group in (ATTENTION, FEED_FORWARD)
        return (
            self.name.endswith(f".{pattern}")
            or fnmatchcase(self.name, f"*.{pattern}")
            or fnmatchcase(self.name, pattern)
        )


def targets_of(spec: ModelSpec) -> dict[str, Target]:
    """Name -> target, in the order of the forward pass."""
    found: dict[str, Target] = {}
    for parameter, shape in spec.parameter_shapes().items():
        site = parameter.removesuffix(".weight")
        if site == parameter or len(shape) < 2:
            continue
        layer = next((int(part) for part in site.split(".") if part.isdigit()), None)
        experts, (rows, columns) = (shape[0] if len(shape) == 3 else 0), shape[-2:]
        if spec.family == "gpt_oss" and site.endswith(".qkv_proj"):
            assert layer is not None
            first, of_layer = 0, spec.layers[layer]
            for part, heads in zip("qkv", (of_layer.num_heads, *(of_layer.num_kv_heads,) * 2), strict=True):
                name = f"{site.removesuffix('qkv_proj')}{part}_proj"
                rows = heads * of_layer.head_dim
                found[name] = Target(name, site, ATTENTION, columns, rows, layer, first)
                first += rows
            continue
        found[site] = Target(site, site, _group_of(site), columns, rows, layer, 0, experts)
    return found


def by_site(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Site -> the targets that are rows of it, in their order."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.site, []).append(target)
    return found


def _group_of(site: str) -> str:
    if site.endswith(("token_embeddings", "embed_tokens")):
        return EMBEDDING
    if site == "lm_head":
        return HEAD
    if site.endswith(".router"):
        return ROUTER
    if ".experts." in site:
        return EXPERTS
    return FEED_FORWARD if ".ffn." in site else ATTENTION


def default_targets(spec: ModelSpec) -> tuple[str, ...]:
    """What is adapted when nothing is said: every matrix of the layers outside experts and router."""
    return (ALL_LINEAR,) if spec.layers else ()


def select_targets(
    targets: Iterable[Target], patterns: Sequence[str], layers: Sequence[int] | None = None
) -> list[Target]:
    """Those that a pattern means, within `layers` (None: everywhere). Raises SettingError for a pattern that means none."""
    all_targets = list(targets)
    allowed = [each for each in all_targets if layers is None or each.layer in layers]
    for pattern in patterns:
        if not any(each.matches(pattern) for each in allowed):
            raise no_match(pattern, all_targets, layers)
    return [each for each in allowed if any(each.matches(pattern) for pattern in patterns)]


def no_match(pattern: str, targets: Sequence[Target], layers: Sequence[int] | None = None) -> SettingError:
    """The error for a pattern that means nothing, with the names that there are."""
    if any(each.matches(pattern) for each in targets):
        return SettingError(
            f"{shown(pattern)} is in none of the layers {', '.join(map(str, layers or ()))}: choose other layers, or leave "
            "them out."
        )
    parts = list(dict.fromkeys(each.part for each in targets))
    groups = [*dict.fromkeys(each.group for each in targets), ALL_LINEAR]
    near = difflib.get_close_matches(pattern, [*parts, *groups], 1)
    hint = f" (is it {near[0]}?)" if near else ""
    return SettingError(
        f"{shown(pattern)} matches no matrix of this model{hint}: there are {', '.join(parts)}, and the groups "
        f"{', '.join(groups)}."
    )
