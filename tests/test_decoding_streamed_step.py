"""The step that looks at several layers at once: when it waits, what it does again, and that nothing else changes."""

import functools

import mlx.core as mx
import numpy as np
import pytest

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.decoding.compiled_step import CompiledStep
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.decoding.streamed_step import StreamedStep
from openelm_mlx.experts.pace import Pace, best_stride

CONFIG = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 6, "num_local_experts": 8, "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
    "eos_token_id": 319,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_gpt_oss(tmp_path_factory.mktemp("step") / "random", CONFIG)


def test_with_everything_there_it_waits_once_a_token(folder):
    model, _ = om.load(folder, dtype="float32", expert_slots=8)
    list(om.stream_generate(model, None, list(range(60)), max_tokens=40))  # every expert has come
    cache = model.make_cache()
    prefill(model, [1, 2, 3], cache, 512)
    step = StreamedStep(model, cache, 6)
    model.residency.reset_statistics()
    for token in range(10):
        mx.eval(step(mx.array(token)))
    found = model.residency.statistics()
    assert (found.read_backs, found.misses, step.replayed_layers) == (10, 0, 0)
    assert found.hits == 10 * 6 * 4


def test_the_plain_form_waits_at_every_layer_and_computes_nothing_again(folder):
    model, _ = om.load(folder, dtype="float32", expert_slots=4)
    cache = model.make_cache()
    prefill(model, [1, 2, 3], cache, 512)
    step = StreamedStep(model, cache, 1)
    model.residency.reset_statistics()
    for token in range(10):
        mx.eval(step(mx.array(token)))
    found = model.residency.statistics()
    assert (found.read_backs, step.replayed_layers) == (60, 0)
    assert found.misses > 40
    assert found.hits + found.misses == 10 * 6 * 4  # each layer counted once a token


def test_a_layer_is_counted_once_whatever_was_done_again(folder):
    model, _ = om.load(folder, dtype="float32", expert_slots=4)
    cache = model.make_cache()
    prefill(model, [1, 2, 3], cache, 512)
    step = StreamedStep(model, cache, 6)
    model.residency.reset_statistics()
    for token in range(10):
        mx.eval(step(mx.array(token)))
    found = model.residency.statistics()
    assert step.replayed_layers > 50
    assert found.hits + found.misses == 10 * 6 * 4
    assert [layer.offset for layer in cache] == [13] * 6


def cost_by_trial(stride, miss_rate, read_back_cost, random, trials=20000):
    """Mean cost of a confirmed layer, by drawing misses."""
    missing = random.random((trials, stride)) < miss_rate
    first = np.where(missing.any(1), missing.argmax(1), stride - 1)
    return (trials * read_back_cost + (stride - 1 - first).sum()) / (first + 1).sum()


@pytest.mark.parametrize("miss_rate", [0.6, 0.2, 0.05])
def test_the_stride_is_the_cheapest(miss_rate):
    random = np.random.default_rng(0)
    costs = {stride: cost_by_trial(stride, miss_rate, 0.5, random) for stride in range(1, 24)}
    chosen = best_stride(miss_rate, 0.5)
    assert costs[chosen] <= min(costs.values()) * 1.03
    assert 1 < best_stride(0.05, 0.5) < best_stride(0.05, 5.0)
    assert best_stride(1.0, 0.5) == 1
    assert best_stride(0.0, 0.5, most=36) == 36


def test_the_pace_follows_the_misses():
    pace = Pace(read_back_cost=0.5)
    for _ in range(500):
        pace.saw(False)
    assert pace.next(0, 24) == pace.next(8, 24) == 24
    for _ in range(500):
        pace.saw(True)
    assert pace.next(3, 24) == 4
    assert Pace(5).next(3, 24) == 8
    assert Pace(5).next(22, 24) == 24


def test_sampled_text_with_log_probabilities(folder):
    known, _ = om.load(folder, dtype="float32")
    model, _ = om.load(folder, dtype="float32", expert_slots=5)
    sampling = om.SamplingParams(temperature=0.8, top_p=0.9, seed=11, repetition_penalty=1.1)
    first, second = (
        [(c.token, c.logprob, c.top_logprobs) for c in om.stream_generate(
            each, None, [5, 6, 7], max_tokens=30, sampling=sampling, logprobs=2)]
        for each in (known, model)
    )  # fmt: skip
    assert first == second


@pytest.mark.parametrize("options", [{"sliding_window": 12}, {"kv_bits": 8}])
def test_caches_of_other_kinds_take_a_token_back(folder, options):
    """Rings of the full layers, and keys in 8 bits, are rewound before a layer runs again."""
    config = {**CONFIG, "head_dim": 64} if "kv_bits" in options else CONFIG
    place = folder if config is CONFIG else write_random_gpt_oss(folder.parent / "wide", config)
    known, _ = om.load(place, dtype="float32")
    model, _ = om.load(place, dtype="float32", expert_slots=4)
    for each in (known, model):
        each.tokens = [c.token for c in om.stream_generate(each, None, list(range(20)), max_tokens=30, **options)]
    assert known.tokens == model.tokens


def test_compiled_it_is_the_compiled_resident_step(folder):
    """As on a GPU, where both are compiled: bit for bit, whatever is missing and however many layers are looked at."""

    def logits_of(model, make):
        cache = model.make_cache()
        prefill(model, list(range(20)), cache, 512)
        step = make(model, cache)
        return mx.stack([step(mx.array(7 * token % 300)) for token in range(12)])

    known, _ = om.load(folder, dtype="float32")
    model, _ = om.load(folder, dtype="float32", expert_slots=5)
    expected = logits_of(known, functools.partial(CompiledStep, compile=True))
    for layers_at_once in (1, 3, None):
        make = functools.partial(StreamedStep, layers_at_once=layers_at_once, compile=True)
        assert mx.array_equal(logits_of(model, make), expected)
    assert model.residency.statistics().misses > 0
