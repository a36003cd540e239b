"""One step of a model as a graph of fixed shapes: new tokens in, logits of the last of them and the longer caches out.

    (tokens (1, L) int32, offset () int32, K_0, V_0, K_1, V_1, ...) -> (logits (V,) float32, K_0, V_0, ...)

K_i and V_i are (1, K, S, D): S places for keys and values, filled up to `offset`. A layer with a window has S places too,
and masks all but the last ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

from ..errors import ConversionError
from ..models.base import LanguageModel

Step = Callable[..., "list[mx.array] | tuple[mx.array, ...]"]


def make_contiguous(model: LanguageModel) -> None:
    """Make every parameter contiguous (row-major), in place.

    MLX 0.32.4 exports a constant's raw buffer without its strides. A matrix stored by columns, as the CPU loader stores
    float32 ones, or a view of a table, as the experts' biases are, would be read back as other numbers, without an error.
    """
    model.update(tree_map(mx.contiguous, model.parameters()))
    mx.eval(model.parameters())
    for layer in model.layers:  # derived from parameters; must not be made within a trace
        mx.eval(layer.prepare_constants())


def step_of(model: LanguageModel) -> Step:
    """The function to trace, of a model whose parameters are contiguous."""

    def step(tokens: mx.array, offset: mx.array, *caches: mx.array) -> list[mx.array]:
        length, places = tokens.shape[1], caches[0].shape[2]
        positions = offset + mx.arange(length, dtype=mx.int32)[:, None]
        keys_at = mx.arange(places, dtype=mx.int32)[None]
        causal = keys_at <= positions
        h, grown = model.embed(tokens), []
        for i, (layer, spec) in enumerate(zip(model.layers, model.spec.layers, strict=True)):
            queries, keys, values = layer.before_attention(h, offset)
            start = offset.reshape(1)
            keys = mx.slice_update(caches[2 * i], keys, start, axes=[2])
            values = mx.slice_update(caches[2 * i + 1], values, start, axes=[2])
            mask = causal if spec.window is None else causal & (keys_at > positions - spec.window)
            h = layer.after_attention(h, layer.attention.attend_over(queries, keys, values, mask))
            grown += [keys, values]
        logits = model.head(h[:, -1:])[0, 0]  # one row: a vocabulary has up to 201,088
        return [logits.astype(mx.float32), *grown]

    return step


def empty_caches(model: LanguageModel, places: int, dtype: mx.Dtype) -> list[mx.array]:
    """Zeros for the keys and values of each layer."""
    caches: list[mx.array] = []
    for spec in model.spec.layers:
        caches += [mx.zeros((1, spec.num_kv_heads, places, spec.head_dim), dtype) for _ in range(2)]
    return caches


def cache_type(model: LanguageModel) -> mx.Dtype:
    """The type of the model's keys."""
    h = model.embed(mx.zeros((1, 1), mx.int32))
    found: mx.Dtype = model.layers[0].before_attention(h, 0)[1].dtype
    return found


def write_graph(
    path: Path, model: LanguageModel, places: Sequence[int], lengths: Sequence[int], metadata: dict[str, Any]
) -> None:
    """Trace a model's step for each combination of places and lengths into one file; they share the weights.

    Raises ConversionError if MLX is too old to export with metadata.
    """
    dtype = cache_type(model)
    try:
        exporter = mx.exporter(str(path), step_of(model), metadata=json.dumps(metadata))
    except TypeError as error:
        raise ConversionError(
            f"Exporting needs MLX 0.32.2 or later, and this is {version('mlx')}: run `pip install -U mlx`."
        ) from error
    with exporter as trace:
        for each in places:
            for length in lengths:
                trace(mx.zeros((1, length), mx.int32), mx.array(0, mx.int32), *empty_caches(model, each, dtype))


class ExportedModel:
    """An exported graph run from Python, in the same way as the C++ program runs it."""

    def __init__(self, path: Path, model: LanguageModel, places: int, lengths: Sequence[int]) -> None:
        self._step = cast("Step", mx.import_function(str(path)))
        self._caches = empty_caches(model, places, cache_type(model))
        self._lengths = sorted(lengths, reverse=True)
        self.offset = 0

    def __call__(self, tokens: Sequence[int]) -> mx.array:
        """Logits (V,) after these new tokens, processed in the largest traced lengths."""
        rest, logits = list(tokens), mx.array(0.0)
        while rest:
            length = next(each for each in self._lengths if each <= len(rest))
            new, rest = rest[:length], rest[length:]
            logits, *self._caches = self._step(
                mx.array([new], mx.int32), mx.array(self.offset, mx.int32), *self._caches
            )
            mx.eval(logits, self._caches)  # each call, so that the old caches' memory is reused
            self.offset += length
        return logits
