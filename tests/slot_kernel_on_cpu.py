"""The attention kernel for slots without a GPU: its text run on the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kernels_on_cpu import run_kernel

from openelm_mlx.models.slot_attention import CUDA, METAL, WRITE, heads_together, source_of

NAMES = {"CUDA": CUDA, "Metal": METAL}


def attend_on_cpu(
    folder: Path,
    language: str,
    queries: np.ndarray,
    buffer: np.ndarray,
    rows: np.ndarray,
    scale: float,
    sinks: np.ndarray | None,
    window: int | None,
    simdgroups: int,
) -> np.ndarray:
    """`attend_in_slots` in float32, compiled for the processor in `folder`."""
    num_rows, heads, _, head_dim = queries.shape
    group, together = heads // buffer.shape[2], heads_together(heads, buffer.shape[2])
    constants = {"D": head_dim, "G": group, "GB": together, "W": simdgroups}
    arrays = {"q": queries, "kv": np.ascontiguousarray(buffer), "rows": rows}
    if sinks is not None:
        arrays["sinks"] = sinks
    out = np.zeros((num_rows, heads, 1, head_dim), np.float32)
    text, groups = NAMES[language] + source_of(scale, sinks is not None, window), (1, heads // together, num_rows)
    run_kernel(folder, language, "", text, constants, simdgroups, arrays, out, groups)
    return out


def write_on_cpu(folder: Path, language: str, buffer: np.ndarray, new: np.ndarray, rows: np.ndarray) -> None:
    """`write_in_slots` into this buffer, in float32."""
    threads, head_dim = 64, new.shape[2]
    groups = -(-new.shape[0] * new.shape[1] * (head_dim // 8) // threads)
    arrays = {"fresh": new, "kv": buffer, "rows": rows}
    constants, out = {"D": head_dim, "THREADS": threads}, np.ones(1, np.float32)
    run_kernel(folder, language, "", NAMES[language] + WRITE, constants, threads // 32, arrays, out, (groups, 1, 1))
    assert out == 0
