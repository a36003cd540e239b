"""What `plan --calibrate` keeps, and what plans make of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import openelm_mlx as om
from openelm_mlx.bench import disk, memory, speeds
from openelm_mlx.bench.random_pair import shape_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.commands.plan import text
from openelm_mlx.memory import calibration, stored
from openelm_mlx.memory.cache_bytes import kv_cache_bytes
from openelm_mlx.memory.calibration import (
    LARGEST,
    SMALLEST,
    calibrated,
    calibration_from,
    checked_rates,
    spread_of,
    store_memory,
    store_speed,
)
from openelm_mlx.memory.machine import find_mac, this_machine
from openelm_mlx.memory.measured import MeasuredRates
from openelm_mlx.memory.rates import rates_of
from openelm_mlx.specs import spec_from_config

MB = 10**6
NOTHING = speeds.Speeds({}, {"gpt_oss": "rounds of one run differ by 40 %: other work runs on this machine"}, [])


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


@pytest.mark.slow
def test_the_command_measures_without_an_earlier_correction_and_stores_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(speeds, "measured_speeds", lambda machine: NOTHING)
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
    monkeypatch.setattr(speeds, "measured_speeds", lambda machine: replace(NOTHING, rates=KNOWN, disk=3e9))
    assert main(["plan", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "gpt_oss: 178 us a layer, weights at 288 GB/s, keys and values at 84 GB/s; prompts at 4 TFLOPS" in out
    assert "gpt_oss: not kept, plans stay as before: rounds of one run differ by 40 %" in out
    assert calibrated(this_machine()).calibration.rates == KNOWN
    assert "Computing with openelm takes 1.50 times the memory that its shapes predict." in out
    assert "The process itself takes 60 MB." in out
    assert stored.load_stored("memory")["scratch"] == {"openelm": 1.5, "gpt_oss": 1.0}


def test_a_mac_that_was_never_measured_says_so(capsys):
    assert main(["plan", "demo-openelm", "--mac", "M4 16GB"]) == 0
    assert "never measured: run plan --calibrate on a Mac" in capsys.readouterr().out
    assert replace(find_mac("M4 16GB")).calibration is None


# --- speed ------------------------------------------------------------------------------------------------------------

KNOWN = {"gpt_oss": MeasuredRates(178e-6, 288e9, 84e9, 4e12), "openelm": MeasuredRates(46e-6, 336e9, 152e9, 9e12)}
SPEED_SHAPES = [
    (24, 6e7, 7e5, 0.0),
    (8, 7e8, 1.8e7, 0.0),
    (3, 4.5e8, 1.6e6, 4e12),
    (8, 1e8, 4e6, 0.0),
    (8, 1e8, 1.4e8, 0.0),
]


class FakeClock:
    """A clock that only work moves on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def stand_ins(family, clock, noise=lambda: 1.0):
    """Work whose time is what the known terms say, as `speeds.timed` takes it."""
    spec = spec_from_config(shape_config("gpt-oss-20b" if family == "gpt_oss" else "openelm-270m", 1))
    known, works = KNOWN[family], []

    def passes(seconds):
        def run():
            clock.now += seconds * noise()

        return run

    for layers, weights, cached, _ in SPEED_SHAPES:
        # As many layers as are said: what is timed has no arrays.
        deep = replace(spec, layers=spec.layers * layers)
        seconds = layers * known.layer_seconds + weights / known.weights + cached / known.keys_values
        works.append(speeds.Work("decode", deep, weights, cached, 16, False, passes(16 * seconds)))
    prompt = speeds.Work("prompt", works[2].spec, 0, 0, 512, True, None)
    return [*works, replace(prompt, run=passes(512 * speeds._operations(prompt) / known.products))]


@pytest.mark.parametrize("family", KNOWN)
def test_known_terms_are_found_again_from_rounds_that_scatter(family):
    random, clock = np.random.default_rng(0), FakeClock()
    # A twentieth of noise, and one round in nine that something else made three times as long.
    works = stand_ins(family, clock, lambda: random.normal(1, 0.02) * (3 if random.random() < 0.1 else 1))
    rates, reasons = checked_rates(speeds.timed(works, clock))
    assert not reasons
    for name in ("layer_seconds", "weights", "keys_values", "products"):
        assert getattr(rates[family], name) == pytest.approx(getattr(KNOWN[family], name), rel=0.06), name
    assert rates[family].error < 0.05


