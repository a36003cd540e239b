"""A model that several machines share: where their parts of a layer are added up. What adds them is handed in.

Each machine runs the same walk of the layers over its own share, and the residual stream is the same on all of them. A sum
and the products in it are float32, whatever type the layers compute in, and what comes out is
rounded once. MLX's products have the type of their inputs: a packed matrix is given its input in
float32, and another one is kept so (parallel/shares.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

import mlx.core as mx
from mlx import nn

from ..errors import UserError
from .groups import make_groups
from .moe import Experts, MoE, Routes, sort_routes, weighted_sum
from .routing_ways import GROUPED, SORTED, UNSORTED, uses_tiles

if TYPE_CHECKING:
    from . import Model
    from .gpt_oss import GptOss
    from .openelm import OpenELM

# The sum over all machines of an array that each of them has, of the same shape everywhere. Lazy.
Total = Callable[[mx.array], mx.array]


class MachineGroup(Protocol):
    """The machines that share a model, as its requests see them; parallel/group.py is the one that there is.

    All of them run the same program. rank: this machine's number, from 0 on. size: how many they are. is_computing: whether
    sums are being made, so that nothing else may be sent. since: when this machine began to wait for the others; None while
    it does not.
    """

    rank: int
    size: int
    is_computing: bool
    since: float | None

    def first(self, x: mx.array) -> mx.array:
        """The first machine's x, of an integer type, on every machine. Lazy."""

    def exchange(self, value: Any = None) -> list[Any]:
        """What each machine gave here, in their order; all of them have to come here. value: JSON."""

    def least(self, call: Callable[[], int]) -> int:
        """The smallest of what `call` gives on the machines. Raises what it raises on one of them."""

    def agreeing_on_errors(self) -> AbstractContextManager[None]:
        """A block that ends on all machines with an error where it does on one of them. No sums are made within it."""

    def agreed(self, value: Mapping[str, Any], advice: Mapping[str, str]) -> None:
        """Raise SettingError where a machine has another value than the first. advice: for each key, what to do."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error of MLX's says that another machine is gone."""

    def lost(self, error: BaseException) -> UserError:
        """The error for a person."""


class SharedLinear(nn.Module):
    """A linear layer of whose columns, and of whose input, each machine has some: the products are added up.

    base: the machine's own, packed or in float32. Its bias, which is the whole layer's, is added
    after the sum, on every machine.
    """

    def __init__(self, base: nn.Module, total: Total) -> None:
        super().__init__()
        if "bias" in base:
            self.bias = base.pop("bias")
        self.base = base
        self._total = total

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., the machine's columns) -> (..., rows), the same on all machines."""
        y = self._total(self["base"](x.astype(mx.float32)))
        if "bias" in self:
            y = y + self["bias"].astype(mx.float32)
        return y.astype(x.dtype)


