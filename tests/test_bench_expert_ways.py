"""The ways through a layer's experts, timed: what is equal, what wins, and when time or memory is short."""

import json

import mlx.core as mx
import pytest
from expert_kernel_on_cpu import plain_product

from openelm_mlx.bench import expert_layer, expert_ways
from openelm_mlx.bench.expert_layer import LayerShape, by_way, distance, passes_of, random_experts, random_rows
from openelm_mlx.bench.expert_ways import fitting_shape, kernel_rows_of, table_of, table_text, time_expert_ways
from openelm_mlx.models import moe
from openelm_mlx.models.moe import Experts
from openelm_mlx.models.routing_ways import BY_SORTING, WAYS, is_checked

TINY = LayerShape(64, 64, 16)


def of(rows, **ways):
    return {(rows, way): seconds for way, seconds in ways.items()}


# --- what is timed ----------------------------------------------------------------------------------------------------


def test_the_shape_is_gpt_oss_20b_s():
    shape = LayerShape.of("20b")
    assert (shape.hidden_size, shape.inner, shape.num_experts, shape.experts_per_token) == (2880, 2880, 32, 4)
    assert LayerShape.of("120b").num_experts == 128
    assert shape.expert_bytes == 13_219_200
    assert fitting_shape(16 * 10**9) == shape
    small = fitting_shape(10**9)
    assert (small.num_experts, small.experts_per_token) == (8, 1)
    assert small.layer_bytes == shape.layer_bytes // 4


def test_experts_differ_and_give_ordinary_numbers():
    experts = random_experts(TINY, 128)
    assert experts.down_proj.weight.shape == (16, 128, 8)
    assert experts.gate_up_proj.weight.nbytes + experts.gate_up_proj.scales.nbytes == 16 * 2 * 64 * 64 * 17 // 32
    weight = experts.gate_up_proj.weight
    assert not any(mx.array_equal(weight[0], weight[i]).item() for i in range(1, 16))
    x = mx.random.normal((4, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    out = experts(x, mx.array([[0, 1, 2, 3]] * 4))
    assert out.dtype == mx.bfloat16
    assert 0.01 < mx.sqrt(mx.mean(mx.square(out.astype(mx.float32)))).item() < 100


@pytest.mark.parametrize("shape", [TINY, TINY.a_quarter()])
def test_passes_go_the_way_that_was_set_when_they_were_made(shape, monkeypatch):
    experts, rows, seen = random_experts(shape, 1), random_rows(shape, 16, 3), []
    way_for = Experts.way_for
    monkeypatch.setattr(Experts, "way_for", lambda self, s: seen.append(way_for(self, s)) or seen[-1])
    calls = {way: passes_of(experts, rows) for way in WAYS if by_way(experts, shape, way, 16)}
    assert {"unsorted", "sorted", "grouped"} <= set(calls)
    for way, call in calls.items():
        seen.clear()
        call()
        assert seen == [way] * 3


def test_every_way_is_timed_for_every_number_of_rows():
    timing = time_expert_ways(TINY, (2, 16, 40))
    assert timing.left_out == {}
    assert {rows for rows, _ in timing.seconds} == {2, 16, 40}
    assert {way for rows, way in timing.seconds if rows == 16} == set(WAYS)
    assert {way for rows, way in timing.seconds if rows == 2} == {"unsorted", "sorted"}  # groups would gain nothing
    assert all(seconds > 0 for seconds in timing.seconds.values())
    assert is_checked(timing.winner)
    assert timing.default == BY_SORTING
    json.dumps(timing.as_dict())
    assert "16 rows: unsorted" in timing.line()


def test_when_time_is_over_what_was_timed_counts():
    ticks = iter(range(100))
    timing = time_expert_ways(TINY, (2, 16, 40), seconds=1.5, clock=lambda: float(next(ticks)))
    assert {rows for rows, _ in timing.seconds} == {2}


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda y: y + 1, "off the unsorted one"), (lambda y: y * float("nan"), "inf off"),
        (lambda y: (_ for _ in ()).throw(RuntimeError("no such kernel")), "it ends with RuntimeError: no such kernel"),
    ],
    ids=["wrong", "nan", "raises"],
)  # fmt: skip
def test_a_way_that_computes_something_else_is_left_out(fault, why, monkeypatch):
    real = Experts.of_groups
    monkeypatch.setattr(Experts, "of_groups", lambda self, rows, groups: fault(real(self, rows, groups)))
    timing = time_expert_ways(TINY, (16,))
    assert set(timing.left_out) == {"grouped", "blocks_16", "blocks_32"}
    assert all(why in each for each in timing.left_out.values())
    assert {way for _, way in timing.seconds} == {"unsorted", "sorted"}
    assert {way for _, way in timing.winner} <= {"unsorted", "sorted"}


