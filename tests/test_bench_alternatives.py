"""Equal ways timed against each other, what is stored of it, and who goes by it."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from slots_in_place import write_on_cpu

import openelm_mlx as om
from openelm_mlx.bench import alternatives
from openelm_mlx.bench.alternatives import Sizes, Timing, time_alternatives, winners
from openelm_mlx.bench.expert_ways import WaysTiming
from openelm_mlx.commands import main
from openelm_mlx.decoding.compiled_step import CompiledStep, make_step
from openelm_mlx.decoding.step import PlainStep
from openelm_mlx.memory import choices as kept
from openelm_mlx.memory import stored
from openelm_mlx.models import precision
from openelm_mlx.models.precision import KernelChoices
from openelm_mlx.models.routing_ways import BY_SORTING
from openelm_mlx.models.slot_attention import attend_with_mask

TABLE = ((1, "unsorted"), (12, "blocks_32"), (96, "sorted"))
SMALL = Sizes(
    hidden=96, inner=64, experts=4, routes=64, heads=4, kv_heads=2, head_dim=32, places=256, layers=1, tokens=2
)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENELM_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on Metal, where computing here stands for the GPU's."""
    for module in (precision, alternatives, kept):
        monkeypatch.setattr(module, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(alternatives, "write_in_slots", write_on_cpu)
    monkeypatch.setattr(alternatives, "attend_in_slots", _right)


def _right(queries, buffer, rows, scale, sinks=None, window=None, written=None):
    return attend_with_mask(queries, buffer, rows, scale, sinks, window)


def test_on_the_cpu_there_is_nothing_to_choose():
    assert time_alternatives(SMALL) == []
    assert kept.stored_choices() is None
    kept.store_choices(KernelChoices(spare_places=8))
    assert kept.stored_choices() is None


ALL = alternatives._ALTERNATIVES | {name: make for name, (make, _) in alternatives._TOLD.items()}


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", ALL)
def test_both_ways_give_the_same_numbers(name, on_a_gpu, monkeypatch):
    """What is timed must be the same arithmetic, or the faster one would be another model."""
    results = []
    real = mx.eval
    monkeypatch.setattr(alternatives.mx, "eval", lambda *arrays: (results.append(arrays[-1]), real(*arrays))[1])
    mx.random.seed(0)
    ways = ALL[name](SMALL)
    assert len(ways) == 2
    if name == "columns_in_a_tile":  # bit for bit, but for the order in which a row is summed
        assert SMALL.inner % 512
    if name == "spare_places":  # their caches are drawn apart
        return
    outs = []
    for run in ways.values():
        results.clear()
        run()
        outs.append(results[-1])
    if name == "rows_in_a_tile":
        assert [each.shape[-1] for each in outs] == [96, 128]
        return
    assert mx.allclose(outs[0].astype(mx.float32), outs[1].astype(mx.float32), rtol=0.1, atol=0.25)


def _no_compiler(*_):
    raise RuntimeError("Failed to compile kernel")


def _only(queries, *rest, head_dim=64, dtype=mx.bfloat16):
    """As on a device that is right for the heads of one model, and refuses or gets wrong those of others."""
    found = _right(queries, *rest)
    return found if queries.shape[-1] == head_dim and queries.dtype == dtype else mx.zeros_like(found)


def _deaf_to_sinks(queries, buffer, rows, scale, sinks=None, window=None, written=None):
    return attend_with_mask(queries, buffer, rows, scale, None if sinks is None else mx.zeros_like(sinks), window)


def _sees_one_less(queries, buffer, rows, scale, sinks=None, window=None, written=None):
    return attend_with_mask(queries, buffer, mx.maximum(rows - mx.array([0, 1]), 0), scale, sinks, window)


def _sees_beyond_the_window(queries, buffer, rows, scale, sinks=None, window=None, written=None):
    return attend_with_mask(queries, buffer, rows, scale, sinks)


def _looks_into_the_slot_of_its_number(queries, buffer, rows, scale, sinks=None, window=None, written=None):
    own = mx.stack([mx.arange(rows.shape[0]) % buffer.shape[1], rows[:, 1]], axis=1)
    return attend_with_mask(queries, buffer, own, scale, sinks, window)


@pytest.mark.parametrize(
    "kernel",
    [
        _no_compiler,
        lambda queries, *_: queries,
        lambda queries, *_: queries * float("nan"),
        _only,
        _deaf_to_sinks,
        _sees_one_less,
        _sees_beyond_the_window,
        _looks_into_the_slot_of_its_number,
    ],
)
def test_a_kernel_that_is_not_right_is_no_way(kernel, on_a_gpu, monkeypatch):
    """Nor is it where the backend's default is to take it."""
    assert list(alternatives._slot_kernel(SMALL)) == [False, True]
    monkeypatch.setattr(alternatives, "attend_in_slots", kernel)
    assert list(alternatives._slot_kernel(SMALL)) == [False]
    monkeypatch.setattr(alternatives, "_ALTERNATIVES", {"slot_kernel": alternatives._slot_kernel})
    monkeypatch.setattr(alternatives, "_TOLD", {})
    monkeypatch.setattr(alternatives, "time_expert_ways", lambda *_: WaysTiming({}, TABLE, TABLE, {}))
    monkeypatch.setattr(alternatives, "default_choices", lambda: KernelChoices(slot_kernel=True))
    (timing, _) = time_alternatives(SMALL)
    assert timing.winner is False


def _into_the_next_column(buffer, new, rows):
    return write_on_cpu(buffer, new, rows + mx.array([0, 1]))


def _all_but_the_last_row(buffer, new, rows):
    return write_on_cpu(buffer, new[:-1], rows[:-1])


def _values_as_keys(buffer, new, rows):
    return write_on_cpu(buffer, mx.concatenate([new[:, 2:], new[:, :2]], axis=1), rows)


@pytest.mark.parametrize("write", [_no_compiler, _into_the_next_column, _all_but_the_last_row, _values_as_keys])
def test_nor_where_what_writes_is_not_right(write, on_a_gpu, monkeypatch):
    assert list(alternatives._slot_kernel(SMALL)) == [False, True]
    monkeypatch.setattr(alternatives, "write_in_slots", write)
    assert list(alternatives._slot_kernel(SMALL)) == [False]


def test_the_default_stays_unless_the_other_way_is_clearly_faster(on_a_gpu, monkeypatch):
    monkeypatch.setattr(
        alternatives, "in_turns",
        lambda ways, _: {1: 1.0, 512: 0.8} if 512 in ways else {0: 1.0, 8: 0.94} if 8 in ways else {False: 0.96, True: 1.0},
    )  # fmt: skip
    monkeypatch.setattr(alternatives, "_ALTERNATIVES", {
        "spare_places": lambda _: {0: None, 8: None}, "fuse_residual_add": lambda _: {False: None, True: None},
    })  # fmt: skip
    table = WaysTiming({}, BY_SORTING, ((1, "unsorted"),), {}, (4, 24))
    monkeypatch.setattr(alternatives, "time_expert_ways", lambda shape, rows: table)
    found = time_alternatives(SMALL)
    assert [(each.name, each.default, each.winner) for each in found] == [
        ("spare_places", 0, 8), ("fuse_residual_add", True, True), ("columns_in_a_tile", 1, 512),
        ("expert_ways", BY_SORTING, ((1, "unsorted"),)),
    ]  # fmt: skip
    assert winners(found) == replace(
        precision.default_choices(), spare_places=8, expert_ways=((1, "unsorted"),), expert_kernel_rows=(4, 24)
    )
    assert "takes 8, instead of 0" in found[0].line()
    assert "as before" in found[1].line()
    assert "512 would be faster; only told, nothing goes by it" in found[2].line()
    assert "columns_in_a_tile" not in asdict(winners(found))
    json.dumps([each.as_dict() for each in found])


def test_every_choice_has_a_timing_and_a_set_of_values():
    own = {"expert_ways", "expert_kernel_rows"}  # a table, and a range beside it: bench/expert_ways.py
    timed = set(asdict(KernelChoices())) - kept.BY_BACKEND
    assert set(alternatives._ALTERNATIVES) | own == timed == set(kept._ALLOWED) | own


def test_what_is_stored_holds_from_the_next_model_on(on_a_gpu):
    assert kept.stored_choices() is None
    kept.store_choices(
        KernelChoices(
            rows_in_a_tile=64, spare_places=8, compiled_step=False, bias_apart=True, expert_ways=TABLE,
            expert_kernel_rows=(2, 48),
        )
    )  # fmt: skip
    chosen = kept.stored_choices()
    assert chosen == KernelChoices(64, 8, False, False, True, expert_ways=TABLE, expert_kernel_rows=(2, 48))
    model, _ = om.load("demo-openelm", dtype="float32")
    assert model.choices == chosen
    cache = model.make_cache()
    assert isinstance(make_step(model, cache), PlainStep)
    model(mx.array([[5]]), cache=cache)
    assert cache[0].keys.shape[2] == 264
    kept.store_choices(replace(chosen, compiled_step=True))
    model, _ = om.load("demo-openelm", dtype="float32")
    assert isinstance(make_step(model, model.make_cache()), CompiledStep)


@pytest.mark.parametrize(
    "values",
    [
        {}, {"rows_in_a_tile": 7}, {"spare_places": True}, {"compiled_step": "no"}, {"bias_apart": 1},
        {"expert_ways": [[1, "quickly"]]}, {"expert_ways": [[4, "sorted"]]}, {"expert_ways": "sorted"}, {"expert_ways": []},
        {"expert_kernel_rows": [8, 2]}, {"expert_kernel_rows": [0, 4]}, {"expert_kernel_rows": [1, True]},
        {"expert_kernel_rows": 8},
    ],
)  # fmt: skip
def test_values_that_nobody_stored_are_not_used(values, on_a_gpu):
    stored.store("choices", values)
    assert kept.stored_choices() is None


def test_what_an_older_version_stored_holds_as_far_as_it_is_known(on_a_gpu, monkeypatch):
    """It had other choices, and not all of today's: those are as where nobody has measured."""
    defaults = KernelChoices(slot_kernel=True, pads_rows=True)
    monkeypatch.setattr(kept, "default_choices", lambda: defaults)
    stored.store("choices", {"rows_in_a_tile": 64, "marks_keys": True, "products_from": 1_000_000, "pads_rows": False})
    assert kept.stored_choices() == replace(defaults, rows_in_a_tile=64)


@pytest.fixture
def well(monkeypatch, tmp_path):
    """A self-check whose checks pass, and that measures no speeds, in a folder of its own."""
    from openelm_mlx.bench import selfcheck, speeds

    monkeypatch.chdir(tmp_path)
    one = selfcheck.Outcome(1, "one", True, "fine", "fine", 0.1)
    monkeypatch.setattr(selfcheck, "run_checks", lambda checks, seconds: iter([one]))
    monkeypatch.setattr(speeds, "measured_speeds", lambda machine, **_: speeds.Speeds({}, {}, []))


def test_the_self_check_times_and_stores_when_all_is_well(on_a_gpu, well, monkeypatch, capsys):
    timing = Timing("spare_places", {0: 2e-6, 8: 1e-6}, 0, 8)
    monkeypatch.setattr(alternatives, "time_alternatives", lambda: [timing])
    assert main(["selfcheck", "--no-timings"]) == 0
    assert "timed" not in capsys.readouterr().out
    assert kept.stored_choices() is None
    assert main(["selfcheck"]) == 0
    out = capsys.readouterr().out
    assert "timed  spare_places: 0: 2.0 us, 8: 1.0 us; takes 8, instead of 0" in out
    assert kept.stored_choices().spare_places == 8
    assert main(["selfcheck", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["timings"][0]["winner"] == 8


def test_the_table_of_ways_is_stored_and_told(on_a_gpu, well, monkeypatch, capsys):
    seconds = {(16, "unsorted"): 3e-4, (16, "blocks_32"): 1e-4}
    timing = WaysTiming(seconds, BY_SORTING, TABLE, {"grouped": "it is off"}, (2, 16))
    monkeypatch.setattr(alternatives, "time_alternatives", lambda: [timing])
    assert main(["selfcheck"]) == 0
    out = capsys.readouterr().out
    assert "us a layer of 16 rows: unsorted 300, blocks_32 100; grouped is left out, because it is off" in out
    assert (
        "takes unsorted from 1, blocks_32 from 12, sorted from 96, instead of unsorted from 1, sorted from 16, and"
        in out
    )
    assert "and the kernel for 2 to 16 rows" in out
    assert kept.stored_choices().expert_ways == TABLE
    model, _ = om.load("demo-gpt-oss", dtype="float32")
    assert [model.layers[1].mlp.experts.way_for((n, 4)) for n in (1, 2, 16, 17, 100)] == [
        "unsorted", "kernel", "kernel", "blocks_32", "sorted",
    ]  # fmt: skip
    assert main(["selfcheck", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["timings"][0]["seconds"] == {"16 rows, unsorted": 3e-4, "16 rows, blocks_32": 1e-4}
    assert report["timings"][0]["winner"] == [list(each) for each in TABLE]


def test_a_self_check_that_failed_stores_nothing(on_a_gpu, well, monkeypatch, capsys):
    from openelm_mlx.bench import selfcheck

    one = selfcheck.Outcome(1, "one", False, "fine", "broken", 0.1)
    monkeypatch.setattr(selfcheck, "run_checks", lambda checks, seconds: iter([one]))
    monkeypatch.setattr(alternatives, "time_alternatives", lambda: pytest.fail("timed"))
    assert main(["selfcheck"]) == 1
    assert "FAIL" in capsys.readouterr().out
