"""The measurement of guessing: its formula, and that it counts what happens."""

import json

import mlx.core as mx
import pytest
from conftest import FIXTURES, load_fixture
from mlx.utils import tree_flatten

import openelm_mlx as om
from benchmarks.measurements.speculation import SpeculationResult, made_pair, measure_speculation
from benchmarks.speculation import main
from openelm_mlx.checkpoint.layouts import Parameter


def result(**changes):
    values = {
        "plain_tps": 100.0, "always_tps": 150.0, "speculative_tps": 180.0, "num_tokens": 100, "rounds": 20,
        "drafted_tokens": 80, "accepted_tokens": 60, "plain_ms": 10.0, "draft_ms": 5.0, "verify_ms": 15.0,
    }  # fmt: skip
    return SpeculationResult(**{**values, **changes})


def test_the_formula():
    """80 tokens come in 20 rounds of 20 ms and 20 by plain steps: 600 ms where plain steps take 1,000."""
    assert result().allowed_gain == pytest.approx(1000 / 600)
    assert result().efficiency == pytest.approx(1.8 / (1000 / 600))
    assert result(accepted_tokens=0).allowed_gain == 1.0  # it would lose, so it is left off


@pytest.mark.slow
def test_it_counts_what_happened():
    model, twin = load_fixture(FIXTURES / "gpt_oss_tiny"), load_fixture(FIXTURES / "gpt_oss_tiny")
    found = measure_speculation(model, om.DraftModel(twin), [[3, 4, 5, 6] * 6], max_tokens=21, repetitions=1)
    assert (found.num_tokens, found.rounds, found.drafted_tokens, found.accepted_tokens) == (20, 4, 16, 16)
    assert min(found.plain_tps, found.always_tps, found.speculative_tps, found.draft_ms, found.verify_ms) > 0


def test_a_made_pair_says_the_same_in_more_layers_and_nearly_the_same_in_fewer_bits():
    model, _ = om.load("demo-openelm", dtype="float32")
    larger, smaller = made_pair(model, times=3)
    tokens = mx.array([[5, 60, 700, 80, 9]])
    expected = model(tokens)
    assert len(larger.layers) == 3 * len(model.layers)
    assert mx.abs(larger(tokens) - expected).max().item() < 1e-3
    assert 0.01 < mx.abs(smaller(tokens) - expected).max().item() < 0.5 * mx.abs(expected).max().item()


def test_a_pair_of_a_packed_model():
    model, _ = om.load("demo-openelm", dtype="bfloat16")  # as on a GPU: packed as it is stored
    assert any(name.endswith("scales") for name, _ in tree_flatten(model.parameters()))
    larger, _ = made_pair(model, times=2)
    tokens = mx.array([[5, 60, 700]])
    difference = mx.abs(larger(tokens).astype(mx.float32) - model(tokens).astype(mx.float32))
    assert mx.mean(difference).item() < 0.1 * mx.std(model(tokens).astype(mx.float32)).item()


def test_the_command(monkeypatch, capsys):
    asked = []

    def measured(model, draft, prompts, max_tokens, repetitions):
        asked.append((len(model.layers), type(draft).__name__, len(prompts), max_tokens, repetitions))
        return result(speculative_tps=160.0)

    monkeypatch.setattr("benchmarks.measurements.speculation.measure_speculation", measured)
    assert main(["--rounds", "2", "--completion-tokens", "9"]) == 0
    assert asked == [(32, "PromptLookup", 6, 9, 2), (32, "DraftModel", 6, 9, 2)]
    out = capsys.readouterr().out
    assert "1.60 times; 1.67 times is what costs and acceptance allow, so 96% of it" in out
    assert "60 of 80 guesses right" in out
    monkeypatch.setattr(
        "benchmarks.measurements.speculation.measure_speculation", lambda *_: result(speculative_tps=120.0)
    )
    assert main(["--json", "--model", "demo-gpt-oss"]) == 1
    assert json.loads(capsys.readouterr().out)["results"]["looked up"]["efficiency"] < 0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--draft-model demo-gpt-oss", "must share the tokenizer"), ("--draft-model /no/such/model", "/no/such/model"),
        ("--rounds 0", "--rounds is 0: it must be at least 1"),
        ("--completion-tokens 1", "--completion-tokens is 1: it must be at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_a_tensor_is_read(capsys, monkeypatch, options, said):
    monkeypatch.setattr(Parameter, "read", lambda *_: pytest.fail("a tensor was read"))
    assert main(options.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1
