"""What `plan --calibrate` keeps, and what plans make of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import openelm_mlx as om
from openelm_mlx.bench import memory
from openelm_mlx.bench.against import shape_config
from openelm_mlx.commands import main
from openelm_mlx.memory import calibration, stored
from openelm_mlx.memory.calibration import LARGEST, SMALLEST, calibrated, calibration_from
from openelm_mlx.memory.machine import find_mac, this_machine

MB = 10**6


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENELM_MLX_CACHE", str(tmp_path / "cache"))


def row(family="openelm", scratch=20 * MB, planned=120 * MB, peak=120 * MB, peak_process=0):
    return SimpleNamespace(family=family, scratch=scratch, planned=planned, peak=peak, peak_process=peak_process)


def test_the_largest_of_a_family_counts_rounded_up():
    found = calibration_from(
        [row(peak=115 * MB), row(peak=125 * MB + 1), row("gpt_oss", peak=110 * MB, peak_process=180 * MB)], "2026-11-26"
    )
    assert found.scratch == {"openelm": 1.26, "gpt_oss": 0.5}
    assert found.process_bytes == 70 * MB
    more = [
        row(peak=10 * MB, peak_process=80 * MB),
        row(peak=10 * MB, peak_process=75 * MB),
        row(peak=9 * MB, peak_process=5),
    ]
    assert calibration_from(more, "").process_bytes == 70 * MB  # the largest; one below MLX's own says nothing


def test_tiny_runs_and_absurd_ones_do_not_decide():
    found = calibration_from([row(scratch=MB, peak=300 * MB), row("gpt_oss", peak=900 * MB), row("x", peak=1)], "")
    assert found.scratch == {"gpt_oss": LARGEST, "x": SMALLEST}
    assert found.process_bytes is None


def test_a_plan_goes_by_what_is_stored():
    machine = this_machine()
    before = om.plan("demo-openelm")
    stored.store(
        "memory", {"backend": machine.backend, "scratch": {"openelm": 2.0}, "process_bytes": 91 * MB, "date": "x"}
    )
    after = om.plan("demo-openelm", prefill_chunk=before.prefill_chunk)
    assert after.scratch_bytes == 2 * before.scratch_bytes
    assert after.process_bytes - after.total_bytes >= 91 * MB
    assert after.machine.calibration.date == "x"
    assert om.load("demo-openelm")[0].plan.machine.calibration is not None
    json.dumps(after.as_dict())


def test_what_was_measured_on_one_backend_says_nothing_of_another():
    stored.store("memory", {"backend": "metal", "scratch": {"openelm": 2.0}})
    assert calibrated(this_machine()).calibration is None
    mac = om.plan("demo-openelm", mac="M4 16GB")
    assert mac.machine.calibration.scratch == {"openelm": 2.0}


@pytest.mark.parametrize(
    "values",
    [{}, {"scratch": []}, {"scratch": {"openelm": 99}}, {"scratch": {"openelm": True}}, {"scratch": {"openelm": "2"}}],
)
def test_values_that_cannot_be_are_left_alone(values):
    stored.store("memory", {"backend": this_machine().backend, **values})
    assert calibrated(this_machine()).calibration is None


def test_a_strange_process_size_is_not_used():
    stored.store("memory", {"backend": this_machine().backend, "scratch": {}, "process_bytes": -5})
    assert calibrated(this_machine()).calibration.process_bytes is None


def test_the_command_measures_without_an_earlier_correction_and_stores_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(memory, "CALIBRATION_SHAPES", ("thin OpenELM",))
    monkeypatch.setattr(memory, "CALIBRATION_PROMPTS", (300,))
    monkeypatch.setattr(calibration, "LEAST_SCRATCH", 10**6)
    monkeypatch.setattr(memory, "SHAPES", {"thin OpenELM": shape_config("openelm-270m", 2)})
    stored.store("memory", {"backend": this_machine().backend, "scratch": {"openelm": 3.9}, "process_bytes": 1})
    assert main(["plan", "--calibrate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.8 <= found["scratch"]["openelm"] <= 1.1
    assert found["process_bytes"] > 20 * MB
    assert calibrated(this_machine()).calibration.scratch == found["scratch"]
    assert main(["plan", "demo-openelm"]) == 0
    assert f"measured on {found['date']}" in capsys.readouterr().out


def test_the_command_s_words_for_people(monkeypatch, capsys):
    made = [
        memory.Row("a", 8, "openelm", 100 * MB, 20 * MB, 120 * MB, 130 * MB, 170 * MB, 190 * MB),
        memory.Row("b", 8, "gpt_oss", 100 * MB, 20 * MB, 120 * MB, 120 * MB, 170 * MB, 0),
    ]
    monkeypatch.setattr(memory, "rows", lambda *_, **__: iter(made))
    assert main(["plan", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "Computing with openelm takes 1.50 times what its shapes say." in out
    assert "The process takes 60 MB beside." in out
    assert stored.load_stored("memory")["scratch"] == {"openelm": 1.5, "gpt_oss": 1.0}


def test_a_mac_that_was_never_measured_says_so(capsys):
    assert main(["plan", "demo-openelm", "--mac", "M4 16GB"]) == 0
    assert "never measured: run plan --calibrate on a Mac" in capsys.readouterr().out
    assert replace(find_mac("M4 16GB")).calibration is None
