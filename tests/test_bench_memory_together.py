"""The benchmark of planned beside used for several requests at once: a row of a small mixture, and its mistakes."""

import json

import pytest

from benchmarks import memory_together
from benchmarks.memory_together import MIXTURES, Mixture, main


def test_a_row_has_the_parts_of_its_plan_and_is_near_to_it(monkeypatch, capsys):
    found = memory_together.measure
    monkeypatch.setitem(MIXTURES, "tiny", Mixture("demo-gpt-oss", [(70, 12)] * 3))
    monkeypatch.setattr(
        "openelm_mlx.bench.fresh.run_fresh", lambda module, flag, name, source, what: found(name, source)
    )
    assert main(["--only", "tiny", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["requests"] == 3
    assert row["planned"] == row["weights"] + row["keys_values"] + row["computing"]
    assert row["ratio"] == row["planned"] / row["used"]
    # Other tests' models may be in this process, too; what is planned for is never less than the plan's own parts.
    assert row["used"] >= row["weights"] + row["keys_values"]
    assert row["ratio"] < 1.2


@pytest.mark.parametrize("options", [["--only", "llama"], ["--folder", "nothing/here"]])
def test_mistakes_are_sentences(options, capsys):
    assert main(options) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
