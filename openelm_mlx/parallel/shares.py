"""Which share of a model each of several machines has: whole units of every layer, or whole experts.

    form      what a machine has                                              what is added up
    tensor    kv heads with their query heads, columns of the feed-forward    after attention, and after the feed-forward
    experts   everything but the experts, and some of these                   the chosen experts' rows, zeros for the others

A share is an ordinary model with a smaller spec. Units are never cut: a kv head stays with its query heads (and their
sinks), and columns of a packed matrix are kept in whole groups, so that its numbers are those of the whole. Uneven shares
are fine, since a sum does not care how large a part was: the first machines get the units that are over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..checkpoint.cuts import Cut, Range
from ..checkpoint.layouts import Parameter
from ..checkpoint.quantize import Quantization
from ..errors import SettingError
from ..files import shown
from ..memory.machine import Machine
from ..memory.plan import make_plan
from ..memory.plan_types import MemoryPlan, PlanRequest
from ..placement import Decision, Placement
from ..specs import LayerSpec, ModelSpec

TENSOR, EXPERTS = "tensor", "experts"
FORMS = (TENSOR, EXPERTS)

# The matrices of attention and feed-forward whose columns are divided.
_ADDED_UP = (
    ".attn.out_proj.weight", ".self_attn.o_proj.weight", ".ffn.proj_2.weight", ".experts.down_proj.weight",
)  # fmt: skip

# Columns of a matrix that is not packed: multiples of this suit every kernel.
UNPACKED_UNIT = 32

_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)\.(\w+)$")


def checked_form(form: object) -> str:
    """The form of that name. Raises SettingError."""
    if not isinstance(form, str) or form not in FORMS:
        raise SettingError(f'parallel is {shown(form)}: give "tensor" or "experts".')
    return form


@dataclass(frozen=True)
class LayerShare:
    """What one machine has of a layer: kv heads with their query heads, columns of the feed-forward, experts."""

    kv_heads: Range
    columns: Range
    experts: Range

    def spec(self, layer: LayerSpec) -> LayerSpec:
        """The layer's shape on that machine; whole experts leave it as it is."""
        num_kv_heads = self.kv_heads[1] - self.kv_heads[0]
        return replace(
            layer,
            num_heads=layer.num_heads // layer.num_kv_heads * num_kv_heads,
            num_kv_heads=num_kv_heads,
            intermediate_size=self.columns[1] - self.columns[0],
        )


def layer_shares(
    spec: ModelSpec, packings: Mapping[str, Quantization], form: str, rank: int, size: int
) -> list[LayerShare]:
    """Of each layer, the share of machine `rank` of `size`. packings: by module, as files or memory have them packed.

    Raises SettingError where there are fewer units than machines.
    """
    found = []
    for i, layer in enumerate(spec.layers):
        kv_heads, columns, experts = (0, layer.num_kv_heads), (0, layer.intermediate_size), (0, layer.num_experts)
        if form == EXPERTS:
            if not layer.num_experts:
                raise SettingError(
                    'parallel="experts" is for models with experts, and an OpenELM has none: give parallel="tensor".'
                )
            what = f"layer {i} has {layer.num_experts} experts"
            experts = share_of(layer.num_experts, 1, rank, size, what)
        else:
            width = layer.num_heads // layer.num_kv_heads * layer.head_dim
            unit = _least_heads(width, _group(packings, i, (".attn.out_proj", ".self_attn.o_proj")))
            what = f"layer {i} has {-(-layer.num_kv_heads // unit)} groups of heads that go together"
            kv_heads = share_of(layer.num_kv_heads, unit, rank, size, what)
            unit = _group(packings, i, (".ffn.proj_2", ".experts.down_proj"))
            if unit == 1 and layer.intermediate_size >= UNPACKED_UNIT * size:
                unit = UNPACKED_UNIT
            what = f"the feed-forward part of layer {i} has {-(-layer.intermediate_size // unit)} blocks of columns"
            columns = share_of(layer.intermediate_size, unit, rank, size, what)
        found.append(LayerShare(kv_heads, columns, experts))
    return found


