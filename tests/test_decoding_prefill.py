"""The last token's logits from the prompt's own last pass, against the whole model's."""

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture, random_model
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.models.moe import MoE


@pytest.fixture(scope="module")
def models():
    return {
        "openelm": random_model(context_length=2048),
        "gpt-oss": load_fixture(FIXTURES / "gpt_oss_tiny"),
        "odd": load_fixture(FIXTURES / "gpt_oss_odd"),  # its last layer is a sliding one
        "demo-gpt-oss": om.load(short_demo("demo-gpt-oss"))[0],
    }


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", ["openelm", "gpt-oss", "odd", "demo-gpt-oss"])
@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 8), (2, 8), (7, 8), (8, 8), (9, 8), (15, 64), (16, 64), (17, 64), (40, 13)]
)
def test_equal_to_the_whole_model_and_followed_by_the_same(models, name, length, chunk):
    model = models[name]
    tokens = [(7 * i + 3) % min(200, model.spec.vocab_size) for i in range(length + 3)]
    whole = model(mx.array([tokens]))[0]
    cache = model.make_cache()
    seen = [prefill(model, tokens[:length], cache, chunk)]
    seen += [model(mx.array([token]), cache=cache)[0] for token in tokens[length:]]
    for logits, expected in zip(seen, whole[length - 1 :], strict=True):
        assert mx.abs(logits - expected).max().item() < 1e-4


@pytest.mark.parametrize(("name", "options"), [("openelm", {"window": 12}), ("demo-gpt-oss", {"kv_bits": 8})])
def test_over_other_caches(models, name, options):
    """As a pass of its own for the last token gives it, which `at_border` asks for."""
    model = models[name]
    tokens = [(7 * i + 3) % 200 for i in range(40)]
    caches = [model.make_cache(**options) for _ in range(2)]
    together = prefill(model, tokens, caches[0], 16)
    apart = prefill(model, tokens, caches[1], 16, at_border=lambda: None)
    assert mx.abs(together - apart).max().item() < 2e-3
    assert [layer.offset for layer in caches[0]] == [layer.offset for layer in caches[1]]


def test_the_last_layer_s_experts_compute_one_token(models, monkeypatch):
    model, rows = models["gpt-oss"], []
    real = MoE.__call__
    monkeypatch.setattr(
        MoE, "__call__", lambda self, x, dtype: rows.append(x.size // x.shape[-1]) or real(self, x, dtype)
    )
    prefill(model, list(range(30)), model.make_cache(), 512)
    assert rows == [30] * (len(model.layers) - 1) + [1]


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("slots", [4, 9])
def test_streamed_experts_give_the_same_bits(models, slots):
    streamed = om.load(short_demo("demo-gpt-oss"), expert_slots=slots)[0]
    tokens = list(range(100, 230))
    expected = prefill(models["demo-gpt-oss"], tokens, models["demo-gpt-oss"].make_cache(), 64)
    assert mx.array_equal(prefill(streamed, tokens, streamed.make_cache(), 64), expected)


def test_what_a_chunk_freed_is_given_back_before_the_next_one(models, monkeypatch):
    model, offsets = models["openelm"], []
    cache = model.make_cache()
    monkeypatch.setattr(mx, "clear_cache", lambda: offsets.append(cache[0].offset))
    prefill(model, list(range(3, 23)), cache, 8)
    assert offsets == [8, 16, 20]
