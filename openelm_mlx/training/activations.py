"""Bytes that a batch takes while its gradient is computed, from shapes alone.

Which arrays the backward pass keeps follows from the code in `models/`; how many of each kind are alive at the peak was fitted
to MLX's own peak on the CPU backend, for both demos and some twenty random models of each family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.adapter_targets import EXPERTS, Target
from ..specs import LayerSpec, ModelSpec
from .batches import Batch
from .forward import QUERIES_AT_ONCE
from .loss import targets_at_once

FLOAT32 = 4


@dataclass(frozen=True)
class Alive:
    """How many float32 numbers are alive at the peak for each number of a kind: queries, keys and values of a token; of its
    feed-forward (for each chosen expert); scores of attention; places in rows, where rows are laid out; the residual stream of
    each layer; of each learned token, its hidden state and its logits.
    """

    projected: float
    hidden: float
    scores: float
    laid_out: float
    stream: float
    learned: float
    logits: float


# What is trained: adapters, some of them beside experts, or all weights.
ADAPTERS, BESIDE_EXPERTS, ALL = "adapters", "beside experts", "all"

# (family, whether layers are computed again, what is trained). Where layers are computed again, the
# first four are those of the largest layer alone.
ALIVE = {
    ("openelm", False, ADAPTERS): Alive(3.05, 6.82, 1.32, 0.07, 0.0, 67.9, 2.55),
    ("openelm", True, ADAPTERS): Alive(16.35, 8.93, 3.24, 1.44, 3.47, 0.0, 0.71),
    ("openelm", False, ALL): Alive(3.05, 6.82, 1.32, 0.07, 0.0, 67.9, 2.55),
    ("openelm", True, ALL): Alive(16.35, 8.93, 3.24, 1.44, 3.47, 0.0, 0.71),
    ("gpt_oss", False, ADAPTERS): Alive(7.24, 8.96, 1.23, 0.0, 0.0, 0.0, 1.69),
    ("gpt_oss", True, ADAPTERS): Alive(16.64, 15.7, 1.17, 0.16, 7.14, 0.0, 0.9),
    ("gpt_oss", False, BESIDE_EXPERTS): Alive(2.6, 10.9, 1.75, 0.04, 0.0, 68.0, 5.5),
    ("gpt_oss", True, BESIDE_EXPERTS): Alive(0.0, 27.28, 4.45, 4.47, 7.14, 0.0, 6.37),
    ("gpt_oss", False, ALL): Alive(2.42, 10.14, 1.63, 0.04, 0.0, 63.2, 5.1),
    ("gpt_oss", True, ALL): Alive(0.0, 24.0, 3.92, 3.93, 6.28, 0.0, 5.61),
}
# Where a head is trained: its gradient, and what it is added to.
OF_A_TRAINED_HEAD = 2.5


def batch_bytes(
    spec: ModelSpec, adapted: Sequence[Target], trains_all: bool, batch: Batch, checkpointing: bool
) -> tuple[int, int]:
    """(what a batch takes beside weights and gradients, the logits in it).

    adapted: what has an adapter; trains_all: all weights are trained.
    """
    trained = BESIDE_EXPERTS if any(target.group == EXPERTS for target in adapted) else ADAPTERS
    alive = ALIVE[spec.family, checkpointing, ALL if trains_all else trained]
    layers = [_layer(spec, layer, batch, alive, checkpointing) for layer in spec.layers]
    places, count = batch.tokens.size, batch.targets.size
    at_once = min(targets_at_once(spec.vocab_size), count)
    total = max(layers) if checkpointing else sum(layers)
    total += alive.stream * places * spec.hidden_size * len(layers)
    # The fit was of targets all at once; of fewer, only their logits are there.
    logits = alive.logits * at_once * spec.vocab_size
    total += logits + alive.learned * count * spec.hidden_size
    if trains_all:
        total += OF_A_TRAINED_HEAD * spec.vocab_size * spec.hidden_size
    return int(FLOAT32 * total), int(FLOAT32 * logits)


def _layer(spec: ModelSpec, layer: LayerSpec, batch: Batch, alive: Alive, checkpointing: bool) -> float:
    """Numbers that one layer keeps."""
    places, (rows, length) = batch.tokens.size, batch.rows.shape
    window = layer.window
    in_blocks = window is not None and 2 * window <= length
    queries = min(length, QUERIES_AT_ONCE) if checkpointing and not in_blocks else length
    scores = rows * layer.num_heads * queries * (2 * window if in_blocks and window is not None else length)
    heads = layer.num_heads + 2 * layer.num_kv_heads
    laid_out = 0 if batch.is_rows else rows * length * (heads + layer.num_heads) * layer.head_dim
    return (
        alive.projected * places * heads * layer.head_dim
        + alive.hidden * places * layer.intermediate_size * max(1, layer.experts_per_token or 0)
        + alive.scores * scores
        + alive.laid_out * laid_out
    )
