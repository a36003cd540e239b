"""Equivalent kernels, timed against each other on this machine, so that models use the faster ones.

The defaults were chosen by measurements on one machine and need not be the best on another. Both kernels of a pair run in
turns; the default stays unless the other one is clearly faster. On the CPU backend there is nothing to choose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..checkpoint.released import released_openelm_config
from ..decoding.compiled_step import CompiledStep
from ..decoding.prefill import prefill
from ..decoding.step import PlainStep
from ..models import build_model
from ..models.precision import KernelChoices, default_choices, runs_on_cpu
from ..models.slot_attention import HEAD_DIMS, MOST_HEADS, attend_in_slots, attend_with_mask, write_in_slots
from ..specs import spec_from_config
from .expert_layer import LayerShape, in_turns
from .expert_ways import ROWS, WaysTiming, time_expert_ways

if TYPE_CHECKING:
    from ..models import Model

# A way that is not the default has to be faster by this much.
MARGIN = 0.05
_ROUNDS = 7
# By how much a result in half precision may be off float32's.
_HALF = 2e-2
# How many products are put into one graph: a single one ends before the host has built the next.
_IN_A_ROW = 32


@dataclass(frozen=True)
class Timing:
    """One choice: seconds of each way (medians), the default, and the winner. is_chosen: whether models go by it."""

    name: str
    seconds: Mapping[Any, float]
    default: Any
    winner: Any
    is_chosen: bool = True

    def line(self) -> str:
        """The timing for people."""
        ways = ", ".join(f"{way}: {1e6 * each:,.1f} us" for way, each in self.seconds.items())
        if not self.is_chosen:
            better = (
                "the default is the faster one" if self.winner == self.default else f"{self.winner} would be faster"
            )
            return f"{self.name}: {ways}; {better}; only told, nothing goes by it"
        kept = "as before" if self.winner == self.default else f"instead of {self.default}"
        return f"{self.name}: {ways}; takes {self.winner}, {kept}"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": {str(way): each for way, each in self.seconds.items()}}


@dataclass(frozen=True)
class Sizes:
    """What is timed: the widths of gpt-oss-20b and of OpenELM-1.1B unless a test asks for less.

    expert_layer: None for gpt-oss-20b's, as far as there is memory for it.
    """

    hidden: int = 2880
    inner: int = 2880
    experts: int = 8
    routes: int = 1024
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    places: int = 8192
    layers: int = 4
    tokens: int = 32
    expert_layer: LayerShape | None = None
    rows: tuple[int, ...] = ROWS


def time_alternatives(sizes: Sizes | None = None) -> list[Timing | WaysTiming]:
    """Every choice, timed; none on the CPU backend."""
    if runs_on_cpu():
        return []
    sizes, defaults = Sizes() if sizes is None else sizes, default_choices()
    found: list[Timing | WaysTiming] = []
    for name, make in _ALTERNATIVES.items():
        ways = make(sizes)
        seconds = in_turns(ways, _ROUNDS)
        default = getattr(defaults, name)
        default = default if default in seconds else next(iter(seconds))
        fastest = min(seconds, key=lambda way: seconds[way])
        is_clear = seconds[fastest] < (1 - MARGIN) * seconds[default]
        found.append(Timing(name, seconds, default, fastest if is_clear else default))
    for name, (make, default) in _TOLD.items():
        seconds = in_turns(make(sizes), _ROUNDS)
        fastest = min(seconds, key=lambda way: seconds[way])
        is_clear = seconds[fastest] < (1 - MARGIN) * seconds[default]
        found.append(Timing(name, seconds, default, fastest if is_clear else default, is_chosen=False))
    found.append(time_expert_ways(sizes.expert_layer, sizes.rows))
    return found


def winners(timings: Sequence[Timing | WaysTiming]) -> KernelChoices:
    """The kernel choices that won."""
    found: dict[str, Any] = {each.name: each.winner for each in timings if each.is_chosen}
    for each in timings:
        if isinstance(each, WaysTiming):
            found["expert_kernel_rows"] = each.kernel_rows
    return replace(default_choices(), **found)


def _rows(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """A prompt's sorted product with experts' rows as stored, or padded to whole tiles."""
    x = mx.random.normal((sizes.routes, 1, sizes.inner)).astype(mx.bfloat16)
    experts = mx.sort(mx.random.randint(0, sizes.experts, (sizes.routes,))).astype(mx.uint32)

    def product(tile: int) -> Callable[[], None]:
        rows = sizes.hidden + -sizes.hidden % tile
        weight = mx.random.normal((sizes.experts, rows, sizes.inner)).astype(mx.bfloat16)
        packed, scales, *_ = mx.quantize(weight, 32, 4, mode="mxfp4")
        mx.eval(x, experts, packed, scales)
        return lambda: mx.eval(
            mx.gather_qmm(
                x, packed, scales, None, rhs_indices=experts, transpose=True, group_size=32, bits=4, mode="mxfp4",
                sorted_indices=True,
            )
        )  # fmt: skip

    return {1: product(1), 128: product(128)}


def _columns(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """A token's products with its experts' columns as stored, or padded with zeros to a multiple of 512.

    Metal's faster kernel for one row of 4 bits needs such a multiple: 3,072 is one, gpt-oss's 2,880 is not.
    """
    experts = mx.array([0, 1, 2, 3], mx.uint32) % sizes.experts
    plain = mx.random.normal((sizes.experts, sizes.hidden, sizes.inner)).astype(mx.bfloat16) * sizes.inner**-0.5
    row = mx.random.normal((1, 1, sizes.inner)).astype(mx.bfloat16)

    def products(multiple: int) -> Callable[[], None]:
        missing = -sizes.inner % multiple
        packed, scales, *_ = mx.quantize(mx.pad(plain, [(0, 0), (0, 0), (0, missing)]), 32, 4, mode="mxfp4")
        x = mx.pad(row, [(0, 0), (0, 0), (0, missing)])
        mx.eval(packed, scales, x, experts)

        def run() -> None:
            total = mx.zeros((), mx.bfloat16)
            for _ in range(_IN_A_ROW):
                out = mx.gather_qmm(
                    x + total,
                    packed,
                    scales,
                    None,
                    rhs_indices=experts,
                    transpose=True,
                    group_size=32,
                    bits=4,
                    mode="mxfp4",
                )
                total = total + out[0, 0, 0] * 0  # the next one waits for it
            mx.eval(out)

        return run

    return {1: products(1), 512: products(512)}


def _places(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """One token's attention over a long cache whose buffer has the exact capacity, or more."""
    queries = mx.random.normal((1, sizes.heads, 1, sizes.head_dim)).astype(mx.bfloat16)
    sinks = mx.zeros((sizes.heads,), mx.bfloat16)

    def attention(spare: int) -> Callable[[], None]:
        shape = (1, sizes.kv_heads, sizes.places + spare, sizes.head_dim)
        keys, values = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2))
        mx.eval(queries, keys, values, sinks)

        def run() -> None:
            k, v = keys[..., : sizes.places, :], values[..., : sizes.places, :]
            out = queries
            for _ in range(_IN_A_ROW):
                out = mx.fast.scaled_dot_product_attention(out, k, v, scale=0.125, sinks=sinks)
            mx.eval(out)

        return run

    return {0: attention(0), 8: attention(8)}


