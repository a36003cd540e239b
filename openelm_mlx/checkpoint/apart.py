"""Splitting fused parameters: q, k and v of one projection, gate and up of another, as other programs store them.

Each piece is a slice of a canonical parameter, taken when that is read; nothing is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..specs import ModelSpec
from ..specs.model import Shapes
from .layouts import Contents, Parameter


@dataclass(frozen=True)
class Rows:
    """A slice of one axis of an array: from `start` to `stop`, in steps of `step`."""

    axis: int
    start: int
    stop: int
    step: int = 1

    def of(self, array: mx.array) -> mx.array:
        """A copy of those rows: a view would keep the whole array alive."""
        chosen = (slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)
        return mx.contiguous(array[chosen])

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of those rows of an array of shape `whole`."""
        count = len(range(self.start, self.stop, self.step))
        return (*whole[: self.axis], count, *whole[self.axis + 1 :])


# A module's path and the spec -> the paths and rows of its pieces; None if the module is not split.
Cut = Callable[[str, ModelSpec], "list[tuple[str, Rows]] | None"]


def gpt_oss_pieces(module: str, spec: ModelSpec) -> list[tuple[str, Rows]] | None:
    """Split gpt-oss as mlx-lm does: q, k and v; gate and up, whose rows alternate."""
    layer = spec.layers[0]
    if module.endswith(".qkv_proj"):
        prefix, position, pieces = module.removesuffix("qkv_proj"), 0, []
        for name, heads in (
            ("q_proj", layer.num_heads),
            ("k_proj", layer.num_kv_heads),
            ("v_proj", layer.num_kv_heads),
        ):
            pieces.append((prefix + name, Rows(0, position, position + heads * layer.head_dim)))
            position += heads * layer.head_dim
        return pieces
    if module.endswith(".gate_up_proj"):
        prefix, count = module.removesuffix("gate_up_proj"), 2 * layer.intermediate_size
        return [(prefix + "gate_proj", Rows(1, 0, count, 2)), (prefix + "up_proj", Rows(1, 1, count, 2))]
    return None


def openelm_pieces(module: str, spec: ModelSpec) -> list[tuple[str, Rows]] | None:
    """Split OpenELM's first feed-forward matrix, gate above up, as GGUF stores it."""
    if not module.endswith(".ffn.proj_1"):
        return None
    width = spec.layers[int(module.split(".")[2])].intermediate_size
    prefix = module.removesuffix("proj_1")
    return [(prefix + "gate", Rows(0, 0, width)), (prefix + "up", Rows(0, width, 2 * width))]


def apart(contents: Contents, cut: Cut) -> tuple[Contents, Shapes]:
    """The same checkpoint with modules split by `cut`, and the unpacked shapes of all its parameters."""
    spec = contents.spec
    parameters: dict[str, Parameter] = {}
    quantized = {}
    for name, parameter in contents.parameters.items():
        module, _, part = name.rpartition(".")
        packing = contents.quantized.get(module)
        for path, rows in _pieces(module, cut, spec):
            if packing is not None:
                quantized[path] = packing
            parameters[f"{path}.{part}"] = parameter if rows is None else _piece(parameter, f"{path}.{part}", rows)
    shapes = {}
    for name, shape in spec.parameter_shapes().items():
        module, _, part = name.rpartition(".")
        for path, rows in _pieces(module, cut, spec):
            shapes[f"{path}.{part}"] = shape if rows is None else rows.shape(shape)
    return replace(contents, parameters=parameters, quantized=quantized), shapes


def _pieces(module: str, cut: Cut, spec: ModelSpec) -> Sequence[tuple[str, Rows | None]]:
    found = cut(module, spec)
    return [(module, None)] if found is None else found


def _piece(parameter: Parameter, name: str, rows: Rows) -> Parameter:
    make = parameter.make

    def cut(*arrays: mx.array) -> mx.array:
        return rows.of(arrays[0] if make is None else make(*arrays))

    return replace(parameter, name=name, shape=rows.shape(parameter.shape), make=cut)