def test_rounds_that_lie_far_apart_are_refused():
    random, clock = np.random.default_rng(0), FakeClock()
    works = stand_ins("gpt_oss", clock, lambda: random.uniform(1, 3))
    rates, reasons = checked_rates([*speeds.timed(works, clock), *speeds.timed(stand_ins("openelm", clock), clock)])
    assert set(rates) == {"openelm"}
    assert " %: other work runs" in reasons["gpt_oss"]


def test_what_cannot_be_is_refused():
    clock = FakeClock()
    rows = speeds.timed(stand_ins("gpt_oss", clock), clock)
    assert checked_rates(rows, bandwidth=400e9)[1] == {}
    assert "the chip has 100" in checked_rates(rows, bandwidth=100e9)[1]["gpt_oss"]
    slow = [replace(row, seconds=row.seconds * (4 if i == 0 else 1)) for i, row in enumerate(rows)]
    assert "miss a run by" in checked_rates([*slow, rows[0]])[1]["gpt_oss"]
    for never in (0.0, float("nan"), float("inf")):
        assert "do not explain the time" in checked_rates([replace(row, seconds=never) for row in rows])[1]["gpt_oss"]


def test_no_round_begins_after_the_time_but_the_first_three():
    clock = FakeClock()

    def run():
        clock.now += 10

    assert [len(each) for each in speeds.in_turns([run, run], clock, rounds=9, seconds=90)] == [4, 4]
    assert [len(each) for each in speeds.in_turns([run, run], clock, rounds=9, seconds=1)] == [3, 3]
    assert spread_of([1.0]) == 0
    stopped = FakeClock()  # it says that nothing took any time
    rows = speeds.timed(stand_ins("openelm", clock), stopped)
    assert checked_rates(rows)[0] == {}
    assert all(row.prefill is None for row in rows)
    assert spread_of([1.0, 1.0, 1.0, 9.0]) == pytest.approx(2.0)


def test_speeds_are_kept_beside_memory_and_each_leaves_the_other_alone():
    machine = this_machine()
    stored.store(
        "memory", {"backend": machine.backend, "scratch": {"openelm": 2.0}, "date": "old"}
    )  # of before: no speed
    assert calibrated(machine).calibration.rates == {}
    file = store_speed({"openelm": KNOWN["openelm"]}, 2e9, machine, "2026-11-29")
    found = calibrated(machine)
    assert found.calibration.scratch == {"openelm": 2.0}
    assert (found.calibration.rates, found.ssd) == ({"openelm": KNOWN["openelm"]}, (2e9, 2e9))
    assert json.loads(file.read_text())["values"]["version"] == 2
    store_speed({"gpt_oss": KNOWN["gpt_oss"]}, None, machine, "2026-11-30")  # the other family was not believed
    assert calibrated(machine).calibration.rates == KNOWN
    assert calibrated(machine).calibration.disk == 2e9
    assert store_memory(calibration_from([row()], "new"), machine) == file
    assert calibrated(machine).calibration.rates == KNOWN
    assert calibrated(machine).calibration.scratch == {"openelm": 1.0}
    assert calibrated(replace(machine, name="another")).calibration.rates == {}


@pytest.mark.parametrize(
    "change",
    [
        {"layer_seconds": -1},
        {"weights": 0},
        {"keys_values": "much"},
        {"weights": True},
        {"layer_seconds": float("nan")},
    ],
)
def test_speeds_that_somebody_wrote_by_hand_are_left_alone(change):
    machine = this_machine()
    values = {**vars(KNOWN["openelm"]), **change}
    stored.store(
        "memory", {"backend": machine.backend, "speed": {"machine": machine.name, "rates": {"openelm": values}}}
    )
    assert calibrated(machine).calibration.rates == {}


