"""Routes side by side in groups of one expert each: where each of them goes (models/routing_ways.py says when)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .precision import one_kernel
from .routing_ways import GROUPED, num_groups, rows_in_a_group


class Groups(NamedTuple):
    """Where routes go that are multiplied in groups of one expert each, every group with the same number of places.

    rows (G, M): the input row that stands in each place; places that are padding have some other row.
    experts (G,): each group's, for its bias. slots (G,): where its weights lie; None where groups are all experts in order.
    places (R,): the place, of G * M, that each route has.
    """

    rows: mx.array
    experts: mx.array
    slots: mx.array | None
    places: mx.array


def make_groups(expert_indices: mx.array, way: str, num_experts: int, slots: mx.array | None = None) -> Groups:
    """The groups of `expert_indices` (..., k), in a few small kernels and without the host.

    slots, of the same shape: where each route's expert lies, if that is not at its own number, among `num_experts` ones.
    """
    k, experts = expert_indices.shape[-1], expert_indices.flatten()
    routes, num_rows = experts.size, experts.size // k
    places_each = rows_in_a_group(way, num_rows)
    where = experts if slots is None else slots.flatten()
    each = _up_to(routes)
    if way == GROUPED:
        # Every row has a place in every group, chosen or not: so places need not be found.
        rows = mx.broadcast_to(mx.minimum(_up_to(places_each), num_rows - 1), (num_experts, places_each))
        owners = _up_to(num_experts)
        if slots is not None:  # a group that nobody chose has any expert's bias
            owners = experts[mx.argmax(_is_there(where[None], owners[:, None]), axis=1)]
        return Groups(rows, owners, None, _place_of_row(where, each, places_each, k))
    # Experts that are not in memory may share a slot: then a row has more than one route there, which are of no use.
    count = num_groups(way, num_rows if slots is None else routes, routes, num_experts)
    mine, others = where[:, None], where[None]
    ranks = mx.sum(_same_and_before(mine, others, each[:, None], each[None]), axis=1)
    opened = mx.sum(_is_opened(mine, others, ranks[:, None], ranks[None], places_each), axis=1)
    places = _places(opened - 1, ranks, places_each)
    # The route in each place; the first one where there is none, whose results nobody reads.
    route = mx.argmax(_is_there(places[None], _up_to(count * places_each)[:, None]), axis=1).reshape(count, places_each)
    first = route[:, 0]
    return Groups(route // k, experts[first], where[first], places)


@one_kernel
def _same_and_before(mine: mx.array, others: mx.array, my_number: mx.array, numbers: mx.array) -> mx.array:
    return (mine == others) & (numbers < my_number)


@one_kernel
def _is_opened(mine: mx.array, others: mx.array, my_rank: mx.array, ranks: mx.array, places_each: int) -> mx.array:
    """Whether the other route is the first of a block that comes before mine, or is mine."""
    return (ranks % places_each == 0) & ((others < mine) | ((others == mine) & (ranks <= my_rank)))


@one_kernel
def _places(group: mx.array, rank: mx.array, places_each: int) -> mx.array:
    return group.astype(mx.int32) * places_each + rank.astype(mx.int32) % places_each


@one_kernel
def _place_of_row(group: mx.array, route: mx.array, places_each: int, k: int) -> mx.array:
    return group.astype(mx.int32) * places_each + route // k


@one_kernel
def _is_there(places: mx.array, numbers: mx.array) -> mx.array:
    return places == numbers


@lru_cache(maxsize=64)
def _up_to(count: int) -> mx.array:
    return mx.array(np.arange(count, dtype=np.int32))  # from the host: there is nothing to run


def groups_on_host(
    rows: np.ndarray, experts: np.ndarray, slots: np.ndarray, way: str, num_rows: int, num_slots: int
) -> Groups:
    """As `make_groups`, of routes that the host knows, sorted by slot. rows, experts, slots (R,): each route's.

    num_rows: of the whole step, of which these may be a part: how many places a group has follows from it.
    """
    places_each = rows_in_a_group(way, num_rows)
    if way == GROUPED:
        inputs, owners = np.minimum(np.arange(places_each), num_rows - 1), np.full(num_slots, experts[0])
        owners[slots] = experts
        inputs = np.broadcast_to(inputs, (num_slots, places_each))
        return Groups(_numbers(inputs), _numbers(owners), None, _numbers(slots.astype(np.int64) * places_each + rows))
    starts = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1]]))
    ranks = np.arange(len(slots)) - np.repeat(starts, np.diff([*starts, len(slots)]))
    opens = ranks % places_each == 0
    groups, count = np.cumsum(opens) - 1, int(opens.sum())
    places = groups * places_each + ranks % places_each
    inputs, of_groups = np.full(count * places_each, rows[0]), np.full(count, experts[0])
    inputs[places], of_groups[groups] = rows, experts
    inputs = inputs.reshape(count, places_each)
    return Groups(_numbers(inputs), _numbers(of_groups), _numbers(slots[opens]), _numbers(places))


def _numbers(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.uint32))
