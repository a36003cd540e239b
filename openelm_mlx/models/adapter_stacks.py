"""The stacks of served adapters: of what each adapter has beside a module one pair, and the pairs of all side by side.

A set (adapter_sets.py) is not changed: with one adapter more or less it is another one, whose stacks are new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .adapter_sets import Served, Stack
from .adapter_targets import Target, by_site
from .low_rank import Adapter, Pair


@dataclass(frozen=True)
class SitePair:
    """All that one adapter has beside one module, as one pair in float32 with its factor in b; gains as in `Stack`."""

    a: mx.array
    b: mx.array
    gains: mx.array | None = None


def site_pairs(
    targets: Mapping[str, Target], adapter: Adapter, gains: Mapping[str, mx.array]
) -> dict[str, tuple[SitePair, int]]:
    """An adapter's pairs by site, with the number of experts there. gains: DoRA's, by the target's name. Lazy."""
    found = {}
    for site, parts in by_site(targets.values()).items():
        pairs = [(part, adapter.pairs[part.name]) for part in parts if part.name in adapter.pairs]
        if pairs:
            rows = sum(part.rows for part in parts) if len(parts) > 1 else None
            found[site] = _joined(pairs, gains, rows), parts[0].num_experts
    return found


def _joined(pairs: Sequence[tuple[Target, Pair]], gains: Mapping[str, mx.array], rows: int | None) -> SitePair:
    """rows: of a module that has several parts, of which each pair changes some rows."""
    factors, of_all = [], None
    for target, pair in pairs:
        b = pair.b.astype(mx.float32) * pair.scale
        gain = gains.get(target.name)
        if gain is not None:
            b = b * (gain + 1.0)
        if rows is not None:
            beside = (target.first_row, rows - target.first_row - target.rows)
            b = mx.pad(b, [(0, 0), beside])
            gain = None if gain is None else mx.pad(gain, [beside])
        if gain is not None:
            of_all = gain if of_all is None else of_all + gain
        factors.append(b)
    a = mx.concatenate([pair.a.astype(mx.float32) for _, pair in pairs], axis=-1)
    return SitePair(mx.contiguous(a), mx.contiguous(mx.concatenate(factors, axis=-2)), of_all)


def served_bytes(targets: Mapping[str, Target], adapter: Adapter) -> int:
    """What an adapter takes in memory once it is served."""
    total = 0
    for parts in by_site(targets.values()).values():
        having = [part for part in parts if part.name in adapter.pairs]
        if not having:
            continue
        rank, count = sum(adapter.pairs[part.name].rank for part in having), max(1, having[0].num_experts)
        rows = having[0].rows if len(parts) == 1 else sum(part.rows for part in parts)
        total += count * rank * (having[0].columns + rows)
        if any(adapter.pairs[part.name].magnitude is not None for part in having):
            total += rows
    return 4 * total


def with_adapter(
    served: Served,
    name: str,
    id: str,
    adapter: Adapter,
    pairs: Mapping[str, tuple[SitePair, int]],
    kept: Any = None,
) -> Served:
    """The set with one more adapter. Lazy."""
    count, stacks = len(served.names), {}
    for site in dict.fromkeys([*served.stacks, *pairs]):
        old, new = served.stacks.get(site), pairs.get(site)
        if new is None:
            assert old is not None
            stacks[site] = replace(old, places=(*old.places, -1))
        elif old is None:
            pair, num_experts = new
            a, b = (pair.a, pair.b) if num_experts else (pair.a[None], pair.b[None])
            gains = None if pair.gains is None else pair.gains[None]
            stacks[site] = Stack(a, b, gains, (*(-1,) * count, 0), num_experts, (adapter.ties_head,))
        else:
            stacks[site] = _with_pair(old, new[0], adapter.ties_head)
    return Served((*served.names, name), (*served.ids, id), stacks, (*served.kept, kept))


def _with_pair(old: Stack, pair: SitePair, ties_head: bool) -> Stack:
    rank = max(old.a.shape[-1], pair.a.shape[-1])
    a, b = (pair.a, pair.b) if old.num_experts else (pair.a[None], pair.b[None])
    a = mx.concatenate([_padded(each, rank, -1) for each in (old.a, a)])
    b = mx.concatenate([_padded(each, rank, -2) for each in (old.b, b)])
    num_pairs, rows = len(old.ties_head), b.shape[-1]
    gains = None
    if old.gains is not None or pair.gains is not None:
        before = mx.zeros((num_pairs, rows)) if old.gains is None else old.gains
        gains = mx.concatenate([before, mx.zeros((1, rows)) if pair.gains is None else pair.gains[None]])
    return Stack(a, b, gains, (*old.places, num_pairs), old.num_experts, (*old.ties_head, ties_head))


def _padded(array: mx.array, size: int, axis: int) -> mx.array:
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)


def without_adapter(served: Served, name: str) -> Served:
    """The set without one of its adapters. Lazy."""
    at = served.names.index(name)
    stacks = {}
    for site, stack in served.stacks.items():
        place = stack.places[at]
        places = (*stack.places[:at], *stack.places[at + 1 :])
        if place < 0:
            stacks[site] = replace(stack, places=places)
        elif len(stack.ties_head) > 1:
            kept = [each for each in range(len(stack.ties_head)) if each != place]
            each_has = max(1, stack.num_experts)
            a, b = (
                mx.concatenate([whole[i * each_has : (i + 1) * each_has] for i in kept]) for whole in (stack.a, stack.b)
            )
            gains = None if stack.gains is None else mx.concatenate([stack.gains[i : i + 1] for i in kept])
            moved = tuple(each - (each > place) for each in places)
            ties = tuple(stack.ties_head[i] for i in kept)
            stacks[site] = Stack(a, b, gains, moved, stack.num_experts, ties)
    names, ids = ((*each[:at], *each[at + 1 :]) for each in (served.names, served.ids))
    return Served(names, ids, stacks, (*served.kept[:at], *served.kept[at + 1 :]))
