"""What loading and running a model will take, from its shapes and its files' headers alone: pure arithmetic, no arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """What a model will take on a machine, and the settings to run it with. All sizes in bytes.

    total_bytes: what MLX's peak should be; process_bytes: the whole process's; budget_bytes: what may be used. kv_bits:
    None, or 8 on the full-attention layers. expert_slots: None when every expert is in memory, else how many a layer.
    dense_bits: None, or the bits that dense parts are quantized to as they are read. decode_tps, prefill_tps: predicted
    tokens a second, None where the machine's bandwidth is not known.
    """

    source: str
    fits: bool
    weights_bytes: int
    kv_cache_bytes: int
    scratch_bytes: int
    total_bytes: int
    process_bytes: int
    budget_bytes: int
    context_length: int
    max_context_length: int
    batch_size: int
    prefill_chunk: int
    kv_bits: int | None = None
    expert_slots: int | None = None
    dense_bits: int | None = None
    wired_limit_bytes: int = 0
    cache_limit_bytes: int = 0
    prefill_tps: float | None = None
    decode_tps: float | None = None
