"""The adapters that a model serves, by name, and which of them a pass uses: none, one for all of its rows, or one for each.

Adapters come and go beside a loaded model. A pass keeps to those that there were when it began, and each thread has its own
pass.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from .adapter_targets import Target
from .groups import Groups
from .low_rank import Adapter, Pair
from .moe import Routes, expert_product, group_product

_new_number = itertools.count(1).__next__


@dataclass(frozen=True)
class Stack:
    """All served pairs of one module, side by side, in float32.

    a (n, columns, R), b (n, R, rows): smaller ranks have zeros, b has its factor in it. Experts stand one adapter's after the
    other's: (n * E, columns, R). gains (n, rows): DoRA's m / |W + s B A| - 1, zeros for the others; None where nobody has one.
    places: of each adapter of the set, where its pair stands; -1 for one that has none here.
    """

    a: mx.array
    b: mx.array
    gains: mx.array | None
    places: tuple[int, ...]
    num_experts: int = 0
    ties_head: tuple[bool, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        return [self.a, self.b, *([] if self.gains is None else [self.gains])]


@dataclass(frozen=True)
class Served:
    """The adapters of a set at one time: names, the number that each got when it was added, and the stacks by site."""

    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that it holds in memory."""
        return [array for stack in self.stacks.values() for array in stack.arrays]


