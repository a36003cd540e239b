"""Bytes that a batch takes while its gradient is computed, from shapes alone.

What every layer keeps for the backward pass is counted from the code in `models/`. Beside it one layer at a time is worked
at. How much that takes was measured on the CPU backend with random models of both families, of one layer and of three:
MLX lays out what some hundred operations to come will write (ten tasks of ten, cpu/encoder.h) before it computes them, so it
is about twice what the operations need in their order. A GPU runs ahead of the host as well; nobody has measured how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..models.adapter_targets import EXPERTS, Target
from ..specs import LayerSpec, ModelSpec
from .batches import Batch
from .forward import QUERIES_AT_ONCE
from .loss import targets_at_once

FLOAT32 = 4


@dataclass(frozen=True)
class ScratchFactors:
    """How many float32 numbers the layer that is worked at takes for each number of a kind.

    Its attention: scores, and queries, keys and values of all places. Its feed-forward, at another time: the hidden numbers and
    the outputs of each token, or of each of its experts. head: the share of the smaller one of the head and the last layer
    that is there with the larger one: OpenELM's layers have so few operations that one is begun while the head is computed.
    """

    scores: float
    projected: float
    hidden: float
    outputs: float
    head: float


# (family, whether layers are computed again). The second one has the layer's forward pass in it.
WORK = {
    ("openelm", False): ScratchFactors(2.2, 9.8, 8.6, 17.8, 1.0),
    ("openelm", True): ScratchFactors(2.5, 9.3, 14.5, 7.7, 0.2),
    ("gpt_oss", False): ScratchFactors(5.0, 9.3, 13.3, 6.5, 0.1),
    ("gpt_oss", True): ScratchFactors(5.4, 9.0, 17.7, 7.5, 0.2),
}
# Logits, their exponentials and gradients at once.
OF_LOGITS = 6
# Where a head is trained: its gradient, and what it is added to.
OF_A_TRAINED_HEAD = 2.5


class SavedForBackward(NamedTuple):
    """Numbers that a layer keeps from its forward pass for its backward pass."""

    attention: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.attention + self.feed_forward


def batch_bytes(
    spec: ModelSpec,
    adapted: Sequence[Target],
    trains_all: bool,
    batch: Batch,
    checkpointing: bool,
    gradients: int = 0,
    turned: int = 0,
) -> tuple[int, int]:
    """(what a batch takes beside weights, its gradients included; the logits in it).

    adapted: what has an adapter; trains_all: all weights are trained. gradients: their bytes. turned: those of the copy of
    the head's matrix.
    """
    trains_experts = trains_all or any(target.group == EXPERTS for target in adapted)
    work = WORK[spec.family, checkpointing]
    shapes = [_Shape.of(layer, batch, checkpointing) for layer in spec.layers]
    kept = [_kept(spec, shape, trains_experts) for shape in shapes]
    worked_at = [_work(spec, shape, work) for shape in shapes]
    logits = OF_LOGITS * min(targets_at_once(spec.vocab_size), batch.targets.size) * spec.vocab_size
    head = logits + turned / FLOAT32 + (OF_A_TRAINED_HEAD * spec.vocab_size * spec.hidden_size if trains_all else 0)
    stream = batch.tokens.size * spec.hidden_size
    if checkpointing:
        whole = spec.family == "openelm" or (trains_experts and not trains_all)
        always = stream * len(kept)
        layer = max(
            (each.total + _of_the_next(kept[:i], whole) + worked_at[i] for i, each in enumerate(kept)), default=0.0
        )
    else:  # all layers are kept both when the logits are there and when the last layer's gradient begins
        always = sum(each.total for each in kept)
        layer = max(worked_at, default=0.0)
        if trains_all:  # gradients take the place of what their layers had kept, but for what is worked at
            freed = FLOAT32 * sum(each.total for each in kept[2:])
            gradients = max(gradients - freed, gradients // max(1, len(kept)))
    always += 2 * batch.targets.size * spec.hidden_size
    needed = always + max(head, layer) + work.head * min(head, layer)
    return int(FLOAT32 * needed) + gradients, FLOAT32 * logits


def _of_the_next(before: Sequence[SavedForBackward], whole: bool) -> int:
    """What is computed again of the next layer before this one is done. before: what layers keep up to that one.

    That is its attention; all of a layer of OpenELM, which has half as many operations, or with adapters beside experts.
    """
    if not before:
        return 0
    return before[-1].total if whole else before[-1].attention


@dataclass(frozen=True)
class _Shape:
    """Of a layer and a batch. places: of tokens; laid_out: of their rows. routes: feed-forwards of tokens."""

    layer: LayerSpec
    places: int
    laid_out: int
    routes: int
    scores: int
    is_rows: bool

    @classmethod
    def of(cls, layer: LayerSpec, batch: Batch, checkpointing: bool) -> _Shape:
        places, (rows, length) = batch.tokens.size, batch.rows.shape
        window = layer.window
        if window is not None and 2 * window <= length:  # in blocks
            scores = rows * layer.num_heads * -(-length // window) * window * 2 * window
        else:
            queries = min(length, QUERIES_AT_ONCE) if checkpointing else length
            scores = rows * layer.num_heads * queries * length
        routes = places * max(1, layer.experts_per_token or 0)
        return cls(layer, places, rows * length, routes, scores, batch.is_rows)


def _kept(spec: ModelSpec, shape: _Shape, trains_experts: bool) -> SavedForBackward:
    """Counted from the layers' code: every array that the gradient of an operation reads."""
    layer, width = shape.layer, spec.hidden_size
    queries, each = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    # The layer's input, the same normed, and attention's output; queries, scaled, and probabilities.
    attention = shape.places * (2 * width + queries) + shape.laid_out * queries + shape.scores
    if shape.is_rows:
        # Keys and values are parts of larger arrays, which stay: those that were rotated, and the projection.
        attention += shape.places * (queries + each)
        attention += 0 if spec.family == "openelm" else shape.places * (queries + 2 * each)
    else:
        attention += shape.laid_out * 2 * each
    if spec.family == "openelm":
        # The projection, whose norm is differentiated; the stream and the same normed; gate, up, sigmoid, silu, product.
        attention += shape.places * (queries + 2 * each)
        return SavedForBackward(attention, shape.places * (2 * width + 5 * layer.intermediate_size))
    # Gate and up before and after each limit, sigmoid and two products; the experts' outputs; the stream.
    feed_forward = shape.routes * (7 * layer.intermediate_size + width) + shape.places * width
    if trains_experts:  # the inputs of both matrices
        feed_forward += shape.routes * (layer.intermediate_size + width)
    return SavedForBackward(attention, feed_forward)


def _work(spec: ModelSpec, shape: _Shape, work: ScratchFactors) -> float:
    """The larger one of a layer's two halves: by the time that attention is worked at, what the other half kept is free."""
    layer = shape.layer
    heads = layer.num_heads + 2 * layer.num_kv_heads
    projected = (shape.places if shape.is_rows else shape.laid_out) * heads * layer.head_dim
    return max(
        work.scores * shape.scores + work.projected * projected,
        shape.routes * (work.hidden * layer.intermediate_size + work.outputs * spec.hidden_size),
    )
