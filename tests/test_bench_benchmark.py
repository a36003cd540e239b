"""`bench` of a model: its figures, and how both sides are measured when they do not fit into memory together."""

import json
from dataclasses import replace

import pytest

from openelm_mlx.bench import benchmark, fresh
from openelm_mlx.bench.benchmark import Figure, Settings, rate_figures
from openelm_mlx.bench.limits import Limits
from openelm_mlx.commands import main
from openelm_mlx.errors import CheckpointError, SettingError


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(benchmark, "measured_limits", lambda: Limits(1e10, 1e11))


def named(figures, start):
    (found,) = [figure for figure in figures if figure.name.startswith(start)]
    return found


def test_rates_times_memory_and_parts_of_the_limits(limits):
    figures = rate_figures(Settings(prompt_tokens=12, completion_tokens=6, rounds=2))
    prefill, decode = named(figures, "prefill of 12 tokens"), named(figures, "decode of 6 tokens")
    for figure in (prefill, decode):
        assert len(figure.samples) == len(figure.mlx_lm_samples) == 2
        assert figure.ratio > 0
    assert decode.limit == ">= 1.0"
    first = named(figures, "first token after 12 tokens")
    assert first.samples == pytest.approx([12e3 / rate for rate in prefill.samples])
    part = named(figures, "decode of the 10 GB/s here")
    assert part.samples[0] / decode.samples[0] == pytest.approx(part.samples[1] / decode.samples[1])
    assert named(figures, "prefill of the 0.1 TFLOPS here").unit == "%"
    assert named(figures, "most memory in use").median > 10


def test_without_mlx_lm(limits):
    figures = rate_figures(Settings(prompt_tokens=8, completion_tokens=4, rounds=1, against_mlx_lm=False))
    assert all(figure.mlx_lm_samples is None and figure.limit is None for figure in figures)


@pytest.mark.slow
def test_both_sides_in_processes_of_their_own_where_they_do_not_fit_together(limits, monkeypatch):
    machine = benchmark.this_machine()
    monkeypatch.setattr(benchmark, "this_machine", lambda: replace(machine, working_set_bytes=10_000_000))
    monkeypatch.setattr(benchmark, "mlx_lm_model", lambda _: pytest.fail("loaded beside ours"))
    figures = rate_figures(Settings(prompt_tokens=8, completion_tokens=4, rounds=1))
    decode = named(figures, "decode of 4 tokens, each run in its own process")
    assert len(decode.samples) == len(decode.mlx_lm_samples) == 1
    assert named(figures, "most memory in use").median > 10


def test_a_process_that_fails_is_a_sentence(monkeypatch):
    failed = fresh.subprocess.CompletedProcess([], 1, "", "a\nValueError: no such thing\n")
    monkeypatch.setattr(fresh.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match="measured ours failed: ValueError: no such thing"):
        benchmark._in_a_fresh_process(Settings(), "ours")


def test_limits_of_figures():
    assert Figure("a", "s", [0.2, 0.4, 0.3], limit="<= 0.3").is_met
    assert not Figure("a", "tokens/s", [90.0], [100.0], limit=">= 1.0").is_met
    assert Figure("a", "s", [1.0]).is_met is None


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "rounds"])
def test_numbers_that_cannot_be(name):
    with pytest.raises(SettingError, match=name):
        Settings(**{name: 0})


def test_the_command_draws_and_prints(limits, monkeypatch, capsys, tmp_path):
    made = [
        Figure("prefill of 8 tokens", "tokens/s", [100.0], [50.0]),
        Figure("decode of 8 tokens", "tokens/s", [30.0], [20.0], ">= 1.0"), Figure("--help", "s", [0.1], limit="<= 0.3"),
    ]  # fmt: skip
    monkeypatch.setattr(benchmark, "run_benchmark", lambda _: iter(made))
    assert main(["bench", "--json", "--chart", str(tmp_path / "a.png")]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["figures"]] == [each.name for each in made]
    assert (tmp_path / "a.png").stat().st_size > 5000
    made[1] = replace(made[1], samples=[10.0])
    assert main(["bench"]) == 1
    prefill, decode, start = capsys.readouterr().out.splitlines()[1:]
    assert "limit" not in prefill
    assert decode.endswith("ratio 0.50   (below the limit of 1.0)")
    assert start.endswith("(within the limit of 0.3)")
    made[2] = replace(made[2], samples=[0.4])
    assert main(["bench"]) == 1
    assert "(above the limit of 0.3)" in capsys.readouterr().out
