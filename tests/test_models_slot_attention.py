"""The attention kernel for slots: its text against MLX's own operations, and how it is called."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_difference
from slot_kernel_on_cpu import attend_on_cpu, write_on_cpu

from openelm_mlx.models import slot_attention
from openelm_mlx.models.attention import attend
from openelm_mlx.models.slot_attention import attend_in_slots, attend_with_mask, heads_together


def case(slots=3, heads=6, kv_heads=2, columns=40, head_dim=32, has_sinks=True, more=(), window=None):
    """Queries as a projection leaves them, before the keys; requests that have gone round, that have not, and an empty slot.

    more: rows beside those of the slots, (slot, position) each.
    """
    draw = np.random.default_rng(heads)
    rows = np.array([*enumerate([columns + 9, 17, 0, columns - 1][:slots]), *more], np.int32)
    queries = draw.standard_normal((len(rows), heads + kv_heads, 1, head_dim)).astype(np.float32)[:, :heads]
    buffer = draw.standard_normal((2, slots, kv_heads, columns, head_dim)).astype(np.float32)
    sinks = draw.standard_normal(heads).astype(np.float32) if has_sinks else None
    return queries, buffer, rows, 0.2, sinks, window


def arrays(given):
    return [mx.array(each) if isinstance(each, np.ndarray) else each for each in given]


@pytest.mark.parametrize(
    ("language", "sizes"),
    [
        ("Metal", {"slots": 2, "heads": 12, "columns": 20, "more": [(1, 18), (1, 19), (0, 30)], "window": 11}),
        pytest.param("CUDA", {"slots": 4, "more": [(2, 1)]}, marks=pytest.mark.slow),
        pytest.param("CUDA", {"heads": 4, "kv_heads": 4, "columns": 9, "has_sinks": False}, marks=pytest.mark.slow),
        pytest.param("Metal", {"heads": 16, "columns": 70, "head_dim": 64}, marks=pytest.mark.slow),
        pytest.param("CUDA", {"heads": 5, "kv_heads": 1, "head_dim": 128, "has_sinks": False}, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_attention_with_a_mask(language, sizes, tmp_path):
    """Compiled by the machine's C++ compiler: there is no GPU where these tests run."""
    found = attend_on_cpu(tmp_path, language, *case(**sizes), 2)
    assert max_difference(mx.array(found), np.array(attend_with_mask(*arrays(case(**sizes))))) <= 2e-6


@pytest.mark.parametrize("language", ["Metal", "CUDA"])
def test_the_other_kernel_writes_what_a_scatter_does(language, tmp_path):
    """Into the buffer itself: more rows than a threadgroup has threads for, some of one slot, some beyond the end."""
    slots, kv_heads, columns, head_dim = 5, 3, 20, 64
    draw = np.random.default_rng(2)
    buffer = draw.standard_normal((2, slots, kv_heads, columns, head_dim)).astype(np.float32)
    rows = np.array([*enumerate([33, 0, 19, 7, 40]), (0, 34), (3, 8)], np.int32)
    heads = draw.standard_normal((len(rows), 4 + 2 * kv_heads, head_dim)).astype(np.float32)
    expected = buffer.copy()
    for (slot, position), new in zip(rows, heads[:, 4:], strict=True):
        expected[:, slot, :, position % columns] = new.reshape(2, kv_heads, head_dim)
    write_on_cpu(tmp_path, language, buffer, heads[:, 4:], rows)
    assert np.array_equal(buffer, expected)


