"""One layer's experts for few rows: each way through them timed, beside the floor that reading the weights is, and what is
done around the products.

A form is a function (experts, x (N, hidden_size), chosen (N, k)) -> each chosen expert's output (N, k, hidden_size). Several
passes are one graph, each of which takes what the one before gave, with other choices: so that the host is not what is
timed. Whatever a measurement ends with costs that measurement only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from openelm_mlx.bench.expert_layer import LayerShape, Rows, distance, random_rows
from openelm_mlx.models.groups import Groups, groups_on_host, make_groups
from openelm_mlx.models.moe import Experts, MoE, sort_routes, weighted_sum
from openelm_mlx.models.precision import add_rounded, one_kernel, runs_on_cpu
from openelm_mlx.models.routing_ways import GROUPED, KERNEL, MOST_ROUTES_OF_A_TABLE, SORTED, UNSORTED, num_groups

Form = Callable[[Experts, mx.array, mx.array], mx.array]
Clock = Callable[[], float]

PROMISED, PLACED = "sorted, promised", "blocks_16, placed before"
FORMS = (UNSORTED, SORTED, PROMISED, "blocks_16", "blocks_32", GROUPED, PLACED, "blocks_64")
# What a form is good for, in rows: beyond, it would take memory or time for nothing.
_MOST_ROWS = {GROUPED: 64, UNSORTED: 256}
_LEAST_ROWS = {"blocks_32": 4, "blocks_64": 32}


@dataclass(frozen=True)
class Settings:
    """passes: of one graph. rounds: how often each graph is timed, after once that does not count."""

    passes: int = 8
    rounds: int = 5


@dataclass(frozen=True)
class Measured:
    """One figure: microseconds a pass (median), or the error that it ended with.

    shape: the layer's name. floor_us: reading each chosen expert once at the bandwidth measured. groups: how many groups
    the form multiplies. off: how far its numbers are from the unsorted ones, in parts of the largest.
    """

    shape: str
    what: str
    rows: int
    us: float | None = None
    floor_us: float | None = None
    groups: int | None = None
    off: float | None = None
    error: str | None = None

    def line(self) -> str:
        """The figure alone, for whoever waits."""
        return f"{self.shape}, {self.rows} rows, {self.what}: " + (
            f"{self.us:,.1f} us" if self.us is not None else str(self.error)
        )

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


# --- the forms --------------------------------------------------------------------------------------------------------


def form_of(name: str) -> Form:
    """The form of this name, one of FORMS or KERNEL; those that are placed before are made by `placed`."""
    if name == KERNEL:
        return lambda experts, x, chosen: experts.by_kernel(x, chosen)
    if name in (UNSORTED, SORTED):

        def as_models_do(experts: Experts, x: mx.array, chosen: mx.array) -> mx.array:
            experts.ways = ((1, name),)
            return experts(x, chosen)

        return as_models_do
    if name == PROMISED:

        def promised(experts: Experts, x: mx.array, chosen: mx.array) -> mx.array:
            rows, routes, inverse = sort_routes(x, chosen)
            outputs = experts.feed_forward(rows, routes._replace(is_sorted=True))
            return outputs[inverse].reshape(*chosen.shape, -1)

        return promised

    def in_groups(experts: Experts, x: mx.array, chosen: mx.array) -> mx.array:
        groups = make_groups(chosen, name, experts.num_experts)
        return experts.of_groups(x, groups).reshape(*chosen.shape, -1)

    return in_groups


def placed(rows: Rows, num_experts: int) -> Form:
    """Blocks without what finding the places costs: the host has found them."""
    made: list[Groups] = []
    for chosen in rows.chosen:
        routes = np.array(chosen).ravel()
        k, order = chosen.shape[-1], np.argsort(routes, kind="stable")
        groups = groups_on_host(order // k, routes[order], routes[order], "blocks_16", chosen.shape[0], num_experts)
        places = np.empty(len(routes), np.uint32)
        places[order] = np.array(groups.places)
        made.append(groups._replace(places=mx.array(places)))
    mx.eval([each for groups in made for each in groups if each is not None])
    known = {id(chosen): groups for chosen, groups in zip(rows.chosen, made, strict=True)}

    def as_placed(experts: Experts, x: mx.array, chosen: mx.array) -> mx.array:
        return experts.of_groups(x, known[id(chosen)]).reshape(*chosen.shape, -1)

    return as_placed


def groups_of(name: str, num_rows: int, shape: LayerShape) -> int | None:
    """How many groups a form makes; None where it makes none."""
    routes = num_rows * shape.experts_per_token
    if name.startswith("blocks") and name != PLACED:
        return num_groups(name, num_rows, routes, shape.num_experts)
    return shape.num_experts if name.startswith("grouped") else None


def measured_ways(
    name: str,
    shape: LayerShape,
    experts: Experts,
    numbers: Sequence[int],
    bandwidth: float,
    settings: Settings,
    left: Clock,
) -> Iterator[Measured]:
    """Every form for so many rows, as it is known; none after the time is over."""
    for number in numbers:
        rows = random_rows(shape, number, settings.passes)
        distinct = statistics.mean(len(np.unique(np.array(chosen))) for chosen in rows.chosen)
        floor = 1e6 * distinct * shape.expert_bytes / bandwidth
        known: mx.array | None = None
        can_kernel = not runs_on_cpu() and number * shape.experts_per_token <= MOST_ROUTES_OF_A_TABLE
        for form in (*FORMS, *([KERNEL] if can_kernel else [])):
            if not _LEAST_ROWS.get(form, 1) <= number <= _MOST_ROWS.get(form, 4096):
                continue
            if left() <= 0:
                return
            groups = groups_of(form, number, shape)
            try:
                way = placed(rows, shape.num_experts) if form == PLACED else form_of(form)
                found = _once(way, experts, rows)
                known = found if known is None else known
                off = distance(found, known)
                us = _timed(_chain(way, experts, rows), settings)
                yield Measured(name, form, number, us, floor, groups, off)
            except Exception as error:  # noqa: BLE001
                yield Measured(name, form, number, None, floor, groups, error=f"{type(error).__name__}: {error}")


def _once(form: Form, experts: Experts, rows: Rows) -> mx.array:
    out = weighted_sum(form(experts, rows.x, rows.chosen[0]), rows.weights, mx.bfloat16).astype(mx.float32)
    mx.eval(out)
    return out


def _chain(form: Form, experts: Experts, rows: Rows) -> Callable[[], None]:
    def chain(x: mx.array) -> mx.array:
        for chosen in rows.chosen:
            y = weighted_sum(form(experts, x, chosen), rows.weights, mx.bfloat16)
            x = x + 0.01 * y.astype(mx.bfloat16)
        return x

    compiled: Any = chain if runs_on_cpu() else mx.compile(chain)
    return lambda: mx.eval(compiled(rows.x))


def _timed(call: Callable[[], None], settings: Settings) -> float:
    """Microseconds of a pass, the median of the rounds."""
    times = []
    for number in range(settings.rounds + 1):
        mx.synchronize()
        started = time.perf_counter()
        call()
        if number:
            times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times) / settings.passes


# --- a prompt's chunk that decoding rows ride in ------------------------------------------------------------------------


def measured_riding(
    name: str, shape: LayerShape, experts: Experts, chunk: int, riders: Sequence[int], settings: Settings, left: Clock
) -> Iterator[Measured]:
    """A sorted chunk alone and with so many rows more: what these cost is the difference."""
    for number in (0, *riders):
        if left() <= 0:
            return
        what = f"a chunk of {chunk:,} rows, sorted, and so many more"
        try:
            rows = random_rows(shape, chunk + number, settings.passes)
            us = _timed(_chain(form_of(SORTED), experts, rows), settings)
            yield Measured(name, what, number, us)
        except Exception as error:  # noqa: BLE001
            yield Measured(name, what, number, error=f"{type(error).__name__}: {error}")


# --- around the products ------------------------------------------------------------------------------------------------


def measured_around(
    name: str, shape: LayerShape, experts: Experts, numbers: Sequence[int], settings: Settings, left: Clock
) -> Iterator[Measured]:
    """The router, finding places, biases, and the weighted sum with the residual stream: as models do it, or fused."""
    spec, layer = shape.specs()
    moe = MoE(spec, layer)
    moe.router.weight = mx.random.normal(moe.router.weight.shape, key=mx.random.key(1)) * shape.hidden_size**-0.5
    moe.eval()
    mx.eval(moe.router.parameters())
    for number in numbers:
        rows = random_rows(shape, number, settings.passes)
        outputs = mx.random.normal((number, shape.experts_per_token, shape.hidden_size), key=mx.random.key(2))
        outputs = outputs.astype(mx.bfloat16)
        h = mx.random.normal((number, shape.hidden_size), key=mx.random.key(3))
        mx.eval(outputs, h)
        for what, step in _around(moe, experts, rows, outputs).items():
            if left() <= 0:
                return
            try:
                yield Measured(name, what, number, _timed(_repeated(step, h, rows), settings))
            except Exception as error:  # noqa: BLE001
                yield Measured(name, what, number, error=f"{type(error).__name__}: {error}")


Step = Callable[[mx.array, mx.array], mx.array]  # (the residual stream, a pass's choice) -> the residual stream


def _around(moe: MoE, experts: Experts, rows: Rows, outputs: mx.array) -> dict[str, Step]:
    def nothing(h: mx.array, chosen: mx.array) -> mx.array:
        return h + 1.0

    def router(h: mx.array, chosen: mx.array) -> mx.array:
        indices, weights = moe.route(h)
        return h + weights[..., :1] + indices[..., :1]

    def scores(h: mx.array, chosen: mx.array) -> mx.array:
        return h + moe.router(h)[..., :1]

    def places(way: str) -> Step:
        def step(h: mx.array, chosen: mx.array) -> mx.array:
            groups = make_groups(chosen + (h[:1, :1] > 1e30), way, experts.num_experts)
            assert groups.experts is not None
            return h + groups.rows[0, 0] + groups.places[:1] + groups.experts[:1]

        return step

    def biases(h: mx.array, chosen: mx.array) -> mx.array:
        return h + experts.bias_table()[chosen][:, 0, : h.shape[-1]]

    def as_models_do(h: mx.array, chosen: mx.array) -> mx.array:
        weights = rows.weights + h[:, :1] * 0
        return add_rounded(h, weighted_sum(outputs, weights, mx.bfloat16), mx.bfloat16)

    def by_a_product(h: mx.array, chosen: mx.array) -> mx.array:
        total = (rows.weights[:, None] @ outputs.astype(mx.float32)).squeeze(1)
        return add_rounded(h, total, mx.bfloat16)

    def in_one_kernel(h: mx.array, chosen: mx.array) -> mx.array:
        return sum_in_one_kernel(h, outputs, rows.weights)

    return {
        "one sum, for comparison": nothing, "router's scores": scores, "router, choice and weights": router,
        "places in blocks_16": places("blocks_16"), "places in grouped": places(GROUPED), "biases of each route": biases,
        "weighted sum and residual": as_models_do, "the same by a product": by_a_product,
        "weighted sum and residual, one kernel": in_one_kernel,
    }  # fmt: skip


def sum_in_one_kernel(h: mx.array, outputs: mx.array, weights: mx.array) -> mx.array:
    """`add_rounded(h, weighted_sum(outputs, weights))` in bfloat16, elementwise. h (N, hidden_size), outputs
    (N, k, hidden_size), weights (N, k).
    """
    k = outputs.shape[-2]
    return _sum_in_one_kernel(h, *(outputs[:, i] for i in range(k)), *(weights[:, i, None] for i in range(k)))


@one_kernel
def _sum_in_one_kernel(h: mx.array, *outputs_and_weights: mx.array) -> mx.array:
    k = len(outputs_and_weights) // 2
    total = outputs_and_weights[0].astype(mx.float32) * outputs_and_weights[k]
    for i in range(1, k):
        total = total + outputs_and_weights[i].astype(mx.float32) * outputs_and_weights[k + i]
    return (h + total).astype(mx.bfloat16).astype(mx.float32)


def _repeated(step: Step, h: mx.array, rows: Rows) -> Callable[[], None]:
    def chain(h: mx.array) -> mx.array:
        for chosen in rows.chosen:
            h = step(h, chosen)
        return h

    compiled: Any = chain if runs_on_cpu() else mx.compile(chain)
    return lambda: mx.eval(compiled(h))


# --- for people -------------------------------------------------------------------------------------------------------


def table(title: str, found: Sequence[Measured]) -> str:
    """The figures in a table: a line for each number of rows, a column for each form; then whatever went wrong."""
    names = list(dict.fromkeys(each.what for each in found))
    numbers = list(dict.fromkeys(each.rows for each in found))
    figures = {(each.rows, each.what): each for each in found}
    floors = {each.rows: each.floor_us for each in found if each.floor_us is not None}
    widths = [max(9, len(name)) for name in names]
    lines = [f"{title}: us a layer" + (", and the floor by bandwidth" if floors else "")]
    lines.append("  ".join(["rows".rjust(5), *(["floor".rjust(7)] if floors else []), *map(str.rjust, names, widths)]))
    for number in numbers:
        cells = [f"{number:5}", *([f"{floors[number]:7,.0f}"] if floors else [])]
        for name, width in zip(names, widths, strict=True):
            each = figures.get((number, name))
            text = "" if each is None else "error" if each.us is None else f"{each.us:,.1f}"
            cells.append(text.rjust(width))
        lines.append("  ".join(cells))
    lines += [f"{each.rows} rows, {each.what}: {each.error}" for each in found if each.error is not None]
    far = [each for each in found if each.off is not None and not each.off <= 0.02]
    lines += [f"{each.rows} rows, {each.what}: {each.off:.1e} off the unsorted one" for each in far]
    return "\n".join(lines)
