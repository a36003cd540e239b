"""One layer's experts with random numbers, and rows for them: to time the ways through them (models/routing_ways.py)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..checkpoint.released import released_gpt_oss_config
from ..models.moe import Experts, QuantizedExpertLinear, weighted_sum
from ..models.precision import runs_on_cpu
from ..models.routing_ways import KERNEL, MOST_ROUTES_OF_A_TABLE, UNSORTED
from ..specs import LayerSpec, ModelSpec, spec_from_config

W = TypeVar("W", bound="str | int | bool")  # the name of a way

# All for which there is a choice.
ROWS_OF_THE_KERNEL = (1, MOST_ROUTES_OF_A_TABLE)
# How far apart two ways may be, in half precision, of the largest number.
NEAR = 2e-2
# 2^-7 (E8M0): times a number of E2M1, whose root mean square is 2.9, that is near 2,880^-0.5.
_SCALE = 127 - 7


@dataclass(frozen=True)
class LayerShape:
    """What of a layer counts here. `of` gives the released models' ones."""

    hidden_size: int
    inner: int
    num_experts: int
    experts_per_token: int = 4

    @staticmethod
    def of(size: str) -> LayerShape:
        """The shape of "20b" or "120b"."""
        spec = spec_from_config(released_gpt_oss_config(size))
        layer = spec.layers[0]
        return LayerShape(spec.hidden_size, layer.intermediate_size, layer.num_experts, layer.experts_per_token)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in MXFP4, without its biases: 4 bits a number and 8 for each 32 of them."""
        return 3 * self.inner * self.hidden_size * 17 // 32

    @property
    def layer_bytes(self) -> int:
        """Bytes of all experts."""
        return self.num_experts * self.expert_bytes

    def a_quarter(self) -> LayerShape:
        """A quarter of the experts, of which each row takes a quarter: as many routes for each of them as before."""
        return replace(
            self, num_experts=max(1, self.num_experts // 4), experts_per_token=max(1, self.experts_per_token // 4)
        )

    def specs(self) -> tuple[ModelSpec, LayerSpec]:
        """The released model's, with this shape."""
        spec = spec_from_config(released_gpt_oss_config("20b"))
        layer = replace(
            spec.layers[0], num_experts=self.num_experts, experts_per_token=self.experts_per_token,
            intermediate_size=self.inner,
        )  # fmt: skip
        return replace(spec, hidden_size=self.hidden_size, layers=(layer,)), layer


def random_experts(shape: LayerShape, rows_in_a_tile: int) -> Experts:
    """The layer's experts in MXFP4 with biases in bfloat16. Bits are drawn for one and changed for the others: nothing is
    packed, and little more is in memory for a moment than the experts themselves.
    """
    experts, key = Experts(*shape.specs()), mx.random.key(0)
    differing = mx.random.randint(0, 2**31 - 1, (shape.num_experts, 1, 1), mx.int32, key=key).view(mx.uint32)
    for name in ("gate_up_proj", "down_proj"):
        rows, columns = experts[name].weight.shape[1:]
        padded = rows + -rows % rows_in_a_tile if name == "down_proj" else rows
        key, one, other = mx.random.split(key, 3)
        drawn = mx.random.randint(-(2**31), 2**31 - 1, (1, padded, columns // 8), mx.int32, key=one).view(mx.uint32)
        scales = mx.full((shape.num_experts, padded, columns // 32), _SCALE, mx.uint8)
        bias = (0.1 * mx.random.normal((shape.num_experts, rows), key=other)).astype(mx.bfloat16)
        experts[name] = QuantizedExpertLinear(drawn ^ differing, scales, None, bias, 32, 4, "mxfp4")
    experts.eval()
    mx.eval(experts.parameters(), experts.bias_table())
    return experts


@dataclass(frozen=True)
class Rows:
    """Rows in bfloat16 (N, hidden_size), and for each pass the experts (N, k) that they choose and their weights."""

    x: mx.array
    chosen: Sequence[mx.array]
    weights: mx.array


def random_rows(shape: LayerShape, num_rows: int, passes: int) -> Rows:
    """Rows that choose each expert alike often; the same ones for the same shapes."""
    random = np.random.default_rng(num_rows)
    k = shape.experts_per_token
    chosen = [
        mx.array(np.array([random.permutation(shape.num_experts)[:k] for _ in range(num_rows)], np.uint32))
        for _ in range(passes)
    ]
    x = mx.random.normal((num_rows, shape.hidden_size), key=mx.random.key(num_rows)).astype(mx.bfloat16)
    found = Rows(x, chosen, mx.full((num_rows, k), 1 / k, mx.float32))
    mx.eval(found.x, found.chosen, found.weights)
    return found


def by_way(experts: Experts, shape: LayerShape, way: str, num_rows: int) -> bool:
    """Have `experts` go this way. Whether so many rows do: a way that does not suit the layer is passed over."""
    is_kernel = way == KERNEL and not runs_on_cpu()
    experts.kernel_rows = ROWS_OF_THE_KERNEL if is_kernel else (0, 0)
    experts.ways = ((1, UNSORTED if way == KERNEL else way),)
    return experts.way_for((num_rows, shape.experts_per_token)) == way


def outputs_of(experts: Experts, rows: Rows, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """What the first pass gives in this type, (N, hidden_size), in float32."""
    return weighted_sum(experts(rows.x.astype(dtype), rows.chosen[0]), rows.weights, dtype).astype(mx.float32)


def passes_of(experts: Experts, rows: Rows) -> Callable[[], None]:
    """A call that computes every pass, one after the other: each takes what the one before it gave. The way is that which
    `experts` go now.
    """
    ways, kernel_rows = experts.ways, experts.kernel_rows

    def chain(x: mx.array, chosen: list[mx.array], weights: mx.array) -> mx.array:
        experts.ways, experts.kernel_rows = ways, kernel_rows  # it is traced later, when they may go another one
        for each in chosen:
            y = weighted_sum(experts(x, each), weights, mx.bfloat16)
            x = x + 0.01 * y.astype(mx.bfloat16)
        return x

    compiled: Any = chain if runs_on_cpu() else mx.compile(chain)
    return lambda: mx.eval(compiled(rows.x, list(rows.chosen), rows.weights))


def in_turns(ways: Mapping[W, Callable[[], None]], rounds: int) -> dict[W, float]:
    """Seconds of each call, medians; the first round compiles and does not count."""
    times: dict[W, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in sorted(ways, reverse=bool(number % 2)):
            mx.synchronize()
            started = time.perf_counter()
            ways[way]()
            if number:
                times[way].append(time.perf_counter() - started)
    return {way: statistics.median(each) for way, each in times.items()}


def distance(found: mx.array, known: mx.array) -> float:
    """The largest difference, in parts of the largest number; infinite where a number is none."""
    off = np.abs(np.array(found) - np.array(known)).max() / np.abs(np.array(known)).max()
    return float(off) if np.isfinite(off) else math.inf
