"""`python -m benchmarks.training` runs on a tiny scale: what it prints, not how fast it is."""

import json

import pytest

from benchmarks import training
from benchmarks.command import run_benchmark

SMALL = ["--rows", "2", "--length", "8", "--mixed", "8", "--long", "24", "--rounds", "1", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo-openelm"])
def test_it_measures_both_trainers(model, capsys):
    arguments = ["--model", model, *SMALL]
    assert run_benchmark("training", training.HELP, training.add_arguments, training.run, arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["unit"] for row in rows] == ["tokens/s", "tokens/s", "MB"]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    assert "places filled" in rows[1]["note"]


def test_a_mistake_is_one_sentence(capsys):
    assert run_benchmark("training", training.HELP, training.add_arguments, training.run, ["--rows", "0"]) == 2
    assert "--rows is 0" in capsys.readouterr().err
