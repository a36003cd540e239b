"""The planner's figures beside real runs: of a tiny shape, in processes of its own."""

import json

import pytest
from test_bench_against import SMALL

from benchmarks.memory import main
from openelm_mlx.bench import memory
from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config


@pytest.fixture
def shapes(monkeypatch):
    tiny = {
        "tiny gpt-oss": {**released_gpt_oss_config("20b"), **SMALL},
        "thin OpenELM": {**shape_config("openelm-270m", 1), "vocab_size": 4000},
    }
    monkeypatch.setattr(memory, "SHAPES", tiny)


@pytest.mark.slow
def test_a_row_for_each_shape_and_prompt(shapes, capsys, tmp_path):
    assert main(["--prompt-tokens", "8,20", "--folder", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["shape"], row["prompt"]) for row in found["rows"]] == [
        (shape, prompt) for shape in ("tiny gpt-oss", "thin OpenELM") for prompt in (8, 20)
    ]
    for row in found["rows"]:
        assert row["weights"] < row["peak"] < row["peak_process"]
        assert row["ratio"] == row["planned"] / row["peak"] > 0.8
    assert not list(tmp_path.iterdir())


def test_what_would_take_minutes_on_a_cpu_is_left_out_but_the_first(shapes, monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "MOST_MACS_ON_CPU", 1)
    monkeypatch.setattr(
        memory, "_in_a_fresh_process", lambda path, n, calibrated: seen.append(n) or dict.fromkeys(NUMBERS, 1)
    )
    assert [row.prompt for row in memory.rows(["tiny gpt-oss"], [30, 10], True)] == [30] == seen
    assert [row.prompt for row in memory.rows(["tiny gpt-oss"], [30, 10], False)] == [30, 10]


NUMBERS = ("weights", "scratch", "planned", "peak", "planned_process", "peak_process")


def test_the_table_for_people(shapes, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_in_a_fresh_process", lambda *_: dict.fromkeys(NUMBERS, 2_000_000))
    assert main(["--only", "tiny", "--prompt-tokens", "8"]) == 0
    machine, heading, row = capsys.readouterr().out.splitlines()
    assert machine
    assert heading.split()[:3] == ["shape", "prompt", "planned"]
    assert row.split() == ["tiny", "gpt-oss", "8", "2.0", "2.0", "1.000", "2.0", "2.0", "1.000"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "llama"], "'llama'"), (["--prompt-tokens", "0"], "'0'"), (["--prompt-tokens", "8,x"], "'8,x'"),
        (["--folder", "/no/such/folder"], "/no/such/folder"),
    ],
)  # fmt: skip
def test_bad_wishes_are_one_sentence(shapes, capsys, options, said):
    assert main(options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
