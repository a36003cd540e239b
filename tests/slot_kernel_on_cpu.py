"""The attention kernel for slots without a GPU: its text run on the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kernels_on_cpu import run_kernel

from openelm_mlx.models.slot_attention import CUDA, METAL, heads_together, source_of

NAMES = {"CUDA": CUDA, "Metal": METAL}


def attend_on_cpu(
    folder: Path,
    language: str,
    queries: np.ndarray,
    buffer: np.ndarray,
    state: np.ndarray,
    scale: float,
    sinks: np.ndarray | None,
    simdgroups: int,
) -> np.ndarray:
    """`attend_in_slots` in float32, compiled for the processor in `folder`."""
    slots, heads, _, head_dim = queries.shape
    group, together = heads // buffer.shape[2], heads_together(heads, buffer.shape[2])
    constants = {"D": head_dim, "G": group, "GB": together, "W": simdgroups}
    arrays = {"q": queries, "kv": np.ascontiguousarray(buffer), "state": state}
    if sinks is not None:
        arrays["sinks"] = sinks
    out = np.zeros((slots, heads, 1, head_dim), np.float32)
    text, groups = NAMES[language] + source_of(scale, sinks is not None), (1, heads // together, slots)
    run_kernel(folder, language, "", text, constants, simdgroups, arrays, out, groups)
    return out