def share_of(total: int, unit: int, rank: int, size: int, what: str) -> Range:
    """Of `total`, in whole units (the last may be smaller), what machine `rank` of `size` has: 23 + 23 + 22 + 22 of 90.

    Raises SettingError for fewer units than machines; `what` says in words how many there are.
    """
    units = -(-total // unit)
    if units < size:
        raise SettingError(
            f"{size} machines cannot share this model: {what}; start {units} processes, or give it whole layers with workers."
        )
    each, over = divmod(units, size)
    start = rank * each + min(rank, over)
    stop = start + each + (rank < over)
    return start * unit, min(stop * unit, total)


def _least_heads(width: int, group: int) -> int:
    """The fewest kv heads whose columns, `width` each, are whole groups."""
    return group // math.gcd(group, width)


def _group(packings: Mapping[str, Quantization], layer: int, tails: tuple[str, ...]) -> int:
    """Columns that go together in a layer's matrix of one of these names; 1 where it is not packed."""
    for module, packing in packings.items():
        if f".layers.{layer}." in module and module.endswith(tails):
            return packing.group_size
    return 1


def shared_placement(placement: Placement, form: str, rank: int, size: int) -> Placement:
    """What machine `rank` of `size` keeps and reads of a placement: the same decisions, of its share of each parameter.

    With whole experts the spec stays as it is: the router chooses among all of them. Raises SettingError.
    """
    contents = placement.contents
    spec = contents.spec
    shares = layer_shares(spec, placement.packings, form, rank, size)
    layers = tuple(share.spec(layer) for share, layer in zip(shares, spec.layers, strict=True))
    own = replace(spec, layers=layers)
    parameters = {
        name: _cut(each, contents.quantized, spec, shares, form) for name, each in contents.parameters.items()
    }
    shapes = own.parameter_shapes()
    decisions = tuple(
        replace(
            each,
            parameter=parameters[each.parameter.name],
            dtype=mx.float32 if form == TENSOR and _is_added_up(each, placement) else each.dtype,
            unpacked=math.prod(shapes[each.parameter.name]) if each.unpacked else each.unpacked,
        )
        for each in placement.decisions
    )
    return replace(placement, contents=replace(contents, spec=own, parameters=parameters), decisions=decisions)


def plan_of_share(
    source: str, own: Placement, machine: Machine, request: PlanRequest, folder: Path | None
) -> MemoryPlan:
    """The plan of one machine's share. All of it is in memory, so that every machine does the same."""
    weights = replace(own.weights(folder), can_stream=False, embedding=0)
    return make_plan(source, own.contents.spec, weights, machine, request, own.dtype.size)


def _is_added_up(decision: Decision, placement: Placement) -> bool:
    """Whether it is a matrix, not packed, whose products are added to the other machines'.

    In half precision each of them would be rounded before.
    """
    if decision.dtype is None or decision.module in placement.packings:
        return False
    return decision.parameter.name.endswith(_ADDED_UP)


def _cut(
    parameter: Parameter,
    quantized: Mapping[str, Quantization],
    spec: ModelSpec,
    shares: list[LayerShare],
    form: str,
) -> Parameter:
    """A machine's share of a parameter, which is the whole of it for norms, routers, embedding and head."""
    found = _IN_LAYER.search(parameter.name)
    if found is None:
        return parameter
    number, module, part = int(found[1]), found[2], found[3]
    make = _expert_cut if form == EXPERTS else _tensor_cut
    cut = make(module, part, spec.layers[number], shares[number], quantized.get(parameter.module))
    return parameter if cut is None else replace(parameter, shape=cut.shape(parameter.shape), cut=cut)


def _expert_cut(
    module: str, part: str, layer: LayerSpec, share: LayerShare, packing: Quantization | None
) -> Cut | None:
    """Whole experts; their biases, which are small, are looked up by the numbers that the model has for them."""
    return Cut(0, (share.experts,)) if ".experts." in module and part != "bias" else None


def _tensor_cut(
    module: str, part: str, layer: LayerSpec, share: LayerShare, packing: Quantization | None
) -> Cut | None:
    """Rows of the matrices that lead into attention and feed-forward, columns of those that lead out of them.

    What is added after the sum (o_proj's bias) and what is added by one machine (that of the experts) stays whole.
    """
    per_kv, size = layer.num_heads // layer.num_kv_heads, layer.head_dim
    first, last = share.kv_heads
    heads, columns = (first * per_kv, last * per_kv), share.columns
    name = module.rpartition(".")[2]
    if part == "sinks":
        return Cut(0, (heads,))
    if name == "qkv_proj":  # rows of queries, keys, values
        begins = (0, layer.num_heads, layer.num_heads + layer.num_kv_heads)
        of_each = (heads, share.kv_heads, share.kv_heads)
        return Cut(
            0, tuple(((begin + a) * size, (begin + b) * size) for begin, (a, b) in zip(begins, of_each, strict=True))
        )
    if name == "proj_1":  # rows of gate, then of up
        width = layer.intermediate_size
        return Cut(0, (columns, (width + columns[0], width + columns[1])))
    if name == "gate_up_proj":  # gate 0, up 0, gate 1, up 1, ... of each expert
        return Cut(1, ((2 * columns[0], 2 * columns[1]),))
    if part != "bias" and name in ("out_proj", "o_proj"):
        return Cut(1, (_stored((heads[0] * size, heads[1] * size), part, packing),))
    if part != "bias" and name in ("proj_2", "down_proj"):
        return Cut(2 if name == "down_proj" else 1, (_stored(columns, part, packing),))
    return None


def _stored(columns: Range, part: str, packing: Quantization | None) -> Range:
    """Where columns lie in a part of a packed matrix: its words, or its scales and biases, one a group."""
    if packing is None:
        return columns
    start, stop = columns
    if part == "weight":
        return start * packing.bits // 32, stop * packing.bits // 32
    return start // packing.group_size, stop // packing.group_size
