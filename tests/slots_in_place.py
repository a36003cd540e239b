"""Slots as where their kernels are, on the processor: buffers are written as they are, and stay the same arrays."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from openelm_mlx.decoding import pieces
from openelm_mlx.models import slot_step, slots
from openelm_mlx.models.attention import attend
from openelm_mlx.models.base import LanguageModel


def slots_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on. An array's memory is numpy's too, so that MLX learns as little of what is written as on a GPU."""
    for module in (slots, pieces):
        monkeypatch.setattr(module, "write_in_slots", write_on_cpu)
    monkeypatch.setattr(slots, "has_kernel_for", lambda head_dim: True)
    monkeypatch.setattr(slot_step, "attend_in_slots", _attend)


def use_slots(
    monkeypatch: pytest.MonkeyPatch, model: LanguageModel, are_in_place: bool, with_prompts: bool | None = None
) -> None:
    """Requests to this model have slots, and their prompts `with_prompts`; where that is None, where slots are in place."""
    if are_in_place:
        slots_in_place(monkeypatch)
    with_prompts = are_in_place if with_prompts is None else with_prompts
    # Not compiled: MLX would call the machine's compiler.
    choices = replace(model.choices, slots=True, slot_kernel=with_prompts, prompts_in_slots=with_prompts)
    monkeypatch.setattr(model, "choices", choices)


def write_on_cpu(buffer: mx.array, new: mx.array, rows: mx.array) -> mx.array:
    """`write_in_slots` without its kernel."""
    bits = {2: mx.uint16, 4: mx.uint32}[buffer.itemsize]  # numpy has no bfloat16
    shared, given = buffer.view(bits), new.view(bits)
    mx.eval(shared, given, rows)
    view, heads = np.array(shared, copy=False), buffer.shape[2]
    for own, (slot, position) in zip(np.array(given), rows.tolist(), strict=True):
        view[:, slot, :, position % buffer.shape[3]] = own.reshape(2, heads, -1)
    return mx.zeros(1)


def _attend(
    queries: mx.array,
    buffer: mx.array,
    rows: mx.array,
    scale: float,
    sinks: mx.array | None = None,
    window: int | None = None,
    written: mx.array | None = None,
) -> mx.array:
    """Row by row, over its own keys and values, at once: they may be written over."""
    outs, columns = [], buffer.shape[3]
    for row, (slot, position) in enumerate(rows.tolist()):
        count = min(position + 1, columns, position + 1 if window is None else window)
        first = (position + 1 - count) % columns
        runs = [slice(first, min(first + count, columns)), slice(0, max(0, first + count - columns))]
        own = [buffer[:, slot, :, run] for run in runs if run.start < run.stop]
        keys, values = own[0] if len(own) == 1 else mx.concatenate(own, axis=2)
        outs.append(attend(queries[row : row + 1], keys[None], values[None], None, scale, sinks))
        mx.eval(outs[-1])
    return mx.concatenate(outs)
