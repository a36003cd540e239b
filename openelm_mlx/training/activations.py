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
    """How many float32 numbers the layer that is worked at takes for each number of a kind, and the head for each logit.

    Its attention: scores, queries, keys and values of all places. Its feed-forward, at another time: the hidden numbers and the
    outputs of each token, or of each of its experts. shared: the part of the smaller one of the head and the last layer that is
    there with the larger one: the layer is begun while the head is computed.
    """

    scores: float
    queries: float
    keys: float
    hidden: float
    outputs: float
    logits: float
    shared: float


# (family, whether layers are computed again, whether in half precision). Where layers are computed again the layer's forward
# pass is in it. Fitted to the peaks of gradients of random models with adapters on attention: six or eight shapes of a family,
# of which most have one kind of numbers in plenty, of one layer and of three or four, with few targets and with many
# (docs/LOG.md). Then the hidden numbers of two rows were raised by a tenth, since the demos needed that.
WORK = {
    ("openelm", False, False): ScratchFactors(2.2, 18.5, 6.6, 11.3, 9.5, 4.4, 0.31),
    ("openelm", False, True): ScratchFactors(3.1, 17.4, 8.8, 10.3, 10.4, 5.8, 0.0),
    ("openelm", True, False): ScratchFactors(2.3, 17.6, 7.5, 13.7, 8.0, 4.7, 0.24),
    ("openelm", True, True): ScratchFactors(3.6, 15.7, 9.4, 13.5, 13.1, 5.3, 0.19),
    ("gpt_oss", False, False): ScratchFactors(4.5, 17.0, 8.2, 11.2, 4.6, 4.4, 0.46),
    ("gpt_oss", False, True): ScratchFactors(5.4, 11.1, 3.6, 13.4, 6.1, 4.3, 0.37),
    ("gpt_oss", True, False): ScratchFactors(5.7, 13.3, 6.2, 16.8, 5.5, 4.8, 0.20),
    ("gpt_oss", True, True): ScratchFactors(5.1, 15.0, 3.1, 19.1, 5.7, 4.5, 0.20),
}
# Of a layer of OpenELM: how much of it is computed again before the one after it is done; fitted as well.
OF_THE_NEXT = 0.75
# How much of a layer's turned matrices there is at once, by whether layers are computed again; fitted as well.
OF_TURNED = {False: 1.0, True: 0.7}
# Where a head is trained: its gradient, and what it is added to.
OF_A_TRAINED_HEAD = 2.5


class Copies(NamedTuple):
    """Bytes of the copies that matrices are multiplied as, on the CPU; cast: on a GPU too.

    head: the head's matrix, turned, and layer: those of a layer (`products.product`); of what is packed or in half precision
    there are none. widened: a layer's experts in float32 (`widen`). The gradient of what goes into a product reads what was
    multiplied, so this one stays until its layer's backward pass; where layers are computed again there is one layer's.
    cast: all trained weights in half precision.
    """

    head: int = 0
    layer: int = 0
    widened: int = 0
    cast: int = 0


class SavedForBackward(NamedTuple):
    """Numbers that a layer keeps from its forward pass for its backward pass."""

    attention: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.attention + self.feed_forward


NO_COPIES = Copies()


