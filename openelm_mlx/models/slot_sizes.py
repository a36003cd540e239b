"""How many slots and rows there are for so many requests and tokens, and which columns (models/slots.py). Without MLX."""

from __future__ import annotations

import numpy as np

# Numbers of slots: few, since each is a shape for which kernels are chosen and steps traced.
SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# A buffer is as long as its longest request for all. Longer ones than this stay apart: their attention fills a device by
# itself, and short ones would pay for them.
LONGEST_IN_SLOTS = 8192
# Tokens of one request's prompt in a step, where layers have windows: rings have columns for as many beyond the window.
RING_ROOM = 256


def slots_for(num_owners: int) -> int:
    """How many slots a bank of so many requests has."""
    return next((size for size in SIZES if size >= num_owners), num_owners)


def rows_for(count: int) -> int:
    """At least so many rows: few numbers, each of which is a shape too. A power of two, or one and a half of it from 48 on."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 64 and power * 3 // 4 >= count else power


def column_runs(columns: int, length: int, count: int) -> list[slice]:
    """The columns of the last `count` of `length` tokens, in their order: one run, or two around the end."""
    start = (length - count) % columns
    runs = [slice(start, min(start + count, columns)), slice(0, start + count - columns)]
    return [run for run in runs if run.start < run.stop]


def flat_columns(
    num_slots: int, num_kv_heads: int, columns: int, row_slots: np.ndarray, row_positions: np.ndarray
) -> np.ndarray:
    """Which of all columns (2 S K T) of a layer the keys and values of these rows go to, (M, 2 K)."""
    parts = np.arange(2)[:, None] * num_slots * num_kv_heads + np.arange(num_kv_heads)
    first = (parts.reshape(-1) + row_slots[:, None] * num_kv_heads) * columns
    found = first + (row_positions % columns)[:, None]
    return found.astype(np.int32 if found.max() < 2**31 else np.int64)
