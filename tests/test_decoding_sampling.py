"""Sampling against slow NumPy forms, and the distributions that are really drawn."""

import math

import mlx.core as mx
import numpy as np
import pytest

from openelm_mlx.decoding import sampling
from openelm_mlx.decoding.sampling import (
    Sampler,
    SamplingParams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    unpacked,
)
from openelm_mlx.errors import SettingError

V = 50


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.fixture
def logits() -> mx.array:
    return mx.array(np.random.default_rng(1).normal(0, 2, V).astype(np.float32))


def kept(logits: mx.array) -> set[int]:
    return {i for i, value in enumerate(logits.tolist()) if value != -math.inf}


def test_greedy_takes_the_largest(logits):
    assert Sampler(SamplingParams(), V, V)(logits).item() == int(np.argmax(np.array(logits)))


@pytest.mark.parametrize("k", [1, 3, 49])
def test_top_k(logits, k):
    order = np.argsort(-np.array(logits))
    assert kept(keep_top_k(logits, k)) == set(order[:k].tolist())


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.7, 0.95, 0.9999])
def test_top_p(logits, p):
    probs = softmax(np.array(logits, dtype=np.float64))
    order, total, expected = np.argsort(-probs), 0.0, set()
    for token in order:
        if total >= p:
            break
        expected.add(int(token))
        total += probs[token]
    filtered = keep_top_p(logits, p)
    assert kept(filtered) == expected
    assert all(filtered[token].item() == logits[token].item() for token in expected)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 1.0])
def test_min_p(logits, fraction):
    probs = softmax(np.array(logits, dtype=np.float64))
    assert kept(keep_min_p(logits, fraction)) == set(
        np.flatnonzero(probs >= fraction * probs.max() * (1 - 1e-6)).tolist()
    )


def test_penalties_by_hand():
    """Token 1 in the prompt only, token 2 twice and token 3 once in the answer."""
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 100.0, 3: 0}
    )
    sampler = Sampler(params, 5, 5, [1, 1])
    assert sampler(mx.array([0.0, 1.0, 4.0, -4.0, 3.0])).item() == 2
    assert sampler(mx.array([0.0, 1.0, 4.0, -4.0, 3.0])).item() == 2
    sampler.params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert sampler(mx.array([0.0, 1.0, -4000.0, 900.0, 3.0])).item() == 3
    sampler._bias = None
    adjusted = sampler.adjusted(mx.array([0.0, 1.0, 4.0, -4.0, 3.0])).tolist()
    assert adjusted == [0.0, 0.5, 4 / 2 - 0.5 - 2 * 0.25, -4 * 2 - 0.5 - 0.25, 3.0]


def test_ids_beyond_the_tokenizer_are_never_chosen():
    logits = mx.concatenate([mx.zeros((10,)), mx.full((6,), 50.0)])
    assert Sampler(SamplingParams(), 16, 10)(logits).item() < 10
    sampler = Sampler(SamplingParams(temperature=5.0, seed=0), 16, 10)
    assert {sampler(logits).item() for _ in range(200)} <= set(range(10))


def test_a_forbidden_token(logits):
    best = int(np.argmax(np.array(logits)))
    assert Sampler(SamplingParams(logit_bias={best: -math.inf}), V, V)(logits).item() != best


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.3},
    ],
)
def test_drawn_frequencies_are_the_distribution_s(params):
    """1,500 draws: a chi-squared test at the 1e-6 level against the distribution computed in float64."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    scaled = logits / params["temperature"]
    probs = softmax(scaled)
    if "top_k" in params:
        probs[np.argsort(-probs)[params["top_k"] :]] = 0
    if "top_p" in params:
        order = np.argsort(-probs)
        probs[order[np.cumsum(probs[order]) - probs[order] >= params["top_p"]]] = 0
    if "min_p" in params:
        probs[probs < params["min_p"] * probs.max()] = 0
    probs /= probs.sum()
    sampler = Sampler(SamplingParams(**params, seed=11), 6, 6)
    draws = mx.stack([sampler(mx.array(logits)) for _ in range(1500)])
    counts = np.bincount(np.array(draws), minlength=6)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - 1500 * probs)[possible] ** 2 / (1500 * probs[possible])).sum()
    assert chi_squared < 36  # 5 degrees of freedom at most


def test_the_same_seed_draws_the_same_and_no_seed_does_not(logits):
    def draws(seed):
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), V, V)
        return [sampler(logits).item() for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_drawing_leaves_mlx_s_global_random_state_alone(logits):
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    Sampler(SamplingParams(temperature=1.0), V, V)(logits).item()
    assert mx.random.uniform(shape=(3,)).tolist() == expected


def test_log_probabilities(logits):
    expected = np.log(softmax(np.array(logits, dtype=np.float64)))
    logprob, top, top_logprobs = log_probabilities(logits, mx.array(7), 5)
    order = np.argsort(-expected)[:5]
    assert logprob.item() == pytest.approx(expected[7], abs=1e-5)
    assert top.tolist() == order.tolist()
    assert top_logprobs.tolist() == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert log_probabilities(logits, mx.array(7), 0)[1].size == 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "hot"}, {"top_k": -1},
        {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0.0},
        {"repetition_penalty": -1}, {"presence_penalty": math.nan}, {"frequency_penalty": 1e9}, {"seed": -1}, {"seed": 2**64},
        {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: math.nan}}, {"logit_bias": {1: math.inf}}, {"temperature": True},
    ],
)  # fmt: skip
def test_values_out_of_range(params):
    with pytest.raises(SettingError, match=next(iter(params))):
        SamplingParams(**params)


def test_a_bias_on_a_token_that_does_not_exist():
    with pytest.raises(SettingError, match="token 60"):
        Sampler(SamplingParams(logit_bias={60: 1.0}), 64, 50)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(), SamplingParams(temperature=0.8, seed=3, top_k=5), SamplingParams(logit_bias={4: 9.0}),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("vocab_size", [64, 70])  # whole words of the mask, and not
def test_a_choice_under_a_mask_compiled_is_the_plain_one(params, vocab_size, monkeypatch):
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(6, vocab_size)).astype(np.float32))
    words = [mx.array(rng.integers(1, 2**32, -(-vocab_size // 32), np.uint32)) for _ in range(6)]
    chosen = []
    for on_cpu in (True, False):
        monkeypatch.setattr(sampling, "runs_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        sampler, tokens = Sampler(params, vocab_size, vocab_size, [1, 2]), []
        for each, mask in zip(logits, words, strict=True):
            token = sampling.choice_among(sampler, each, mask)
            assert unpacked(mask, vocab_size)[token].item()
            tokens.append(token.item())
        chosen.append(tokens)
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) > 1
