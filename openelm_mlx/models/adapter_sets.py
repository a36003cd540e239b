"""The adapters that a model serves, by name, and which of them a pass uses: none, one for all of its rows, or one for each.

Adapters come and go beside a loaded model. A pass keeps to those that there were when it began, and each thread has its own
pass.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..errors import SettingError
from .groups import Groups
from .moe import Routes, expert_product, group_product

# The name that stands for no adapter where one is active.
NO_ADAPTER = "none"
# What is said to a request whose adapter was taken away after it had been made.
GONE = "The request's adapter has been taken away from the model: add it again, and ask again."


# What `Selection.form` is: None without an adapter, else the set's ids, and which of them, or "rows".
AdaptersForm = tuple[tuple[str, ...], int | str | None] | None


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
    """The adapters of a set at one time: names, what each is (a digest of its numbers), and the stacks by site.

    kept: of each what other machines keep of it, for as long as this is alive (remote.py).
    """

    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    kept: tuple[Any, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that it holds in memory."""
        return [array for stack in self.stacks.values() for array in stack.arrays]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


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

    def taking(self, rows: Sequence[int] | mx.array) -> Selection:
        """The same for those rows alone."""
        if self.rows is None:
            return self
        taken = rows if isinstance(rows, mx.array) else mx.array(list(rows), mx.uint32)
        return replace(self, rows=RowChoice(self.rows.rows[taken]))

    @property
    def form(self) -> AdaptersForm:
        """Equal for passes that the same compiled pieces can compute."""
        if self.rows is None and self.which is None:
            return None
        return self.served.ids, "rows" if self.rows is not None else self.which


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


class Using:
    """What `AdapterSet.using` gives: a class, since a generator takes three times as many calls for every token."""

    def __init__(self, local: threading.local, selection: Selection) -> None:
        self._local, self._selection = local, selection
        self._before: Selection | None = None

    def __enter__(self) -> None:
        self._before = getattr(self._local, "selection", None)
        self._local.selection = self._selection

    def __exit__(self, *_: object) -> None:
        self._local.selection = self._before


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

    def using(self, selection: Selection) -> Using:
        """Passes within it use this selection; it can be entered again and again."""
        return Using(self._local, selection)

    def select(self, ids: Sequence[str | None]) -> Selection:
        """The selection for flat rows with these adapters, one a row; None: none.

        Raises SettingError for one that has been taken away.
        """
        served = self.served
        places: dict[str | None, int] = {None: 0}
        places.update((each, place + 1) for place, each in enumerate(served.ids))
        if not places.keys() >= set(ids):
            raise SettingError(GONE)
        rows = [places[each] for each in ids]
        if len(set(rows)) > 1:
            return Selection(served, None, RowChoice(mx.array(rows, mx.uint32)))
        return Selection(served, rows[0] - 1 if rows and rows[0] else None)

    def of(self, name: str | None) -> Selection:
        """The selection for passes of the adapter of that name; see `id_of`."""
        return self.select([self.id_of(name)])

    def id_of(self, name: str | None) -> str | None:
        """What the adapter of that name is; of the active one for None. None where that is none, and for NO_ADAPTER.

        Raises KeyError for a name that there is not.
        """
        name = self.active if name is None else name
        served = self.served
        return None if name in (None, NO_ADAPTER) else dict(zip(served.names, served.ids, strict=True))[name]