def test_how_it_is_called(monkeypatch):
    """One thread for eight numbers; what it gives is waited for, and the buffer is none of its outputs."""
    calls = []
    monkeypatch.setattr(
        slot_attention,
        "_write_kernel",
        lambda: lambda **given: calls.append(given) or [mx.zeros(given["output_shapes"][0])],
    )
    buffer, new, rows = mx.zeros((2, 5, 3, 20, 64)), mx.zeros((9, 6, 64)), mx.zeros((9, 2), mx.int32)
    assert slot_attention.write_in_slots(buffer, new, rows).shape == (1,)
    (given,) = calls
    assert [id(each) for each in given["inputs"]] == [id(new), id(buffer), id(rows)]
    assert dict(given["template"]) == {"T": mx.float32, "D": 64, "THREADS": 256}
    assert given["grid"] == (2 * 256, 1, 1)  # 9 rows of 6 heads of 8 threads
    assert given["threadgroup"] == (256, 1, 1)


@pytest.mark.parametrize("window", [None, 13])
def test_each_row_sees_its_own_columns(window):
    """The mask against each token's keys gathered one by one."""
    given = case(slots=4, more=[(1, 18), (1, 19), (3, 40), (0, 50)], window=window)
    queries, buffer, rows, scale, sinks, _ = arrays(given)
    found = attend_with_mask(queries, buffer, rows, scale, sinks, window)
    columns = buffer.shape[3]
    for row, (slot, position) in enumerate(rows.tolist()):
        first = max(0, position + 1 - columns, 0 if window is None else position + 1 - window)
        own = mx.array([each % columns for each in range(first, position + 1)])
        keys, values = (part[slot : slot + 1, :, own] for part in buffer)
        known = attend(queries[row : row + 1], keys, values, None, scale, sinks)
        assert max_difference(found[row : row + 1], np.array(known)) <= 1e-6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "together"), [(8, 1, 4), (16, 4, 4), (6, 2, 3), (5, 5, 1), (10, 2, 1), (12, 2, 3)]
)
def test_heads_go_through_keys_together(heads, kv_heads, together):
    assert heads_together(heads, kv_heads) == together


@pytest.mark.parametrize("has_sinks", [False, True])
def test_how_the_kernel_is_called(monkeypatch, has_sinks):
    calls = []

    def kernel(scale, with_sinks, window):
        assert (scale, with_sinks, window) == (0.2, has_sinks, 9)
        return lambda **given: calls.append(given) or [mx.zeros(given["output_shapes"][0], given["output_dtypes"][0])]

    monkeypatch.setattr(slot_attention, "_kernel", kernel)
    monkeypatch.setattr(slot_attention, "runs_on_cpu", lambda: False)
    queries, buffer, rows, scale, sinks, window = arrays(case(heads=12, has_sinks=has_sinks, more=[(0, 50)], window=9))
    assert attend_in_slots(queries, buffer, rows, scale, sinks, window).shape == queries.shape
    given = calls[0]
    assert given["inputs"] == [queries, buffer, rows, rows, *([sinks] if has_sinks else [])]
    written = mx.zeros(1)
    attend_in_slots(queries, buffer, rows, scale, sinks, window, written)
    assert calls[1]["inputs"][3] is written
    assert dict(given["template"]) == {"T": mx.float32, "D": 32, "G": 6, "GB": 3, "W": 8}
    assert given["grid"] == (256, 4, 4)
    assert given["threadgroup"] == (256, 1, 1)


def test_other_sizes_of_heads_take_the_mask(monkeypatch):
    monkeypatch.setattr(slot_attention, "_kernel", pytest.fail)
    monkeypatch.setattr(slot_attention, "runs_on_cpu", lambda: False)
    given = arrays(case(head_dim=48))
    with monkeypatch.context() as patch:
        patch.setattr(slot_attention, "attend_with_mask", lambda *found: found)  # which would ask the GPU
        assert attend_in_slots(*given)[0] is given[0]


def test_both_languages_have_the_same_names():
    names = [
        {line.split("(")[0].split()[1] for line in text.splitlines() if "#define" in line}
        for text in (slot_attention.CUDA, slot_attention.METAL)
    ]
    assert names[0] == names[1]
    assert all(name in slot_attention.SOURCE + slot_attention.WRITE for name in names[0])