class RowChoice:
    """For each row of a flat pass an adapter: rows (M,), 0 for none, else 1 + its place in the set."""

    def __init__(self, rows: mx.array) -> None:
        self.rows = rows
        self._known: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}

    def through(self, places: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """Where each row's pair stands in a stack, (M,), any for those without one; and 1.0 for a row that has one, else 0."""
        if places not in self._known:
            where = mx.array([0, *(max(0, place) for place in places)], mx.uint32)
            has_one = mx.array([0.0, *(float(place >= 0) for place in places)])
            self._known[places] = where[self.rows], has_one[self.rows]
        return self._known[places]


@dataclass(frozen=True)
class Selection:
    """What a pass uses: one adapter (its place), or `rows`; neither: none."""

    served: Served
    which: int | None = None
    rows: RowChoice | None = None

    @property
    def form(self) -> Hashable:
        """Equal for passes that the same compiled pieces can compute."""
        if self.rows is not None:
            return "rows", self.served.numbers
        return None if self.which is None else self.served.numbers[self.which]


@dataclass(frozen=True)
class Chosen:
    """What a pass adds beside one module. place: one pair of the stack for all rows; else `rows` say which."""

    stack: Stack
    place: int | None
    rows: RowChoice | None

    def add_to(self, y: mx.array, x: mx.array, added: mx.array | None) -> mx.array:
        """y (..., rows), what a linear module makes of x (..., columns); added: what is in y beside the product."""
        stack = self.stack
        inputs = x.astype(mx.float32)
        if self.place is not None:
            delta = inputs @ stack.a[self.place] @ stack.b[self.place]
            gains = None if stack.gains is None else stack.gains[self.place]
        else:
            where, present = self._through()
            present = _beside(present, inputs)
            delta = _by_row(_by_row(inputs, stack.a, where) * present, stack.b, where)
            gains = None if stack.gains is None else stack.gains[where].reshape(*x.shape[:-1], -1) * present
        if gains is not None:
            delta = delta + gains * (y if added is None else y - added)
        return (y + delta).astype(y.dtype)

    def add_to_embedded(self, y: mx.array, tokens: mx.array) -> mx.array:
        """y (..., hidden_size), the embedded tokens (...,)."""
        stack = self.stack
        if self.place is not None:
            return (y + stack.a[self.place][tokens] @ stack.b[self.place]).astype(y.dtype)
        where, present = self._through()
        where, present = where.reshape(tokens.shape), present.reshape(*tokens.shape, 1)
        return (y + _by_row(stack.a[where, tokens] * present, stack.b, where.flatten())).astype(y.dtype)

    def add_to_tied_head(self, y: mx.array, x: mx.array) -> mx.array:
        """y (..., vocab_size), the logits of x (..., hidden_size), by those adapters that are in a tied head too."""
        stack = self.stack
        if not any(stack.ties_head):
            return y
        if self.place is not None:
            if not stack.ties_head[self.place]:
                return y
            return (y + x.astype(mx.float32) @ stack.b[self.place].T @ stack.a[self.place].T).astype(y.dtype)
        where, present = self._through()
        present = present * mx.array([float(each) for each in stack.ties_head])[where]
        inner = _by_row(x.astype(mx.float32), stack.b.swapaxes(-1, -2), where) * _beside(present, x)
        return (y + _by_row(inner, stack.a.swapaxes(-1, -2), where)).astype(y.dtype)

    def add_to_experts(self, y: mx.array, x: mx.array, routes: Routes) -> mx.array:
        """y (..., n, rows), the experts' outputs for x (..., n or 1, columns)."""
        stack, inputs, num_experts = self.stack, x.astype(mx.float32), self.stack.num_experts
        if self.place is not None:
            a, b = (each[self.place * num_experts :][:num_experts] for each in (stack.a, stack.b))
            # Where experts lie elsewhere they are in the order of their slots, and not of their numbers.
            is_sorted = routes.is_sorted and routes.slots is None
            inner = expert_product(inputs, a, routes.experts, is_sorted)
            return (y + expert_product(inner, b, routes.experts, is_sorted)).astype(y.dtype)
        where, present = self._through()
        if routes.rows is None:  # x is (M, 1, columns) or (B, L, 1, columns)
            where, present = (each.reshape(*routes.experts.shape[:-1], 1) for each in (where, present))
        else:
            where, present = where[routes.rows], present[routes.rows]
        matrices = where * num_experts + routes.experts
        inner = expert_product(inputs, stack.a, matrices) * present[..., None]
        return (y + expert_product(inner, stack.b, matrices)).astype(y.dtype)

    def add_to_groups(self, y: mx.array, x: mx.array, groups: Groups) -> mx.array:
        """y (G, M, rows), the outputs of groups x (G, M, columns) of one expert each."""
        stack, inputs, num_experts = self.stack, x.astype(mx.float32), self.stack.num_experts
        if self.place is not None:
            a, b = (each[self.place * num_experts :][:num_experts] for each in (stack.a, stack.b))
            return (y + group_product(group_product(inputs, a, groups.experts), b, groups.experts)).astype(y.dtype)
        where, present = (each[groups.rows] for each in self._through())
        matrices = where * num_experts + groups.experts[:, None]
        inner = expert_product(inputs, stack.a, matrices) * present[..., None]
        return (y + expert_product(inner, stack.b, matrices)).astype(y.dtype)

    def _through(self) -> tuple[mx.array, mx.array]:
        assert self.rows is not None
        return self.rows.through(self.stack.places)


def _by_row(x: mx.array, matrices: mx.array, which: mx.array) -> mx.array:
    """Each row by its own matrix. x (..., k), of M rows, matrices (n, k, m), which (M,) -> (..., m)."""
    rows = x.reshape(-1, x.shape[-1])
    return expert_product(rows, matrices, which).reshape(*x.shape[:-1], -1)


def _beside(present: mx.array, x: mx.array) -> mx.array:
    return present.reshape(*x.shape[:-1], 1)


class AdapterSet:
    """The served adapters of one model; adapters.py adds them. active: the one that is used where nothing else is said."""

    def __init__(self) -> None:
        self.served = Served()
        self.active: str | None = None
        self._local = threading.local()

    @property
    def selection(self) -> Selection:
        """What the pass at work on this thread uses."""
        found: Selection | None = getattr(self._local, "selection", None)
        if found is not None:
            return found
        served = self.served
        active = self.active
        return Selection(served, served.names.index(active) if active in served.names else None)

    def chosen_at(self, site: str) -> Chosen | None:
        """What the pass at work adds beside the module there; None for nothing."""
        selection = self.selection
        stack = selection.served.stacks.get(site)
        if stack is None:
            return None
        if selection.rows is not None:
            return Chosen(stack, None, selection.rows)
        if selection.which is None or stack.places[selection.which] < 0:
            return None
        return Chosen(stack, stack.places[selection.which], None)

    @contextmanager
    def using(self, selection: Selection) -> Iterator[None]:
        """Passes within it use this selection."""
        before = getattr(self._local, "selection", None)
        self._local.selection = selection
        try:
            yield
        finally:
            self._local.selection = before

    def select(self, names: Sequence[str | None]) -> Selection:
        """The selection for flat rows with these adapters, one a row; None: none. Raises KeyError for one that is gone."""
        served = self.served
        places: dict[str | None, int] = {None: -1}
        places.update((name, place) for place, name in enumerate(served.names))
        rows = [places[name] for name in names]
        if len(set(rows)) <= 1:
            return Selection(served, rows[0] if rows and rows[0] >= 0 else None)
        return Selection(served, None, RowChoice(mx.array([place + 1 for place in rows], mx.uint32)))

    def of(self, name: str | None) -> Selection:
        """The selection for passes that are one adapter's alone. Raises KeyError for one that is gone."""
        return self.select([name])


def stacked(
    targets: Mapping[str, Target], adapters: Sequence[Adapter], gains: Mapping[tuple[int, str], mx.array]
) -> dict[str, Stack]:
    """The stacks by site. gains: DoRA's, by the adapter's place and the target's name. Lazy."""
    by_site: dict[str, list[Target]] = {}
    for target in targets.values():
        by_site.setdefault(target.site, []).append(target)
    found = {}
    for site, parts in by_site.items():
        having = [i for i, each in enumerate(adapters) if any(part.name in each.pairs for part in parts)]
        if having:
            found[site] = _stack(parts, adapters, having, gains)
    return found


def _stack(
    parts: Sequence[Target],
    adapters: Sequence[Adapter],
    having: Sequence[int],
    gains: Mapping[tuple[int, str], mx.array],
) -> Stack:
    rows = sum(part.rows for part in parts)
    joined = []
    for i in having:
        pairs = [(part, adapters[i].pairs[part.name]) for part in parts if part.name in adapters[i].pairs]
        own = [None if pair.magnitude is None else gains[i, part.name] for part, pair in pairs]
        joined.append(_joined(pairs, own, rows if len(parts) > 1 else None))
    rank = max(a.shape[-1] for a, _, _ in joined)
    a = [mx.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, rank - a.shape[-1])]) for a, _, _ in joined]
    b = [mx.pad(b, [*[(0, 0)] * (b.ndim - 2), (0, rank - b.shape[-2]), (0, 0)]) for _, b, _ in joined]
    join = mx.concatenate if parts[0].num_experts else mx.stack
    own = [gain for _, _, gain in joined]
    of_all = None
    if any(gain is not None for gain in own):
        of_all = mx.stack([mx.zeros((rows,)) if gain is None else gain for gain in own])
    places = tuple(having.index(i) if i in having else -1 for i in range(len(adapters)))
    ties = tuple(adapters[i].ties_head for i in having)
    return Stack(join(a), join(b), of_all, places, parts[0].num_experts, ties)


def _joined(
    pairs: Sequence[tuple[Target, Pair]], gains: Sequence[mx.array | None], rows: int | None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """One adapter's pairs of a module as one pair, the factors in b; and DoRA's gains. rows: of a module of several parts."""
    factors = []
    for (target, pair), gain in zip(pairs, gains, strict=True):
        b = pair.b.astype(mx.float32) * pair.scale
        if gain is not None:
            b = b * (gain + 1.0)
        if rows is not None:
            b = mx.pad(b, [(0, 0), (target.first_row, rows - target.first_row - target.rows)])
        factors.append(b)
    a = mx.concatenate([pair.a.astype(mx.float32) for _, pair in pairs], axis=-1)
    of_all = None
    if any(gain is not None for gain in gains):
        if rows is None:
            of_all = gains[0]
        else:
            of_all = mx.zeros((rows,))
            for (target, _), gain in zip(pairs, gains, strict=True):
                if gain is not None:
                    of_all[target.first_row : target.first_row + target.rows] = gain
    return a, mx.concatenate(factors, axis=-2), of_all
