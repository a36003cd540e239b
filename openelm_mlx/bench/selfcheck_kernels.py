"""Checks 4 to 7: single kernels in the forms in which models call them, against float64 or against themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.released import released_gpt_oss_config
from ..experts.writable import memory_of
from ..models.attention import attend, causal_mask, visible_keys
from ..models.precision import runs_on_cpu
from ..models.rope import rotary_periods, rotate
from ..specs import spec_from_config
from .selfcheck import CheckFailed, Clock

POSITIONS = (33, 512, 8192, 131_071)
NEAR = 1e-6
HALF, SINGLE = 2e-2, 1e-5


# --- 4: rotary embedding ----------------------------------------------------------------------------------------------


def check_rope(clock: Clock) -> str:
    """Sines and cosines of the kernel, for both families, against float64's of the same float32 angles."""
    yarn = spec_from_config(released_gpt_oss_config("20b")).yarn
    largest = dict.fromkeys(POSITIONS, 0.0)
    for theta, head_dim, stretched in ((150_000.0, 64, yarn), (10_000.0, 64, None)):
        periods = rotary_periods(head_dim, theta, stretched)
        if periods is None:
            half = head_dim // 2
            periods = mx.array([theta ** (i / half) for i in range(half)], mx.float32)
        inverse = np.float32(1) / np.array(periods)
        x = mx.concatenate([mx.ones((1, 1, 1, head_dim // 2)), mx.zeros((1, 1, 1, head_dim // 2))], axis=-1)
        for position in POSITIONS:
            found = np.array(rotate(x, theta, position, periods), np.float64).reshape(-1)
            angles = (np.float32(position) * inverse).astype(np.float64)
            off = np.abs(found - np.concatenate([np.cos(angles), np.sin(angles)])).max()
            largest[position] = max(largest[position], float(off))
    seen = ", ".join(f"{each:.1e} at {position:,}" for position, each in largest.items())
    if not largest[POSITIONS[0]] <= NEAR:
        raise CheckFailed(f"off float64 by {seen}")
    return f"off float64 by {seen}"


# --- 5: attention -----------------------------------------------------------------------------------------------------


def check_attention(clock: Clock) -> str:
    """Every form that models use, with gpt-oss's heads, a few of which are compared with float64."""
    heads, kv_heads, long = (16, 2, 300) if runs_on_cpu() else (64, 8, 2048)
    seen, window = [], 128
    forms: list[tuple[str, int, int, Any, bool]] = []  # name, queries, keys, window, sinks
    for queries in (1, 4, 5, 8, 9, long):
        forms.append((f"{queries:,} queries", queries, queries + 256, None, True))
    forms += [
        ("1 query of a ring", 1, window, window, True), ("9 queries of a ring", 9, 9 + window - 1, window, True),
        (f"{long:,} queries in blocks of {window} x {2 * window}", long, long, window, True),
        ("9 queries without sinks", 9, 265, None, False),
    ]  # fmt: skip
    for dtype, most in ((mx.bfloat16, HALF), (mx.float32, SINGLE)):
        largest, worst = 0.0, ""
        for name, queries, keys, width, has_sinks in forms:
            if not clock.has(2):
                seen.append("no time for the rest")
                break
            off = _attention_error(queries, keys, width, has_sinks, heads, kv_heads, dtype)
            if not off <= most:
                raise CheckFailed(f"{name} in {_name(dtype)}: off float64 by {off:.1e} (at most {most:g})")
            if off >= largest:
                largest, worst = off, name
        seen.append(f"{_name(dtype)} {largest:.1e} ({worst}; at most {most:g})")
    return f"largest difference of {len(forms)} forms: " + "; ".join(seen)


def _attention_error(
    L: int, T: int, window: int | None, has_sinks: bool, heads: int, kv_heads: int, dtype: mx.Dtype
) -> float:
    """By how much MLX's result is off float64's in the first, a middle and the last head."""
    key = mx.random.key(1000 * L + T)
    parts = [
        mx.random.normal((1, each, length, 64), key=part).astype(dtype)
        for each, length, part in zip((heads, kv_heads, kv_heads), (L, T, T), mx.random.split(key, 3), strict=True)
    ]
    sinks = mx.random.normal((heads,), key=key).astype(dtype) if has_sinks else None
    q, k, v = parts
    out = np.array(attend(q, k, v, causal_mask(L, T - L, window), 0.125, sinks).astype(mx.float32), np.float64)
    visible = np.array(visible_keys(mx.arange(T - L, T), mx.arange(T), window))
    queries, keys, values = (np.array(each.astype(mx.float32), np.float64) for each in parts)
    sink = None if sinks is None else np.array(sinks.astype(mx.float32), np.float64)
    largest = 0.0
    for head in (0, heads // 2, heads - 1):
        own = head * kv_heads // heads
        scores = np.where(visible, 0.125 * queries[0, head] @ keys[0, own].T, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        top = top if sink is None else np.maximum(top, sink[head])
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + (0 if sink is None else np.exp(sink[head] - top))
        largest = max(largest, float(np.abs(out[0, head] - weights / total @ values[0, own]).max()))
    return largest


# --- 6: products with experts -----------------------------------------------------------------------------------------


def check_expert_products(clock: Clock) -> str:
    """MXFP4 products of gpt-oss's shapes: one row and sorted tiles, each bit for bit the same beside other rows."""
    columns = 288 if runs_on_cpu() else 2880
    seen = []
    for rows in (columns, 2 * columns):
        product, dequantized = _experts(rows, columns)
        # Rows of one kernel: a few alone, the same among strangers; many sorted, the same among other ones.
        for name, few, is_sorted in (("row by row", 4, False), ("sorted tiles", 64, True)):
            key = mx.random.split(mx.random.key(rows + few), 3)
            own, one, other = (mx.random.normal((few, 1, columns), key=each).astype(mx.bfloat16) for each in key)
            chosen = mx.sort(mx.random.randint(0, 4, (few,), key=key[0])).astype(mx.uint32)
            results = []
            for strangers in (one, other):
                x, experts = mx.concatenate([own, strangers]), mx.concatenate([chosen, chosen])
                order = mx.argsort(experts) if is_sorted else mx.arange(2 * few)
                y = product(x[order], experts[order], is_sorted)
                results.append(y[mx.argsort(order)][:few])
            if not mx.array_equal(results[0], results[1]):
                off = mx.abs(results[0].astype(mx.float32) - results[1].astype(mx.float32)).max().item()
                raise CheckFailed(
                    f"{rows:,} x {columns:,}, {name}: a row's result changes by {off:.1e} with the other rows"
                )
            exact = np.einsum("nk,nrk->nr", _wide(own[:, 0]), dequantized[np.array(chosen)])
            off = float(np.abs(_wide(results[0][:, 0]) - exact).max())
            if not off <= 2 * HALF * max(1.0, float(np.abs(exact).max())):
                raise CheckFailed(f"{rows:,} x {columns:,}, {name}: off float64 by {off:.1e}")
            seen.append(f"{rows:,} x {columns:,} {name} {off:.1e}")
    return "equal bits; off float64 by " + ", ".join(seen)


def _experts(rows: int, columns: int) -> tuple[Callable[[mx.array, mx.array, bool], mx.array], np.ndarray]:
    weight = mx.random.normal((4, rows, columns), key=mx.random.key(rows)) * columns**-0.5
    packed, scales, *_ = mx.quantize(weight, 32, 4, mode="mxfp4")
    plain = mx.dequantize(packed, scales, None, 32, 4, mode="mxfp4")

    def product(x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        wide = x.astype(mx.float32) if runs_on_cpu() else x  # as models do (`widen`)
        return mx.gather_qmm(
            wide, packed, scales, None, rhs_indices=experts, transpose=True, group_size=32, bits=4, mode="mxfp4",
            sorted_indices=is_sorted,
        ).astype(mx.bfloat16)  # fmt: skip

    return product, _wide(plain)


# --- 7: views ---------------------------------------------------------------------------------------------------------


def check_views(clock: Clock, rounds: int = 1000) -> str:
    """What is written through a NumPy view is what the next kernel reads, while another stream keeps the device busy."""
    bank = mx.zeros((8, 1024), mx.uint32)
    mx.eval(bank)
    view = memory_of(bank)
    if view is None:
        raise CheckFailed("NumPy gives a copy of an array's memory: writes would be lost")
    other = mx.new_stream(mx.default_device())
    size = 64 if runs_on_cpu() else 1024
    busy = mx.random.normal((size, size))
    mx.eval(busy)
    done = 0
    for number in range(rounds):
        if number % 8 == 0:
            with mx.stream(other):
                busy = mx.tanh(busy @ busy)
                mx.async_eval(busy)
        place = number % 8
        view[place] = np.arange(number, number + 1024, dtype=np.uint32)
        found, expected = mx.sum(bank[place]).item(), 1024 * number + 1023 * 512
        if found != expected:
            raise CheckFailed(
                f"round {number}: a kernel summed {found} where {expected} had been written through a view"
            )
        done = number + 1
        if not clock.has(1):
            break
    mx.synchronize(other)
    return f"{done:,} rounds without a difference, with a second stream busy"


def _wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
