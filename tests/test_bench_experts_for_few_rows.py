"""`python -m benchmarks.experts_for_few_rows`: every form computes the same, and every error is told and costs itself only."""

import json

import mlx.core as mx
import numpy as np
import pytest
from expert_kernel_on_cpu import plain_product

from benchmarks.experts_for_few_rows import main
from benchmarks.measurements import experts_for_few_rows as measured
from benchmarks.measurements.experts_for_few_rows import (
    FORMS,
    PLACED,
    Measured,
    Settings,
    form_of,
    measured_around,
    measured_riding,
    measured_ways,
    placed,
    sum_in_one_kernel,
    table,
)
from openelm_mlx.bench.expert_layer import LayerShape, random_experts, random_rows
from openelm_mlx.models import moe
from openelm_mlx.models.moe import weighted_sum
from openelm_mlx.models.precision import add_rounded

TINY = LayerShape(64, 64, 8, 2)
QUICK = Settings(passes=2, rounds=1)
COMMAND = ["--shapes", "tiny", "--rounds", "1"]


def plenty():
    return 1e6


@pytest.fixture(scope="module")
def experts():
    return random_experts(TINY, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [1, 5, 40])
def test_every_form_is_the_same_arithmetic(experts, form, number):
    rows = random_rows(TINY, number, 2)
    way = placed(rows, TINY.num_experts) if form == PLACED else form_of(form)
    plain = form_of("unsorted")
    for chosen in rows.chosen:
        known = plain(experts, rows.x, chosen)
        assert mx.array_equal(way(experts, rows.x, chosen), known)


def test_every_number_of_rows_is_measured_in_every_form(experts):
    found = list(measured_ways("tiny", TINY, experts, (2, 32), 1e9, QUICK, plenty))
    assert [each.what for each in found if each.rows == 32] == list(FORMS)
    assert "blocks_64" not in {each.what for each in found if each.rows == 2}
    assert all(each.us > 0 and each.off == 0 and each.error is None for each in found)
    # 32 rows of 2 of 8 experts: all of them are read, 6,528 bytes each.
    assert all(each.floor_us == pytest.approx(8 * TINY.expert_bytes / 1e9 * 1e6) for each in found if each.rows == 32)
    assert {each.what: each.groups for each in found if each.rows == 32}["blocks_16"] == 8 + (64 - 8) // 16


def test_what_is_around_and_riding_is_measured(experts):
    around = list(measured_around("tiny", TINY, experts, (1, 4), QUICK, plenty))
    assert {each.rows for each in around} == {1, 4}
    assert all(each.us is not None for each in around), [each.error for each in around]
    riding = list(measured_riding("tiny", TINY, experts, 16, (2,), QUICK, plenty))
    assert [each.rows for each in riding] == [0, 2]
    assert all(each.us is not None for each in riding)


def test_no_time_no_figure(experts):
    for found in (
        measured_ways("tiny", TINY, experts, (2,), 1e9, QUICK, lambda: 0.0),
        measured_around("tiny", TINY, experts, (2,), QUICK, lambda: 0.0),
        measured_riding("tiny", TINY, experts, 16, (2,), QUICK, lambda: 0.0),
    ):
        assert list(found) == []


def test_an_error_costs_one_figure(experts, monkeypatch):
    real = measured.make_groups

    def short(chosen, way, num_experts):
        if way == "blocks_32":
            raise RuntimeError("no such kernel")
        return real(chosen, way, num_experts)

    monkeypatch.setattr(measured, "make_groups", short)
    found = list(measured_ways("tiny", TINY, experts, (16,), 1e9, QUICK, plenty))
    errors = [each for each in found if each.error is not None]
    assert [each.what for each in errors] == ["blocks_32"]
    assert len(found) == len(FORMS) - 1
    shown = table("tiny", found)
    assert "16 rows, blocks_32: RuntimeError: no such kernel" in shown
    assert "RuntimeError: no such kernel" in errors[0].line()


def test_one_kernel_for_the_weighted_sum_is_the_same_sum():
    outputs = mx.random.normal((6, 4, 32), key=mx.random.key(0)).astype(mx.bfloat16)
    weights = mx.softmax(mx.random.normal((6, 4), key=mx.random.key(1)), axis=-1)
    h = mx.random.normal((6, 32), key=mx.random.key(2))
    known = add_rounded(h, weighted_sum(outputs, weights, mx.bfloat16), mx.bfloat16)
    found = sum_in_one_kernel(h, outputs, weights)
    assert found.dtype == known.dtype == mx.float32
    # Rounded once to bfloat16: two sums that differ in the last bit of float32 may be neighbours there.
    assert np.abs(np.array(found) - np.array(known)).max() <= 2**-7 * 4


def test_a_table_has_what_is_far_off():
    shown = table(
        "20b",
        [Measured("20b", "unsorted", 4, 190.0, 37.0, None, 0.0), Measured("20b", "sorted", 4, 1.0, 37.0, None, 0.5)],
    )
    assert shown.splitlines()[2].split() == ["4", "37", "190.0", "1.0"]
    assert shown.splitlines()[3] == "4 rows, sorted: 5.0e-01 off the unsorted one"


def test_the_command_prints_tables(capsys):
    assert main([*COMMAND, "--rows", "1,16"]) == 0
    told = capsys.readouterr()
    assert "tiny, ways through the experts: us a layer, and the floor by bandwidth" in told.out
    assert "tiny, around the products" in told.out
    assert "tiny, riding in a prompt's chunk" in told.out
    assert "tiny, 16 rows, blocks_16: " in told.err
    assert "Not all was measured" not in told.out


def test_the_command_prints_json(capsys):
    assert main([*COMMAND, "--rows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is True
    assert {each["rows"] for each in found["results"] if each["what"] == "unsorted"} == {2}


def test_a_little_time_gives_what_it_can(capsys):
    assert main([*COMMAND, "--seconds", "0.000001"]) == 0
    assert "Not all was measured within 1e-06 s" in capsys.readouterr().out


def test_a_layer_that_does_not_fit_is_told(monkeypatch, capsys):
    def short(*_):
        raise RuntimeError("[malloc] Unable to allocate 1.7 GB.")

    monkeypatch.setattr("openelm_mlx.bench.expert_layer.random_experts", short)
    assert main([*COMMAND, "--rows", "2"]) == 1
    assert "Unable to allocate 1.7 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "0"], "--rows is '0'"), (["--rows", "two"], "--rows is 'two'"), (["--seconds", "0"], "--seconds is 0"),
        (["--rounds", "0"], "--rounds is 0"), (["--shapes", "7b"], "--shapes has '7b'"),
        (["--seconds", "nan"], "--seconds is nan"),
    ],
)  # fmt: skip
def test_bad_options_are_one_sentence(words, said, capsys):
    assert main([*COMMAND, *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def test_where_there_is_a_kernel_it_is_measured_too(experts, monkeypatch):
    monkeypatch.setattr(measured, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(moe, "product", plain_product)
    found = {each.what: each for each in measured_ways("tiny", TINY, experts, (2,), 1e9, QUICK, plenty)}
    assert found["kernel"].us > 0
    assert found["kernel"].off < 0.02
