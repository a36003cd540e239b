"""Parameters that other programs keep apart: q, k and v of one projection, gate and up of another.

A canonical parameter is cut into its pieces as it is read; nothing is read here.
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
    """Some rows of an array: from `start` to `stop` of one axis, each `step`th."""

    axis: int
    start: int
    stop: int
    step: int = 1

    def of(self, array: mx.array) -> mx.array:
        """Those rows alone, in memory of their own: a view would keep the whole array alive."""
        chosen = (slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)
        return mx.contiguous(array[chosen])

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of those rows of an array of shape `whole`."""
        count = len(range(self.start, self.stop, self.step))
        return (*whole[: self.axis], count, *whole[self.axis + 1 :])


# A module's path and its own spec -> the pieces' paths and rows; None: it stays whole.
Cut = Callable[[str, ModelSpec], "list[tuple[str, Rows]] | None"]


def gpt_oss_pieces(module: str, spec: ModelSpec) -> list[tuple[str, Rows]] | None:
    """q, k and v; and gate and up, whose rows alternate: the names are those of mlx-lm."""
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
    """The first feed-forward matrix is gate above up; GGUF has the two apart."""
    if not module.endswith(".ffn.proj_1"):
        return None
    width = spec.layers[int(module.split(".")[2])].intermediate_size
    prefix = module.removesuffix("proj_1")
    return [(prefix + "gate", Rows(0, 0, width)), (prefix + "up", Rows(0, width, 2 * width))]


def apart(contents: Contents, cut: Cut) -> tuple[Contents, Shapes]:
    """The same checkpoint with the modules that `cut` names in pieces, and the shapes of its parameters, unpacked."""
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
