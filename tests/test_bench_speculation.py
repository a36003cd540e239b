"""The measurement of guessing: its formula, and that it counts what happens."""

import pytest
from conftest import FIXTURES, load_fixture

import openelm_mlx as om
from openelm_mlx.bench.speculation import SpeculationResult, measure_speculation


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


def test_it_counts_what_happened():
    model, twin = load_fixture(FIXTURES / "gpt_oss_tiny"), load_fixture(FIXTURES / "gpt_oss_tiny")
    found = measure_speculation(model, om.DraftModel(twin), [[3, 4, 5, 6] * 6], max_tokens=21, repetitions=1)
    assert (found.num_tokens, found.rounds, found.drafted_tokens, found.accepted_tokens) == (20, 4, 16, 16)
    assert min(found.plain_tps, found.always_tps, found.speculative_tps, found.draft_ms, found.verify_ms) > 0
