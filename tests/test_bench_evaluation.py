"""The measurement of scoring: both sides answer alike, and its command reports them."""

import importlib.util
import json
import sys

import mlx.core as mx
import pytest
from short_demos import short_demo

from benchmarks.evaluation import main
from benchmarks.measurements import evaluation
from benchmarks.measurements.evaluation import Rates, measure, models, questions
from openelm_mlx.conversion import convert

# Not importorskip: each process of the tests would import it, which takes four seconds.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm's evaluator is the other side"
)


@pytest.fixture
def no_harness(monkeypatch):
    """As on a machine where lm-evaluation-harness is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "mlx_lm.evaluate"]:
        monkeypatch.delitem(sys.modules, name)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else there(name))


@pytest.mark.usefixtures("no_harness")
def test_both_sides_answer_alike_without_the_harness_installed(monkeypatch):
    demo = short_demo("demo-openelm")
    monkeypatch.setattr(evaluation, "convert", lambda name, place, **options: convert(demo, place, **options))
    notes = []
    found = measure("demo-openelm", 2, few_shot_tokens=10, rounds=1, note=notes.append)
    assert "lm_eval" not in sys.modules  # neither it nor what stood in for it
    assert found.difference < 1e-3
    assert found.num_tokens < sum(len(each.inputs) for choices in questions(4000, 2, 10) for each in choices)
    assert len(found.ours) == len(found.theirs) == 1
    assert found.answered == (2,)
    assert [each.split(": ")[1].split()[0] for each in notes[1:]] == ["ours", "mlx-lm"]  # before all is done
    del sys.modules["mlx_lm.evaluate"]  # made of what stood in


def test_both_sides_of_gpt_oss_have_the_same_weights():
    """One token: of more the angles differ, since mlx-lm rounds YaRN's bounds."""
    ours, theirs, _ = models("demo-gpt-oss")
    tokens = mx.array([[700]])
    assert mx.allclose(ours(tokens), theirs(tokens), rtol=0, atol=1e-3)


def test_their_side_ends_when_its_time_is_over(monkeypatch):
    class Evaluator:
        def loglikelihood(self, pairs):
            return [(0.0, False) for _ in pairs]

    monkeypatch.setattr(evaluation, "QUESTIONS_AT_ONCE", 2)
    asked = questions(100, 5)
    assert len(evaluation._their_answers(Evaluator(), asked)) == 20
    assert len(evaluation._their_answers(Evaluator(), asked, seconds=0)) == 8


def test_the_ratio_is_of_medians_of_what_a_question_takes():
    rates = Rates("x", 2, 0, (1.0, 2.0, 9.0), (4.0, 5.0, 6.0), (2, 2, 2), (1.0,) * 3, (3.0,) * 3, 10, 1, 0.0, 5)
    assert rates.ratio == 2.5
    assert rates.cpu_ratio == 3
    assert "2.50 times" in rates.line()
    rates = Rates("x", 2, 0, (1.0, 2.0, 9.0), (4.0, 5.0, 6.0), (1, 1, 1), (1.0,) * 3, (3.0,) * 3, 10, 1, 0.0, 5)
    assert rates.ratio == 5
    assert "5.00 s for 1 of them" in rates.line()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.measurements.evaluation.measure",
        lambda *given, **_: Rates(given[0], given[1], given[2], (1.0,), (3.0,), (3,), (1.0,), (3.0,), 10, 1, 0.0, 5),
    )
    assert main(["--questions", "3", "--few-shot-tokens", "0,50", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["few_shot_tokens"] for row in rows] == [0, 50]
    assert rows[0]["ratio"] == 3
    assert main(["--questions", "0"]) == 2
    assert main(["--few-shot-tokens", "x"]) == 2
    assert main(["--seconds", "nan"]) == 2
