"""A feed-forward layer of many experts, of which a router chooses a few for each token.

`MoE` routes and sums; the experts themselves are an object with one method, `(x, expert_indices) -> outputs`, so that
`Experts`, which has them all in memory, can be replaced by one that has only some of them there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from mlx import nn

from ..specs import LayerSpec, ModelSpec
from .expert_kernel import MOST_PLACES, Activation, PackedMatrix, product
from .groups import Groups, make_groups
from .precision import linear, one_kernel, runs_on_cpu, widen
from .routing_ways import (
    BY_SORTING,
    KERNEL,
    MOST_ROUTES_OF_A_TABLE,
    SORT_FROM_ROUTES,
    SORTED,
    UNSORTED,
    ExpertWays,
    takes_kernel,
    uses_tiles,
    way_for,
)


class Routes(NamedTuple):
    """Where rows go that are multiplied by a matrix of their own expert.

    experts (..., n): which expert each goes through. slots (..., n): where that one's weights lie; None: at its own number.
    rows (..., n): which row of the whole pass each one is; None: they are in their order. is_sorted: slots do not decrease.
    """

    experts: mx.array
    slots: mx.array | None = None
    rows: mx.array | None = None
    is_sorted: bool = False

    @property
    def places(self) -> mx.array:
        """Where each one's weights lie."""
        return self.experts if self.slots is None else self.slots


