"""`python -m benchmarks.server`: both sides do the same work, and the figures are what they say."""

import json

import pytest

from benchmarks import server as command
from benchmarks.measurements.server import Overhead, Side


def rows_of(capsys, *arguments):
    assert command.main([*arguments, "--json"]) == 0
    return {row["part"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


@pytest.mark.slow
def test_every_part_is_measured(capsys):
    found = rows_of(capsys, "--clients", "2", "--completion-tokens", "6", "--rounds", "1")
    overhead, start, turns = found["overhead"], found["start"], found["turns"]
    assert overhead["engine"]["tokens"] == overhead["http"]["tokens"] == [12]
    assert overhead["overhead"] == pytest.approx(1 - overhead["engine"]["seconds"][0] / overhead["http"]["seconds"][0])
    assert 0 < start["listening"][0] <= start["first_health"][0] <= start["loaded"][0]
    assert start["first_status"][0] in ("loading", "ok")
    prompts, cached = turns["prompt_tokens"], turns["cached_tokens"]
    assert len(prompts) == 3
    assert cached[0] == 0
    assert all(before - 8 <= found < now for before, found, now in zip(prompts, cached[1:], prompts[1:], strict=False))


def test_overheads_are_of_neighbouring_rounds():
    engine = Side([100, 100, 100], [1.0, 2.0, 4.0], [0.5, 1.0, 2.0])
    http = Side([100, 100, 100], [1.25, 2.5, 5.0], [0.55, 1.1, 2.2])
    found = Overhead(8, engine, http)
    assert found.overhead == pytest.approx(0.2)
    assert found.cpu_overhead == pytest.approx(0.1)
    assert (found.engine.tps, found.http.tps) == (50, 40)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds is 0: it must be at least 1."),
        (["--completion-tokens", "-1"], "--completion-tokens is -1: it must be at least 1."),
        (["--parts", "start,speed"], "--parts has 'speed': give some of start, overhead, turns."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(capsys, arguments, said):
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err