class SharedMoE(nn.Module):
    """A `MoE` each of whose experts has some of its columns here: their weighted sums are added up, in float32."""

    def __init__(self, own: MoE, total: Total) -> None:
        super().__init__()
        self.own = own
        self._total = total

    @property
    def experts(self) -> Any:
        """The machine's share of all experts."""
        return self.own.experts

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """As `MoE.route`: the router is the same on all machines."""
        return self.own.route(x)

    def __call__(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        """As `MoE`'s, always float32."""
        own: MoE = self["own"]
        expert_indices, expert_weights = own.route(x)
        outputs = own.experts(x.astype(dtype), expert_indices)
        return self._total(weighted_sum(outputs, expert_weights, mx.float32).astype(mx.float32))


class SharedExperts(nn.Module):
    """`RoutedExperts` of which experts start ... stop - 1 are here: bit for bit what `Experts` compute that has all.

    experts: those of this machine, with the biases and the number of all. Each chosen expert's row is computed where that
    one is, by the kernel that would compute it alone; zeros stand for it elsewhere, so that adding up is exact.
    """

    def __init__(self, experts: Experts, start: int, stop: int, total: Total) -> None:
        super().__init__()
        self.experts = experts
        self._start, self._stop, self._total = start, stop, total

    def __call__(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        outputs = self._own(x, expert_indices)
        # x + 0 is x in every type: no float32 is needed here, and half of it may go over the wire.
        return self._total(mx.where(self._is_here(expert_indices)[..., None], outputs, mx.zeros_like(outputs)))

    def _is_here(self, experts: mx.array) -> mx.array:
        return (experts >= self._start) & (experts < self._stop)

    def _slots(self, experts: mx.array) -> mx.array:
        """Where experts' weights lie; the first or the last place for those of other machines, so that sorted stays sorted."""
        return mx.clip(experts.astype(mx.int32), self._start, self._stop - 1) - self._start

    def _own(self, x: mx.array, expert_indices: mx.array) -> mx.array:
        """The outputs (..., k, hidden_size), right for the experts that are here; with the ways and tiles of all experts."""
        experts: Experts = self["experts"]
        way = experts.way_for(expert_indices.shape)
        if way == UNSORTED:
            here = self._is_here(expert_indices)
            own = mx.where(here, self._slots(expert_indices), 0)
            # A token's routes to others read no other weights than its own routes do.
            slots = mx.where(here, own, mx.max(own, axis=-1, keepdims=True))
            return experts.feed_forward(x[..., None, :], Routes(expert_indices, slots))
        if way == SORTED:
            inputs, routes, inverse = sort_routes(x, expert_indices)
            tiles = uses_tiles(routes.experts.size, experts.num_experts)
            slots = self._slots(routes.experts)
            outputs = experts.feed_forward(inputs, routes._replace(slots=slots, is_sorted=tiles))
            return outputs[inverse].reshape(*expert_indices.shape, -1)
        groups = make_groups(expert_indices, way, experts.num_experts)
        if way == GROUPED:  # a group is an expert: those that are here, in their order
            first, each = self._start, groups.rows.shape[1]
            places = mx.clip(groups.places - first * each, 0, (self._stop - first) * each - 1)
            rows, numbers = (each[first : self._stop] for each in (groups.rows, groups.experts))
            groups = groups._replace(rows=rows, experts=numbers, places=places)
        else:
            groups = groups._replace(slots=self._slots(groups.experts))
        return experts.of_groups(x.reshape(-1, x.shape[-1]), groups).reshape(*expert_indices.shape, -1)


def keep_experts(model: Model, start: int, stop: int) -> None:
    """Leave room for experts start ... stop - 1 alone in a gpt-oss model whose weights have not been read."""
    for layer in cast("GptOss", model).layers:
        experts = cast(Experts, layer.mlp.experts)
        for module in (experts.gate_up_proj, experts.down_proj):
            for name in ("weight", "scales", "biases"):
                if name in module:
                    module[name] = module[name][start:stop]


def share_experts(model: Model, start: int, stop: int, total: Total) -> None:
    """Have a gpt-oss model with experts start ... stop - 1 ask the other machines for those that it has not."""
    for layer in cast("GptOss", model).layers:
        layer.mlp.experts = SharedExperts(cast(Experts, layer.mlp.experts), start, stop, total)


def share_tensors(model: Model, is_first: bool, total: Total) -> None:
    """Have a model with some of the heads and columns of each layer add up what all machines have of them.

    is_first: whether this machine adds the experts' biases, which one of them has to.
    """
    if model.spec.family == "gpt_oss":
        for block in cast("GptOss", model).layers:
            block.self_attn.o_proj = SharedLinear(block.self_attn.o_proj, total)
            experts = cast(Experts, block.mlp.experts)
            if not is_first:
                experts.down_proj.bias = mx.zeros_like(experts.down_proj.bias)
            experts.outputs_float32 = True
            block.mlp = SharedMoE(block.mlp, total)
        return
    for layer in cast("OpenELM", model).layers:
        layer.attn.out_proj = SharedLinear(layer.attn.out_proj, total)
        layer.ffn.proj_2 = SharedLinear(layer.ffn.proj_2, total)