def batch_bytes(
    spec: ModelSpec,
    adapted: Sequence[Target],
    trains_all: bool,
    batch: Batch,
    checkpointing: bool,
    gradients: int = 0,
    copies: Copies = NO_COPIES,
    is_half: bool = False,
) -> tuple[int, int]:
    """(what a batch takes beside weights, its gradients included; the logits in it).

    adapted: what has an adapter; trains_all: all weights are trained. gradients: their bytes. is_half: computed in 16 bits.
    """
    trains_experts = trains_all or any(target.group == EXPERTS for target in adapted)
    work = WORK[spec.family, checkpointing, is_half]
    shapes = [_Shape.of(layer, batch, checkpointing) for layer in spec.layers]
    kept = [_kept(spec, shape, trains_experts, is_half) for shape in shapes]
    worked_at = [_work(spec, shape, work) for shape in shapes]
    logits = work.logits * min(targets_at_once(spec.vocab_size), batch.targets.size) * spec.vocab_size
    trained_head = OF_A_TRAINED_HEAD * spec.vocab_size * spec.hidden_size if trains_all else 0
    head = logits + copies.head / FLOAT32 + trained_head
    stream = batch.tokens.size * spec.hidden_size
    turned, widened, freed = OF_TURNED[checkpointing] * copies.layer, copies.widened, 0
    if checkpointing:
        experts = "experts" if trains_experts and not trains_all else "attention"
        way = "openelm" if spec.family == "openelm" else experts
        always = stream * len(kept)  # the inputs of all layers
        layer = max(
            (each.total - stream + _of_the_next(kept, i, stream, way) + worked_at[i] for i, each in enumerate(kept)),
            default=0.0,
        )
    else:  # all layers are kept both when the logits are there and when the last layer's gradient begins
        always = sum(each.total for each in kept)
        layer = max(worked_at, default=0.0)
        widened *= len(kept)
        if trains_all:
            freed = FLOAT32 * sum(each.total for each in kept[2:]) + copies.widened * max(0, len(kept) - 2)
    if trains_all:
        # Gradients take the place of what their layers kept and were computed with, but for what is worked at.
        gradients = max(gradients - freed, copies.cast + gradients // max(1, len(kept)))
    always += 2 * batch.targets.size * spec.hidden_size
    needed = always + max(head, layer) + work.shared * min(head, layer)
    return int(FLOAT32 * needed + turned) + gradients + widened, int(FLOAT32 * logits)


def _of_the_next(kept: Sequence[SavedForBackward], layer: int, stream: int, way: str) -> float:
    """What is computed again of the layer before this one, which is the next one, before this one is done; not its input.

    That is its attention; with adapters beside experts all of it. Of OpenELM's layers, which have half as many operations, it
    is a part of all, but nothing while the last one is worked at, which is begun as soon as the head is.
    """
    if not layer or (way == "openelm" and layer == len(kept) - 1):
        return 0.0
    before = kept[layer - 1]
    if way == "attention":
        return before.attention - stream
    return (OF_THE_NEXT if way == "openelm" else 1.0) * (before.total - stream)


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


def _kept(spec: ModelSpec, shape: _Shape, trains_experts: bool, is_half: bool) -> SavedForBackward:
    """Counted from the layers' code: every array that the gradient of an operation reads.

    is_half: in 16 bits. OpenELM's norms and attention compute in float32, and keep that: of the queries' four arrays two are
    halved, and the feed-forward's five, which are six then; keys and values have copies in float32 beside them. gpt-oss keeps
    its stream and what is in its experts in float32 all the same, and the rest of it is counted so too.
    """
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
        hidden = 5 * layer.intermediate_size
        if is_half:
            attention -= shape.places * queries
            hidden = 3 * layer.intermediate_size
        return SavedForBackward(attention, shape.places * (2 * width + hidden))
    # Gate and up before and after each limit, sigmoid and two products; the experts' outputs; the stream.
    feed_forward = shape.routes * (7 * layer.intermediate_size + width) + shape.places * width
    if trains_experts:  # the inputs of both matrices
        feed_forward += shape.routes * (layer.intermediate_size + width)
    return SavedForBackward(attention, feed_forward)


def _work(spec: ModelSpec, shape: _Shape, work: ScratchFactors) -> float:
    """The larger one of a layer's two halves: by the time that attention is worked at, what the other half kept is free."""
    layer = shape.layer
    # Half of their arrays are laid out in rows.
    vectors = (shape.places + shape.laid_out) / 2 * layer.head_dim
    return max(
        work.scores * shape.scores + vectors * (work.queries * layer.num_heads + work.keys * 2 * layer.num_kv_heads),
        shape.routes * (work.hidden * layer.intermediate_size + work.outputs * spec.hidden_size),
    )