def _compiled(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """Some tokens of an OpenELM of a few layers."""
    spec = spec_from_config(released_openelm_config("1.1B"))
    model = build_model(replace(spec, layers=spec.layers[: sizes.layers]))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())

    def decode(make: Callable[[Model, Any], Any]) -> Callable[[], None]:
        def run() -> None:
            cache = model.make_cache()
            token = mx.argmax(prefill(model, list(range(3, 35)), cache, 512))
            step = make(model, cache)
            for _ in range(sizes.tokens):
                token = mx.argmax(step(token))
                mx.async_eval(token)
            mx.eval(token)

        return run

    return {False: decode(PlainStep), True: decode(CompiledStep)}


def _sums(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """A row times a matrix, added to another row, in one kernel or in two."""
    matrix = mx.random.normal((sizes.hidden, sizes.hidden)).astype(mx.bfloat16) * sizes.hidden**-0.5
    row = mx.random.normal((1, sizes.hidden)).astype(mx.bfloat16)
    mx.eval(matrix, row)
    return {
        False: _repeated(row, lambda out: row + out @ matrix.T),
        True: _repeated(row, lambda out: mx.addmm(row, out, matrix.T)),
    }


def _biases(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """A row times a matrix, and a bias, in one call or in two."""
    matrix = mx.random.normal((sizes.hidden, sizes.hidden)).astype(mx.bfloat16) * sizes.hidden**-0.5
    row, bias = (mx.random.normal((1, sizes.hidden)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(matrix, row, bias)
    return {
        False: _repeated(row, lambda out: mx.addmm(bias[0], out, matrix.T)),
        True: _repeated(row, lambda out: out @ matrix.T + bias[0]),
    }


def _slot_kernel(sizes: Sizes) -> dict[Any, Callable[[], None]]:
    """A layer's attention of some requests of different lengths: MLX's with a mask, or the kernel of ours.

    Only where `_is_kernel_right`, it is one of the ways: models of every shape go by what is stored.
    """
    slots, columns = 16, max(8, sizes.places // 8)
    queries = mx.random.normal((slots, sizes.heads, 1, sizes.head_dim)).astype(mx.bfloat16)
    buffer = mx.random.normal((2, slots, sizes.kv_heads, columns, sizes.head_dim)).astype(mx.bfloat16)
    rows = mx.array([[slot, columns * (slot + 1) // slots] for slot in range(slots)], mx.int32)
    sinks = mx.zeros((sizes.heads,), mx.bfloat16)
    mx.eval(queries, buffer, rows, sinks)

    def way(attention: Callable[..., mx.array]) -> Callable[[], None]:
        def run() -> None:
            out = queries
            for _ in range(_IN_A_ROW):
                out = attention(out, buffer, rows, 0.125, sinks)
            mx.eval(out)

        return run

    found = {False: way(attend_with_mask)}
    if _is_kernel_right():
        found[True] = way(attend_in_slots)
    return found


def _is_kernel_right() -> bool:
    """Whether the kernels for slots give what MLX's operations give: all sizes of heads and types, with sinks and without.

    One writes new keys and values, and the other one attends to them in the same graph. Each size and type is a program of
    its own, which the device's compiler may refuse. Requests: one that has gone round, one of a single token, and two that
    end within and at the end of what a threadgroup looks at together. The last rows are a second and a third token of two
    of them, and half of the programs have a window.
    """
    kv_heads, columns = 2, 75
    heads = kv_heads * 2 * MOST_HEADS
    rows = mx.array([[0, columns + 9], [1, 0], [2, 37], [3, 63], [1, 1], [1, 2], [3, 64]], mx.int32)
    for head_dim, dtype in itertools.product(HEAD_DIMS, (mx.bfloat16, mx.float16, mx.float32)):
        scale = 1.5 * head_dim**-0.5
        queries = mx.random.normal((7, heads, 1, head_dim)).astype(dtype)
        buffer = mx.random.normal((2, 4, kv_heads, columns, head_dim)).astype(dtype)
        # Bfloat16 is gpt-oss's type, which has sinks; OpenELM has none, and the rest of the text is the same.
        sinks = 2 * mx.random.normal((heads,)).astype(dtype) if dtype == mx.bfloat16 else None
        window = None if sinks is None else 40
        # As a part of the projection's heads, like a layer's.
        new = mx.random.normal((7, heads + 2 * kv_heads, 1, head_dim)).astype(dtype)[:, heads:].squeeze(2)
        expected = _written(buffer, new, rows)
        wide = (queries.astype(mx.float32), expected.astype(mx.float32))
        exact = attend_with_mask(*wide, rows, scale, None if sinks is None else sinks.astype(mx.float32), window)
        mx.eval(exact, buffer)
        try:
            found = attend_in_slots(queries, buffer, rows, scale, sinks, window, write_in_slots(buffer, new, rows))
            off = cast(float, mx.abs(found.astype(mx.float32) - exact).max().item())
        except (RuntimeError, ValueError):  # the device's compiler refuses it
            return False
        mx.synchronize()
        if not off <= _HALF or not mx.array_equal(buffer, expected):
            return False
    return True


def _written(buffer: mx.array, new: mx.array, rows: mx.array) -> mx.array:
    """A copy of the buffer (2, S, K, T, D) with new keys and values (M, 2 K, D) in it."""
    found = buffer + 0
    heads, columns = buffer.shape[2:4]
    for own, (slot, position) in zip(new, cast("list[list[int]]", rows.tolist()), strict=True):
        found[:, slot, :, position % columns] = own.reshape(2, heads, -1)
    mx.eval(found)
    return found


def _repeated(start: mx.array, step: Callable[[mx.array], mx.array]) -> Callable[[], None]:
    def run() -> None:
        out = start
        for _ in range(_IN_A_ROW):
            out = step(out)
        mx.eval(out)

    return run


_ALTERNATIVES: dict[str, Callable[[Sizes], dict[Any, Callable[[], None]]]] = {
    "rows_in_a_tile": _rows,
    "spare_places": _places,
    "compiled_step": _compiled,
    "fuse_residual_add": _sums,
    "bias_apart": _biases,
    "slot_kernel": _slot_kernel,
}
# Timed only for information, since models cannot switch yet: name -> (kernels, the one in use).
_TOLD: dict[str, tuple[Callable[[Sizes], dict[Any, Callable[[], None]]], Any]] = {"columns_in_a_tile": (_columns, 1)}
