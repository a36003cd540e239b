"""How many primitives MLX would run for one decode step: what a compiler or a fused form saves shows here, not in a clock."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx import nn

from openelm_mlx.models import openelm

# They move no data: a GPU launches nothing for them.
VIEWS = frozenset(
    {"Reshape", "Transpose", "Slice", "Squeeze", "ExpandDims", "Broadcast", "View", "Split", "Flatten", "Unflatten"}
)


def primitives(outputs: Any) -> Counter[str]:
    """Name -> how often, over the graph that unevaluated `outputs` (arrays in lists, tuples, dictionaries) stand for."""
    from mlx.utils import tree_flatten

    arrays = [array for _, array in tree_flatten([outputs]) if isinstance(array, mx.array)]
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ?= ?"([A-Za-z][^"]*)", shape ?= ?rectangle', text.getvalue()))


@contextmanager
def forms_of_a_gpu() -> Iterator[None]:
    """Within it, what is built - and must not be evaluated - has the primitives of a GPU, on whatever machine.

    The CPU backend expands a norm, a rotation and an attention into 9 to 29 primitives, the same ones for everybody; a GPU
    has one kernel for each. Here one primitive stands for it, with the same inputs and the same shape.
    """

    def stand_in(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        inputs = [each for each in (*rest, *options.values()) if isinstance(each, mx.array)]
        return mx.depends([x], inputs or [mx.array(0)])[0]

    with ExitStack() as patches:
        for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
            patches.enter_context(mock.patch.object(mx.fast, name, stand_in))
        patches.enter_context(mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu)))
        patches.enter_context(mock.patch.object(openelm.Block, "_plus", _fused_plus))
        yield


def _fused_plus(_: Any, residual: mx.array, module: Any, x: mx.array) -> mx.array:
    """`Block._plus` as Metal computes it."""
    if type(module) is nn.Linear and "bias" not in module:
        return mx.addmm(residual, x, module.weight.T)
    return residual + module(x)


def decode_primitives(
    call: Callable[[mx.array, Any], mx.array], cache: Any, token: int = 5, as_on_a_gpu: bool = False
) -> tuple[int, int]:
    """(all, without views) primitives of one token on a warm `cache`; `call` is a model, ours or mlx-lm's.

    The step is counted with the writes into its cache, and not run. as_on_a_gpu: what `forms_of_a_gpu` says of it.
    """
    mx.eval([(layer.keys, layer.values) for layer in cache])  # what earlier tokens left to do is not this one's
    with forms_of_a_gpu() if as_on_a_gpu else nullcontext():
        logits = call(mx.array([[token]]), cache)[0, -1]
        counts = primitives([mx.argmax(logits), [(layer.keys, layer.values) for layer in cache]])
    return sum(counts.values()), sum(count for name, count in counts.items() if name not in VIEWS)
