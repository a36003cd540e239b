"""What fewer bits do to a model: the figures of real runs of few tokens, and the table that a plan reads."""

import csv
import math

import mlx.core as mx
import pytest
from test_bench_against import SMALL

from benchmarks import quality as command
from benchmarks.measurements import quality
from benchmarks.measurements.quality import (
    COLUMNS,
    HEADING,
    WORDS,
    Divergence,
    demo_divergences,
    divergence,
    random_divergences,
)
from benchmarks.quality import main
from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config

ROW = Divergence("demo-openelm", "answers", 4, 100, 0.01, 0.5, 0.98, 0.2)


@pytest.mark.slow
def test_fewer_bits_move_a_demo_further(monkeypatch):
    monkeypatch.setattr(quality, "ANSWER_TOKENS", 6)
    found = list(demo_divergences("demo-openelm", (8, 4), WORDS[:1]))
    assert [(row.text, row.bits) for row in found] == [(text, bits) for bits in (8, 4) for text in quality.TEXTS]
    for eight, four in zip(found[:2], found[2:], strict=True):
        assert 0 < eight.kl < four.kl <= four.largest_kl
        assert 0 < eight.logits_error < four.logits_error < 1
        assert eight.positions == four.positions <= 6


@pytest.mark.parametrize("shape", ["gpt-oss-20b", "openelm-270m"])
def test_random_models_of_a_shape(shape, monkeypatch):
    made = (
        {**released_gpt_oss_config("20b"), **SMALL} if "gpt" in shape else {**shape_config(shape, 1), "vocab_size": 640}
    )
    monkeypatch.setattr(quality, "shape_config", lambda *_: made)
    monkeypatch.setattr(quality, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(quality, "FEW_ROWS", 320)
    eight, four = random_divergences(shape, 1, (8, 4))
    assert (eight.model, eight.text, eight.positions) == (f"{shape}, 1 layers", "random", 12)
    assert 0 < eight.logits_error < four.logits_error


@pytest.fixture
def measured(monkeypatch):
    """What was to be measured; each gives one row."""
    seen = []
    monkeypatch.setattr(quality, "demo_divergences", lambda source, words: seen.append((source, words)) or [ROW])
    monkeypatch.setattr(quality, "random_divergences", lambda shape, layers: seen.append((shape, layers)) or [ROW])
    return seen


def test_the_rows_for_people(measured, capsys):
    assert main([]) == 0
    assert measured == [("demo-gpt-oss", WORDS[:2]), ("demo-openelm", WORDS[:2])]
    assert capsys.readouterr().out.splitlines() == [HEADING, ROW.line(), ROW.line()]


def test_the_table_for_plans(measured, capsys, tmp_path):
    table = tmp_path / "quality.tsv"
    for options, count in (("--words 3 --all", 5), ("--words 1", 2)):  # a table of ours may be replaced
        assert main([*options.split(), "--table", str(table)]) == 0
        rows = list(csv.DictReader(table.open(), delimiter="\t"))
        assert "\t".join(rows[0]) == COLUMNS
        assert [row["command"] for row in rows] == [f"python -m benchmarks.quality {options}"] * count
    assert measured[2:5] == list(command.WIDTHS.items())


@pytest.mark.parametrize("words", [0, -1, len(WORDS) + 1])
def test_words_that_there_are(words, measured, capsys):
    assert main([f"--words={words}"]) == 2
    assert f"--words is {words}: give a whole number from 1 to 48." in capsys.readouterr().err
    assert not measured


def test_a_file_of_the_user_s_is_kept(measured, capsys, tmp_path):
    file = tmp_path / "notes"
    file.write_text("mine")
    assert main(["--table", str(file)]) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert (file.read_text(), measured) == ("mine", [])
    assert main(["--table", "/no/such/table"]) == 2
    assert not measured
    assert main(["--table", str(file), "--overwrite"]) == 0
    assert file.read_text().startswith(COLUMNS)


def test_a_divergence_is_what_its_definition_says():
    logits, other = mx.array([[0.0, math.log(3.0)]] * 2), mx.array([[0.0, math.log(3.0)], [0.0, 0.0]])
    same = divergence("m", "t", 8, [logits], [logits])
    assert (same.kl, same.same_top, same.logits_error, same.positions) == (0.0, 1.0, 0.0, 2)
    found = divergence("m", "t", 8, [logits], [other])
    largest = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.largest_kl == pytest.approx(largest, rel=1e-5)
    assert found.kl == pytest.approx(largest / 2, rel=1e-5)
    assert found.same_top == 0.5
    assert found.logits_error == pytest.approx(math.sqrt(0.5), rel=1e-5)
