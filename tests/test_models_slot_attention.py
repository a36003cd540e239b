"""The attention kernel for slots: its text against MLX's own operations, and how it is called."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_difference
from slot_kernel_on_cpu import attend_on_cpu

from openelm_mlx.models import slot_attention
from openelm_mlx.models.attention import attend
from openelm_mlx.models.slot_attention import attend_in_slots, attend_with_mask, heads_together


def case(slots=3, heads=6, kv_heads=2, columns=40, head_dim=32, has_sinks=True):
    """Queries as a projection leaves them, before the keys; requests that have gone round, that have not, and an empty slot."""
    draw = np.random.default_rng(heads)
    queries = draw.standard_normal((slots, heads + kv_heads, 1, head_dim)).astype(np.float32)[:, :heads]
    buffer = draw.standard_normal((2, slots, kv_heads, columns, head_dim)).astype(np.float32)
    state = np.array([5, *[columns + 9, 17, 0, columns - 1][:slots]], np.int32)
    sinks = draw.standard_normal(heads).astype(np.float32) if has_sinks else None
    return queries, buffer, state, 0.2, sinks


def arrays(given):
    return [each if each is None or isinstance(each, float) else mx.array(each) for each in given]


@pytest.mark.parametrize(
    ("language", "sizes"),
    [
        ("Metal", {"slots": 2, "heads": 12, "columns": 20}),
        pytest.param("CUDA", {"slots": 4}, marks=pytest.mark.slow),
        pytest.param("CUDA", {"heads": 4, "kv_heads": 4, "columns": 9, "has_sinks": False}, marks=pytest.mark.slow),
        pytest.param("Metal", {"heads": 16, "columns": 70, "head_dim": 64}, marks=pytest.mark.slow),
        pytest.param("CUDA", {"heads": 5, "kv_heads": 1, "head_dim": 128, "has_sinks": False}, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_attention_with_a_mask(language, sizes, tmp_path):
    """Compiled by the machine's C++ compiler: there is no GPU where these tests run."""
    queries, buffer, state, scale, sinks = case(**sizes)
    found = attend_on_cpu(tmp_path, language, queries, buffer, state, scale, sinks, 2)
    assert max_difference(mx.array(found), np.array(attend_with_mask(*arrays(case(**sizes))))) <= 2e-6


def test_each_slot_sees_its_own_columns():
    """The mask against each request's tokens gathered one by one."""
    queries, buffer, state, scale, sinks = arrays(case(slots=4))
    found = attend_with_mask(queries, buffer, state, scale, sinks)
    newest, *lengths = state.tolist()
    columns = buffer.shape[3]
    for slot, length in enumerate(lengths):
        ages = range(min(length + 1, columns))
        own = mx.array([(newest - age) % columns for age in ages])
        keys, values = (part[slot : slot + 1, :, own] for part in buffer)
        known = attend(queries[slot : slot + 1], keys, values, None, scale, sinks)
        assert max_difference(found[slot : slot + 1], np.array(known)) <= 1e-6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "together"), [(8, 1, 4), (16, 4, 4), (6, 2, 3), (5, 5, 1), (10, 2, 1), (12, 2, 3)]
)
def test_heads_go_through_keys_together(heads, kv_heads, together):
    assert heads_together(heads, kv_heads) == together


@pytest.mark.parametrize("has_sinks", [False, True])
def test_how_the_kernel_is_called(monkeypatch, has_sinks):
    calls = []

    def kernel(scale, with_sinks):
        assert (scale, with_sinks) == (0.2, has_sinks)
        return lambda **given: calls.append(given) or [mx.zeros(given["output_shapes"][0], given["output_dtypes"][0])]

    monkeypatch.setattr(slot_attention, "_kernel", kernel)
    monkeypatch.setattr(slot_attention, "runs_on_cpu", lambda: False)
    queries, buffer, state, scale, sinks = arrays(case(heads=12, has_sinks=has_sinks))
    assert attend_in_slots(queries, buffer, state, scale, sinks).shape == queries.shape
    (given,) = calls
    assert given["inputs"] == [queries, buffer, state, *([sinks] if has_sinks else [])]
    assert dict(given["template"]) == {"T": mx.float32, "D": 32, "G": 6, "GB": 3, "W": 8}
    assert given["grid"] == (256, 4, 3)
    assert given["threadgroup"] == (256, 1, 1)


def test_other_sizes_of_heads_take_the_mask(monkeypatch):
    monkeypatch.setattr(slot_attention, "_kernel", pytest.fail)
    monkeypatch.setattr(slot_attention, "runs_on_cpu", lambda: False)
    given = arrays(case(head_dim=48))
    with monkeypatch.context() as patch:
        patch.setattr(slot_attention, "attend", lambda *found: found)  # which would ask the GPU
        assert attend_in_slots(*given)[0] is given[0]


def test_both_languages_have_the_same_names():
    names = [
        {line.split("(")[0].split()[1] for line in text.splitlines() if "#define" in line}
        for text in (slot_attention.CUDA, slot_attention.METAL)
    ]
    assert names[0] == names[1]
    assert all(name in slot_attention.SOURCE for name in names[0])