class RoutedExperts(Protocol):
    """What `MoE` asks of the experts it is given."""

    def __call__(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        """x (B, L, hidden_size), expert_indices (B, L, k) -> each chosen expert's output (B, L, k, hidden_size)."""


class MoE(nn.Module):
    """sum_e w_e * expert_e(x) over the k experts with the largest router logits, w being the softmax of those k.

    `experts` may be set to any `RoutedExperts`; one that is not a module takes its weights out of the parameter tree.
    """

    experts: RoutedExperts

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        bias_apart: bool = False,
        expert_ways: ExpertWays = BY_SORTING,
        kernel_rows: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.experts_per_token = layer.experts_per_token
        self.bias_apart = bias_apart
        self.router = nn.Linear(spec.hidden_size, layer.num_experts)
        self.experts = Experts(spec, layer, expert_ways, kernel_rows)

    def __call__(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        """x (B, L, hidden_size) in float32 -> the layer's output; the experts compute in `dtype`.

        The output is float32; on the CPU for up to 128 tokens, and `dtype` for more, whose outputs would be there twice.
        """
        expert_indices, expert_weights = self.route(x)
        return weighted_sum(self.experts(x.astype(dtype), expert_indices), expert_weights, dtype)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The k chosen experts of each token and their weights, both (B, L, k), in no particular order.

        In float32 throughout: a near-tie that rounding decides sends the token to another expert, and nothing that bf16
        does elsewhere moves the logits as much.
        """
        logits = linear(self["router"], x, self.bias_apart)
        k = self.experts_per_token
        expert_indices = mx.argpartition(logits, kth=-k, axis=-1)[..., -k:]
        # Which experts are chosen has no derivative, and MLX raises an error where one is asked for; how much they weigh has
        # one. A single token in evaluation mode is a step of decoding, which is spared the operation.
        if self.training or x.size != x.shape[-1]:
            expert_indices = mx.stop_gradient(expert_indices)
        chosen = mx.take_along_axis(logits, expert_indices, axis=-1)
        return expert_indices, mx.softmax(chosen, axis=-1, precise=True)


def weighted_sum(outputs: mx.array, expert_weights: mx.array, dtype: mx.Dtype) -> mx.array:
    """What a layer makes of its experts' outputs (B, L, k, hidden_size) and their weights (B, L, k): (B, L, hidden_size).

    Or (B, hidden_size), one token a row. See `MoE.__call__` for the type.
    """
    if not runs_on_cpu():  # one kernel, which keeps nothing in float32 but its result
        k = expert_weights.shape[-1]
        weights = expert_weights[..., None, :]
        return _sum_of_products(*(outputs[..., i, :] for i in range(k)), *(weights[..., i] for i in range(k)))
    # As far as rows of other requests may be beside a row: it is to have the sum that it has alone.
    sum_dtype = mx.float32 if expert_weights.size <= MOST_ROUTES_OF_A_TABLE else dtype
    expert_weights, outputs = expert_weights.astype(sum_dtype), outputs.astype(sum_dtype)
    if expert_weights.ndim == 2 and expert_weights.shape[0] == 1:  # (1, k) @ (k, hidden_size), in the fewest steps
        return expert_weights @ outputs.reshape(-1, outputs.shape[-1])
    # (B, L, 1, k) @ (B, L, k, hidden_size): the sum is rounded once, where k products and a sum round k times more.
    return (expert_weights[..., None, :] @ outputs).squeeze(-2)


@one_kernel
def _sum_of_products(*outputs_and_weights: mx.array) -> mx.array:
    """In float32: k outputs (..., hidden_size), then their k weights (..., 1)."""
    k = len(outputs_and_weights) // 2
    total = outputs_and_weights[0].astype(mx.float32) * outputs_and_weights[k]
    for i in range(1, k):
        total = total + outputs_and_weights[i].astype(mx.float32) * outputs_and_weights[k + i]
    return total


class Experts(nn.Module):
    """All experts of one layer, in memory: down(swiglu(gate_up(x))), a bias after each.

    The rows of `gate_up_proj` alternate: gate 0, up 0, gate 1, up 1, ... as in OpenAI's files. `down_proj` may have
    more rows than hidden_size (whole tiles are several times faster on some GPUs); those beyond are ignored.

    ways: which way so many rows go (`KernelChoices.expert_ways`). kernel_rows: how many go by our own kernel, where it can be
    had (`KernelChoices.expert_kernel_rows`). outputs_float32: whether outputs are not rounded to the type of the inputs,
    since those of other machines are added to them.
    """

    outputs_float32 = False

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, ways: ExpertWays = BY_SORTING, kernel_rows: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.num_experts = layer.num_experts
        self.swiglu_limit, self.swiglu_alpha = spec.swiglu_limit, spec.swiglu_alpha
        self.gate_up_proj = ExpertLinear(layer.num_experts, spec.hidden_size, 2 * layer.intermediate_size)
        self.down_proj = ExpertLinear(layer.num_experts, layer.intermediate_size, spec.hidden_size)
        self.ways, self.kernel_rows = ways, kernel_rows
        self._bias_table: tuple[mx.array, mx.array, mx.array] | None = None

    def __call__(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        way = self.way_for(expert_indices.shape)
        if way == KERNEL:
            return self.by_kernel(x, expert_indices)
        if way == UNSORTED:
            return self.feed_forward(x[..., None, :], Routes(expert_indices))
        if way == SORTED:
            inputs, routes, inverse = sort_routes(x, expert_indices)
            tiles = uses_tiles(routes.experts.size, self.num_experts)
            outputs = self.feed_forward(inputs, routes._replace(is_sorted=tiles))
            return outputs[inverse].reshape(*expert_indices.shape, -1)
        groups = make_groups(expert_indices, way, self.num_experts)
        return self.of_groups(x.reshape(-1, x.shape[-1]), groups).reshape(*expert_indices.shape, -1)

    def way_for(self, shape: Sequence[int]) -> str:
        """The way of experts that were chosen in this shape, (..., k): one of `routing_ways.WAYS`, or `KERNEL`."""
        k = shape[-1]
        num_rows = math.prod(shape) // k
        if takes_kernel(num_rows, k, self.kernel_rows) and self._suits_kernel:
            return KERNEL
        return way_for(num_rows, k, self.num_experts, self.ways)

    @property
    def _suits_kernel(self) -> bool:
        """Whether the kernel computes these matrices. It has no derivative."""
        matrices = self.gate_up_proj, self.down_proj
        return not (self.training or self.outputs_float32) and all(
            type(each) is QuantizedExpertLinear and each.mode == "mxfp4" and each.weight.shape[0] <= MOST_PLACES
            for each in matrices
        )

    def by_kernel(self, x: mx.array, expert_indices: mx.array, slots: mx.array | None = None) -> mx.array:
        """As `__call__`, by our own kernel. slots, like `expert_indices`: where weights lie; None: at their own number."""
        shape, k = expert_indices.shape, expert_indices.shape[-1]
        experts = expert_indices.reshape(-1, k)
        places = experts if slots is None else slots.reshape(-1, k)
        activation = Activation(self.swiglu_limit, self.swiglu_alpha)
        gate_up, down = (PackedMatrix(m.weight, m.scales, m.bias) for m in (self.gate_up_proj, self.down_proj))
        hidden = product(x.reshape(-1, x.shape[-1]), gate_up, places, experts, activation)
        return product(hidden, down, places, experts).reshape(*shape, -1)

    def feed_forward(self, x: mx.array, routes: Routes) -> mx.array:
        """Each row through its expert: x (..., n or 1, hidden_size) -> (..., n, hidden_size).

        Biases lie at each expert's own number, wherever its weights are.
        """
        gate_up_bias, down_bias = self._biases(routes.experts)
        gate_up = self.gate_up_proj(x, routes)
        hidden = clamped_swiglu(
            gate_up[..., ::2], gate_up[..., 1::2], gate_up_bias[..., ::2], gate_up_bias[..., 1::2],
            self.swiglu_limit, self.swiglu_alpha,
        )  # fmt: skip
        return self.down_proj(self._before_down(hidden), routes) + down_bias

    def of_groups(self, rows: mx.array, groups: Groups) -> mx.array:
        """`feed_forward` of routes that stand in groups. rows (N, hidden_size) -> each route's output (R, hidden_size)."""
        gate_up_bias, down_bias = (each[:, None] for each in self._biases(groups.experts))
        gate_up = self.gate_up_proj.of_groups(rows[groups.rows], groups)
        hidden = clamped_swiglu(
            gate_up[..., ::2], gate_up[..., 1::2], gate_up_bias[..., ::2], gate_up_bias[..., 1::2],
            self.swiglu_limit, self.swiglu_alpha,
        )  # fmt: skip
        outputs = self.down_proj.of_groups(self._before_down(hidden), groups) + down_bias
        return outputs.reshape(-1, outputs.shape[-1])[groups.places]

    def _before_down(self, hidden: mx.array) -> mx.array:
        """The input of the last product, whose type the outputs have."""
        return hidden.astype(mx.float32) if self.outputs_float32 else hidden

    def _biases(self, experts: mx.array) -> tuple[mx.array, mx.array]:
        """The biases of gate_up and down for each of `experts` (..., n): (..., n, rows), twice.

        A few are looked up together, in one kernel; of many that would be memory for nothing.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.training or experts.size >= SORT_FROM_ROUTES or not self.has_one_bias_type:
            return gate_up.bias[experts], down.bias[experts]
        both, rows = self.bias_table()[experts], gate_up.bias.shape[-1]
        return both[..., :rows], both[..., rows:]

    @property
    def has_one_bias_type(self) -> bool:
        """Whether the biases of gate_up and down can lie in one table as they are."""
        return bool(self.gate_up_proj.bias.dtype == self.down_proj.bias.dtype)

    def bias_table(self) -> mx.array:
        """The biases of gate_up and down side by side, (E, rows of both); made again when one is replaced."""
        gate_up, down, made = self.gate_up_proj, self.down_proj, self._bias_table
        if made is None or made[0] is not gate_up.bias or made[1] is not down.bias:
            table = mx.concatenate([gate_up.bias, down.bias], axis=-1)
            # Views of the table, so that nothing is in memory twice.
            gate_up.bias, down.bias = mx.split(table, [gate_up.bias.shape[-1]], axis=-1)
            self._bias_table = made = gate_up.bias, down.bias, table
        return made[2]


class ExpertLinear(nn.Module):
    """One matrix an expert, (E, rows, columns), and one bias an expert, which the caller adds."""

    def __init__(self, num_experts: int, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, rows, columns))
        self.bias = mx.zeros((num_experts, rows))

    def __call__(self, x: mx.array, routes: Routes) -> mx.array:
        """Each row by its expert's matrix, without the bias. x (..., n or 1, columns) -> (..., n, rows of the bias)."""
        slots = routes.places
        y = mx.gather_mm(
            widen(x[..., None, :]),
            widen(self.weight).swapaxes(-1, -2),
            lhs_indices=None if routes.is_sorted else numbers(x.shape[:-1], slots.shape),
            rhs_indices=slots,
            sorted_indices=routes.is_sorted,
        )
        return y.squeeze(-2)[..., : self.bias.shape[-1]].astype(x.dtype)

    def of_groups(self, x: mx.array, groups: Groups) -> mx.array:
        """Each group by its expert's matrix, without the bias. x (G, M, columns) -> (G, M, rows of the bias)."""
        slots = groups.slots
        weight = widen(self.weight).swapaxes(-1, -2)
        if slots is None:
            y = widen(x) @ weight
        else:
            y = mx.gather_mm(widen(x), weight, lhs_indices=numbers(slots.shape, slots.shape), rhs_indices=slots)
        return y[..., : self.bias.shape[-1]].astype(x.dtype)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: Any
    ) -> QuantizedExpertLinear:
        """The same packed by `mx.quantize`; what `nn.quantize` calls."""
        weight, scales, *biases = mx.quantize(self.weight, group_size, bits, mode=mode)
        return QuantizedExpertLinear(weight, scales, biases[0] if biases else None, self.bias, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """`ExpertLinear` with packed weights: MXFP4 as OpenAI ships it, or any other of MLX's formats.

    weight (E, rows, columns * bits / 32) uint32; scales (E, rows, columns / group_size), uint8 for MXFP4; biases, which
    are the affine format's and not the layer's, like scales.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        bias: mx.array,
        group_size: int | None,
        bits: int | None,
        mode: str,
    ) -> None:
        super().__init__()
        self.weight, self.scales, self.bias = weight, scales, bias
        if biases is not None:
            self.biases = biases
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze(keys=["weight", "scales", "biases"])

    def __call__(self, x: mx.array, routes: Routes) -> mx.array:
        """As `ExpertLinear`'s."""
        slots = routes.places
        y = mx.gather_qmm(
            widen(x[..., None, :]),
            self.weight,
            self.scales,
            self.get("biases"),
            lhs_indices=None if routes.is_sorted else numbers(x.shape[:-1], slots.shape),
            rhs_indices=slots,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=routes.is_sorted,
        )
        return y.squeeze(-2)[..., : self.bias.shape[-1]].astype(x.dtype)

    def of_groups(self, x: mx.array, groups: Groups) -> mx.array:
        """As `ExpertLinear`'s."""
        slots = groups.slots
        weights = self.weight, self.scales, self.get("biases")
        packing: dict[str, Any] = {
            "transpose": True,
            "group_size": self.group_size,
            "bits": self.bits,
            "mode": self.mode,
        }
        if slots is None:
            y = mx.quantized_matmul(widen(x), *weights, **packing)
        else:
            own = numbers(slots.shape, slots.shape)
            y = mx.gather_qmm(widen(x), *weights, lhs_indices=own, rhs_indices=slots, **packing)
        return y[..., : self.bias.shape[-1]].astype(x.dtype)


def expert_product(x: mx.array, matrices: mx.array, which: mx.array, is_sorted: bool = False) -> mx.array:
    """Each row by its own matrix. x (..., n or 1, k), matrices (N, k, m), which (..., n) -> (..., n, m)."""
    y = mx.gather_mm(
        x[..., None, :],
        matrices,
        lhs_indices=None if is_sorted else numbers(x.shape[:-1], which.shape),
        rhs_indices=which,
        sorted_indices=is_sorted,
    )
    return y.squeeze(-2)


def group_product(x: mx.array, matrices: mx.array, which: mx.array) -> mx.array:
    """The same with one matrix for all rows of a group. x (G, M, k), which (G,) -> (G, M, m)."""
    return mx.gather_mm(x, matrices, lhs_indices=numbers(which.shape, which.shape), rhs_indices=which)


def numbers(shape: tuple[int, ...], broadcast_to: tuple[int, ...]) -> mx.array:
    """0, 1, 2, ... in `shape`, broadcast: which row goes to which product, when each goes to its own.

    MLX makes the same by itself, with three kernels in every layer of every step. It takes rows for sorted ones only
    when it is not told, though.
    """
    make = _few_numbers if math.prod(broadcast_to) < SORT_FROM_ROUTES else _new_numbers
    return make(shape, broadcast_to)


def _new_numbers(shape: tuple[int, ...], broadcast_to: tuple[int, ...]) -> mx.array:
    each = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    return mx.array(np.ascontiguousarray(np.broadcast_to(each, broadcast_to)))  # from the host: there is nothing to run


_few_numbers = lru_cache(maxsize=64)(_new_numbers)


def sort_routes(x: mx.array, expert_indices: mx.array) -> tuple[mx.array, Routes, mx.array]:
    """All (token, expert) routes in the order of their experts. x (B, L, hidden_size), expert_indices (B, L, k).

    Gives each route's input (R, hidden_size), the routes, and (R,) where each route of the original order went,
    R = B * L * k: `outputs[inverse]` brings results back into the order of `expert_indices`.
    """
    experts = expert_indices.flatten()
    order = mx.argsort(experts)
    rows = order // expert_indices.shape[-1]
    return x.reshape(-1, x.shape[-1])[rows], Routes(experts[order], None, rows), mx.argsort(order)


@one_kernel
def clamped_swiglu(
    gate: mx.array, up: mx.array, gate_bias: mx.array, up_bias: mx.array, limit: float, alpha: float
) -> mx.array:
    """gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within +-limit; biases are added before.

    All of one shape. Computed in float32 and rounded once (gpt_oss/torch/model.py, swiglu).
    """
    dtype = gate.dtype
    gate = mx.minimum(gate.astype(mx.float32) + gate_bias.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32) + up_bias.astype(mx.float32), -limit, limit)
    return (gate * mx.sigmoid(alpha * gate) * (up + 1.0)).astype(dtype)
