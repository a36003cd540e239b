"""How many primitives MLX would run for one decode step: what a compiler or a fused form saves shows here, not in a clock."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx

# They move no data: a GPU launches nothing for them.
VIEWS = frozenset({"Reshape", "Transpose", "Slice", "Squeeze", "ExpandDims", "Broadcast", "View", "Split", "Flatten"})


def primitives(outputs: Any) -> Counter[str]:
    """Name -> how often, over the graph that unevaluated `outputs` (arrays in lists, tuples, dictionaries) stand for."""
    from mlx.utils import tree_flatten

    arrays = [array for _, array in tree_flatten([outputs]) if isinstance(array, mx.array)]
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ?= ?"([A-Za-z][^"]*)", shape ?= ?rectangle', text.getvalue()))


def decode_primitives(call: Callable[[mx.array, Any], mx.array], cache: Any, token: int = 5) -> tuple[int, int]:
    """(all, without views) primitives of one token on a warm `cache`; `call` is a model, ours or mlx-lm's.

    The step is counted with the writes into its cache, and not run.
    """
    logits = call(mx.array([[token]]), cache)[0, -1]
    counts = primitives([mx.argmax(logits), [layer.state for layer in cache]])
    return sum(counts.values()), sum(count for name, count in counts.items() if name not in VIEWS)