def test_a_plan_with_measured_speeds_has_a_narrower_range_and_says_when(capsys):
    mac = replace(find_mac("M4 Max 64GB"), backend=this_machine().backend)  # what is kept is of this backend
    before = om.plan("demo-openelm", machine=mac)
    terms = rates_of(mac, spec_from_config(shape_config("openelm-270m")))
    store_speed({"openelm": replace(KNOWN["openelm"], weights=terms.weights)}, None, mac, "2026-11-29")
    after = om.plan("demo-openelm", machine=mac)
    assert (before.decode.basis, after.decode.basis) == ("related", "measured")
    assert after.decode.high / after.decode.low < 0.9 * before.decode.high / before.decode.low
    assert "(measured on this machine on 2026-11-29" in "\n".join(text(after))
    store_speed({"openelm": replace(KNOWN["openelm"], error=0.3)}, None, mac, "2026-11-29")
    wide = om.plan("demo-openelm", machine=mac)  # terms that explained less have a wider range
    assert wide.decode.high / wide.decode.low > after.decode.high / after.decode.low


TINY_SHAPES = {
    "gpt_oss": speeds.Shape(
        "thin",
        {**released_gpt_oss_config("20b"), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32,
         "vocab_size": 256,
         "num_attention_heads": 8, "num_key_value_heads": 1, "num_local_experts": 4, "eos_token_id": 2},
        (140, 300), 16,
    ),
    "openelm": speeds.Shape("thin", {**shape_config("openelm-270m", 1), "vocab_size": 256, "model_dim": 64}, (20,), 16),
}  # fmt: skip


@pytest.mark.parametrize("family", TINY_SHAPES)
def test_what_is_timed_is_a_model_with_that_much_in_its_context(family):
    with speeds.works([TINY_SHAPES[family]]) as works:
        rows = speeds.timed(works)
        assert [each.is_prompt for each in works] == [False] * len(rows) + [True]
    model_bytes = {row.weight_bytes for row in rows}
    assert len(model_bytes) == 1
    assert all(row.family == family and row.seconds > 0 and row.prefill > 0 for row in rows)
    assert [row.kv_bytes for row in rows] == sorted(row.kv_bytes for row in rows)


def test_every_shape_of_both_backends_can_be_built_and_separates_the_terms():
    for on_cpu in (False, True):
        for family, known in KNOWN.items():
            rows = []
            for shape in speeds.shapes(family, on_cpu):
                spec = spec_from_config(shape.config)
                assert spec.context_length >= max(shape.contexts) + 1024
                for tokens in shape.contexts:
                    layers, cached = len(spec.layers), kv_cache_bytes(spec, tokens, 2)
                    weights = 2 * (spec.num_active_parameters() - spec.vocab_size * spec.hidden_size)
                    seconds = layers * known.layer_seconds + weights / known.weights + cached / known.keys_values
                    rows.append(calibration.Timed(family, layers, weights, cached, seconds))
            random = np.random.default_rng(1)
            noisy = [replace(each, seconds=each.seconds * random.normal(1, 0.01)) for each in rows]
            found = calibration.rates_from(noisy)[family]
            assert found.layer_seconds == pytest.approx(known.layer_seconds, rel=0.1)
            assert found.weights == pytest.approx(known.weights, rel=0.2)


def test_the_disk_gives_back_what_was_written(tmp_path, monkeypatch):
    rates = disk.disk_rates(3 * disk.PIECE_BYTES, (1, 4), tmp_path)
    assert [each.threads for each in rates] == [1, 4]
    assert all(each.cold > 0 and each.warm > 0 for each in rates)
    assert not list(tmp_path.iterdir())
    assert disk.cold_rate([disk.DiskRate(1, 2e9, 9e9), disk.DiskRate(8, 3e9, 9e9)]) == 3e9
    assert disk.cold_rate([disk.DiskRate(1, 8.9e9, 9e9)]) is None  # it came out of the cache
    monkeypatch.setattr(disk, "_digest", lambda piece, seen=[]: seen.append(1) or len(seen))
    with pytest.raises(ValueError, match="the bytes read differ"):
        disk.disk_rates(2 * disk.PIECE_BYTES, (1,), tmp_path)


def test_a_family_for_which_there_is_no_time_is_left_out(monkeypatch):
    clock, measured = FakeClock(), []

    def measure(family, clock):
        measured.append(family)
        clock.now += 40
        own = FakeClock()
        return speeds.timed(stand_ins(family, own), own)

    monkeypatch.setattr(speeds, "measure", measure)
    for seconds, families in ((200, ["gpt_oss", "openelm"]), (80, ["gpt_oss"])):
        end = clock() + seconds
        measured.clear()
        speeds.measured_speeds(this_machine(), clock=clock, with_disk=False, left=lambda end=end: end - clock())
        assert measured == families
