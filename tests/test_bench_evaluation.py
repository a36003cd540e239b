"""The measurement of scoring: both sides answer alike, and its command reports them."""

import json

import pytest

pytest.importorskip("lm_eval", reason="mlx-lm's evaluator needs it")

from benchmarks.evaluation import main
from benchmarks.measurements.evaluation import Rates, measure, questions


def test_both_sides_answer_alike():
    found = measure("demo-openelm", 2, few_shot_tokens=10, rounds=1)
    assert found.difference < 1e-3
    assert found.num_tokens < sum(len(each.inputs) for choices in questions(4000, 2, 10) for each in choices)
    assert len(found.ours) == len(found.theirs) == 1


def test_the_ratio_is_of_medians():
    rates = Rates("x", 1, 0, (1.0, 2.0, 9.0), (4.0, 5.0, 6.0), (1.0,), (3.0,), 10, 1, 0.0, 5)
    assert rates.ratio == 2.5
    assert rates.cpu_ratio == 3
    assert "2.50 times" in rates.line()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.measurements.evaluation.measure",
        lambda *given: Rates(given[0], given[1], given[2], (1.0,), (3.0,), (1.0,), (3.0,), 10, 1, 0.0, 5),
    )
    assert main(["--questions", "3", "--few-shot-tokens", "0,50", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["few_shot_tokens"] for row in rows] == [0, 50]
    assert rows[0]["ratio"] == 3
    assert main(["--questions", "0"]) == 2
    assert main(["--few-shot-tokens", "x"]) == 2