def test_a_way_that_raises_for_more_rows_is_left_out_for_all(monkeypatch):
    """The GPU's memory may end with the padding of many rows only."""
    real = Experts.of_groups

    def short(self, rows, groups):
        if rows.shape[0] > 32:
            raise RuntimeError("out of memory")
        return real(self, rows, groups)

    monkeypatch.setattr(Experts, "of_groups", short)
    timing = time_expert_ways(TINY, (16, 40))
    assert "out of memory" in timing.left_out["blocks_16"]
    assert {way for _, way in timing.seconds} == {"unsorted", "sorted", "grouped"}


def test_distances():
    known = mx.array([1.0, -4.0])
    assert distance(known, known) == 0
    assert distance(known + 1, known) == 0.25
    assert distance(known * float("nan"), known) == float("inf")
    assert expert_layer.NEAR < 0.05


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A plain product in the place of the kernel, which only a GPU has; `faulty` is done to what it gives."""

    def faulty(fault=lambda y: y):
        monkeypatch.setattr(expert_layer, "runs_on_cpu", lambda: False)
        monkeypatch.setattr(moe, "product", lambda *given: fault(plain_product(*given)))
        monkeypatch.setattr(mx, "compile", lambda function: function)

    return faulty


def test_the_kernel_is_timed_beside_the_ways(as_on_a_gpu):
    as_on_a_gpu()
    timing = time_expert_ways(TINY, (2, 16))
    assert timing.left_out == {}
    assert {rows for rows, way in timing.seconds if way == "kernel"} == {2, 16}
    assert {way for _, way in timing.winner} <= set(WAYS)
    assert timing.kernel_rows == kernel_rows_of(timing.seconds, timing.winner)


def _only_in_half(y):
    return y if y.dtype != mx.float32 else y + 1


@pytest.mark.parametrize("fault", [lambda y: y * 1.5, _only_in_half, lambda y: y * float("nan")])
def test_a_kernel_that_is_wrong_in_any_type_is_left_out(fault, as_on_a_gpu):
    as_on_a_gpu(fault)
    timing = time_expert_ways(TINY, (16,))
    assert set(timing.left_out) == {"kernel"}
    assert timing.kernel_rows == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({}, (0, 0)),
        (of(1, unsorted=1.0, kernel=0.5), (1, 1)),
        (of(2, unsorted=1.0, kernel=0.97) | of(4, unsorted=1.0, kernel=0.9), (4, 4)),
        (of(2, unsorted=1.0, kernel=0.5) | of(4, unsorted=1.0, kernel=0.9) | of(16, sorted=1.0, kernel=1.2), (2, 4)),
        # Beside a way that is faster than the table's, which keeps its own where both are nearly alike.
        (of(16, unsorted=0.97, sorted=1.0, kernel=0.94), (16, 16)),
        # What is faster once more later is left to the table.
        (of(2, unsorted=1.0, kernel=0.5) | of(4, unsorted=1.0, kernel=1.0) | of(8, unsorted=1.0, kernel=0.5), (2, 2)),
    ],
)
def test_for_so_many_rows_the_kernel_wins(seconds, rows):
    assert kernel_rows_of(seconds, BY_SORTING) == rows


# --- what wins --------------------------------------------------------------------------------------------------------


STEPS = [
    of(8, unsorted=1.0, blocks_16=1.2),
    of(16, unsorted=2.0, sorted=2.0, blocks_16=1.2),
    of(64, sorted=1.0, blocks_16=2.0),
]


@pytest.mark.parametrize(
    ("seconds", "table"),
    [
        # The default where nothing is clearly faster; one row as a request alone goes.
        (of(2, unsorted=1.0, sorted=0.97) | of(16, unsorted=0.96, sorted=1.0), BY_SORTING),
        (of(2, unsorted=1.0, sorted=0.5), ((1, "unsorted"), (2, "sorted"))),
        (of(1, unsorted=1.0, sorted=0.5) | of(2, unsorted=1.0, sorted=0.5), ((1, "unsorted"), (2, "sorted"))),
        (STEPS[0] | STEPS[1] | STEPS[2], ((1, "unsorted"), (16, "blocks_16"), (64, "sorted"))),
        # Nearly alike: no step.
        (
            of(16, sorted=3, grouped=1.0, blocks_16=1.2) | of(24, sorted=3, grouped=1.03, blocks_16=1.0),
            ((1, "unsorted"), (16, "grouped")),
        ),
        # What there was no time for.
        (STEPS[0], BY_SORTING),
        ({}, BY_SORTING),
    ],
)
def test_the_table_that_timings_say(seconds, table):
    assert table_of(seconds, BY_SORTING) == table
    assert is_checked(table_of(seconds, BY_SORTING))


def test_a_table_in_words():
    assert table_text(BY_SORTING) == "unsorted from 1, sorted from 16"
    assert expert_ways.ROWS[0] == 1
    assert expert_ways.ROWS[-1] == 128
