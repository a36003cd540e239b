"""Bytes that a batch takes while its gradient is computed, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.adapter_targets import Target
from ..specs import ModelSpec
from .batches import Batch
from .loss import targets_at_once
from .settings import Settings

FLOAT32 = 4


def batch_bytes(
    spec: ModelSpec, base: Any, settings: Settings, targets: Sequence[Target], batch: Batch, checkpointing: bool
) -> tuple[int, int]:
    """(all that a batch takes beside weights, the logits in it)."""
    places, rows = batch.tokens.size, batch.rows.shape
    pieces = min(targets_at_once(spec.vocab_size), batch.targets.size)
    logits = 3 * FLOAT32 * pieces * spec.vocab_size
    layers = []
    for layer in spec.layers:
        wide = layer.num_heads + 2 * layer.num_kv_heads
        one = (
            8 * spec.hidden_size
            + 4 * wide * layer.head_dim
            + 5 * layer.intermediate_size * max(1, layer.experts_per_token)
        )
        layers.append(FLOAT32 * (one * places + rows[0] * layer.num_heads * rows[1] ** 2))
    kept = FLOAT32 * spec.hidden_size * places * len(layers) + 2 * max(layers) if checkpointing else sum(layers)
    return kept + logits, logits
