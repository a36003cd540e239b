"""Routing traces and their simulator: the engine's own counts, to the last hit; the bench over tiny shapes."""

import json

import numpy as np
import pytest
from short_demos import short_demo

import openelm_mlx as om
from benchmarks.measurements import predictions, routing, streaming
from benchmarks.measurements.routing import Speed, Trace, alike, recording, replay, reuse_depths, uniform
from benchmarks.streaming import main
from openelm_mlx.checkpoint.layouts import Parameter
from openelm_mlx.engine.prompt import encode_prompt
from openelm_mlx.errors import DestinationError, SettingError
from openelm_mlx.experts.slots import LeastRecentlyUsed
from openelm_mlx.memory.machine import find_mac
from openelm_mlx.specs import spec_from_config

# A released shape, made small.
TINY = {
    "num_local_experts": 8, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 319,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs():
    """Slots -> (trace, statistics of the engine, layers run again) for two answers of the demo."""
    found = {}
    for num_slots in (4, 7, 12, 16):
        model, tokenizer = om.load(short_demo("demo-gpt-oss", 3), expert_slots=num_slots)
        with recording(model.residency) as trace:
            for word in ("banjo", "glacier"):
                prompt = encode_prompt(model, tokenizer, f"What is a {word}?").tokens[-40:]
                list(om.stream_generate(model, tokenizer, prompt, max_tokens=6, prefill_chunk=32))
        found[num_slots] = trace, model.residency.statistics()
    return found


@pytest.fixture(scope="module")
def demo_routes():
    return streaming.demo_trace(12)


@pytest.fixture
def short_trace(demo_routes, monkeypatch):
    """The demo answers once for all tests, and predictions are made of few tokens."""
    monkeypatch.setattr(streaming, "demo_trace", lambda: demo_routes)
    monkeypatch.setattr("benchmarks.streaming.PREDICTED_TOKENS", 24)


@pytest.mark.slow
def test_the_trace_is_the_same_whatever_is_in_memory(runs):
    first, *others = (trace for trace, _ in runs.values())
    assert (first.num_layers, first.num_experts, first.experts_per_token) == (3, 16, 4)
    assert {len(each) for each in first.passes} > {1, 32}
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first.passes, other.passes, strict=True))


@pytest.mark.parametrize("num_slots", [4, 7, 12, 16])
def test_replayed_hits_are_the_engine_s(runs, num_slots, tmp_path):
    """From the trace of another number of slots, through a file."""
    runs[16][0].save(tmp_path / "trace.npz")
    assert (tmp_path / "trace.npz").stat().st_size < 30_000
    replayed = replay(Trace.load(tmp_path / "trace.npz"), num_slots)
    engine = runs[num_slots][1]
    assert replayed.hits + replayed.prompt_hits == engine.hits
    assert replayed.misses + replayed.prompt_misses == engine.misses
    chunk_read_backs = sum((np.asarray(each)[-1, :, 0] >= 0).sum() for each in runs[16][0].passes if len(each) > 1)
    assert replayed.read_backs == engine.read_backs - chunk_read_backs


def test_more_slots_never_miss_more():
    """The least recently used order has that property for single tokens."""
    trace = alike(Trace(8, [np.arange(8, dtype=np.int16).reshape(1, 2, 4)]), 100, 3, 16, seed=1)
    misses = [replay(trace, num_slots).misses for num_slots in range(4, 17)]
    assert misses == sorted(misses, reverse=True)
    assert replay(trace, 16).misses <= 3 * 16


def test_uniform_routing_hits_by_chance():
    replayed = replay(uniform(2000, 2, 32, 4), 8)
    assert abs(replayed.hit_rate - 8 / 32) < 0.02
    assert replayed.num_tokens == 2000


def test_alike_keeps_how_soon_experts_come_back(runs):
    trace = runs[16][0]
    copy = alike(trace, 400, trace.num_layers, trace.num_experts)
    assert abs(np.mean(reuse_depths(copy)) - np.mean(reuse_depths(trace))) < 0.6
    wide = alike(trace, 100, 24, 32)
    assert wide.passes[0].shape == (1, 24, 4)
    assert all(len(set(row)) == 4 for each in wide.passes for row in each[0].tolist())
    assert replay(wide, 16).hit_rate > replay(uniform(100, 24, 32, 4), 16).hit_rate


def test_another_policy_can_be_simulated(runs):
    class Newest(LeastRecentlyUsed):
        def victim(self, candidates):
            return max(candidates, key=self._last_use.get)

    assert replay(runs[16][0], 8, Newest).misses != replay(runs[16][0], 8).misses


def test_times_are_sums():
    replayed = routing.Replay(8, 10, 700, 300, 50, 20, 0, 0)
    speed = Speed(layer_seconds=0.001, rest_seconds=0.1, read_back_seconds=0.01, read_rate=1e6)
    seconds = routing.seconds_per_token(replayed, 24, 1000, speed)
    assert seconds == pytest.approx(0.1 + 26 * 0.001 + 5 * 0.01 + 30 * 1000 / 1e6)
    again = routing.calibrated(seconds, 0.03, replayed, 24, 1000)
    assert routing.seconds_per_token(replayed, 24, 1000, again) == pytest.approx(seconds)


def test_the_released_sizes_have_their_expert_bytes():
    spec = spec_from_config(streaming.released_gpt_oss_config("20b"))
    assert routing.expert_bytes_of(spec) == 13_219_200
    rows = predictions.mac_predictions(
        "20b", uniform(50, 24, 32, 4), [(find_mac(name), (8, 32)) for name in ("M4 16GB", "M3 Max 36GB")]
    )
    assert [row["mac"] for row in rows] == ["M4 16GB", "M4 16GB", "M3 Max 36GB", "M3 Max 36GB"]
    assert rows[0]["tokens_per_second"] < rows[1]["tokens_per_second"] < rows[3]["tokens_per_second"]


def test_a_file_that_is_no_trace(tmp_path):
    (tmp_path / "trace.npz").write_bytes(b"no")
    with pytest.raises(SettingError, match="not a routing trace"):
        Trace.load(tmp_path / "trace.npz")


def test_the_demo_s_routes_are_those_of_its_single_tokens(demo_routes):
    assert (demo_routes.num_layers, demo_routes.num_experts, demo_routes.experts_per_token) == (6, 16, 4)
    assert sum(len(each) == 1 for each in demo_routes.passes) >= 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--slots x", "--slots is 'x'"), ("--slots 8,-1", "--slots is '-1'"), ("--at-once 0", "--at-once is '0'"),
        ("--at-once adapts,soon", "--at-once is 'soon'"), ("--writes pen", "one or several of auto, view, driver, copy"),
        ("--routing mine", "own, uniform, skewed"), ("--cache hot", "warm, cold"), ("--tokens 0", "from 1 on"),
        ("--slots 99", "from 4 to 16"), ("--random 20b --slots 33", "from 4 to 32"),
        ("--prefill -1", "from 0 on"), ("--json /nowhere/file", "there is no folder"),
        ("--json /", "that is a folder"), ("--record /nowhere/file", "there is no folder"),
        ("--random 20b --folder /no", "not a folder"), ("--predict 20b --macs M9", "no Mac 'M9'"),
        ("--model demo-openelm", "demo-openelm has no experts"), ("--model demo-openelm --record x.npz", "has no experts"),
        ("--predict 20b --json /nowhere/file", "there is no folder"),
        ("--predict 20b --trace /nowhere/file", "No such file"), (f"--predict 20b --trace {__file__}", "not a routing trace"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_measured(capsys, monkeypatch, options, words):
    monkeypatch.setattr(Parameter, "read", lambda *_: pytest.fail("a tensor was read"))
    assert main(["--tokens", "1", "--warm-up", "0", *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_a_recorded_trace_is_what_predictions_are_made_of(tmp_path, capsys, monkeypatch, short_trace):
    known, file = streaming.released_gpt_oss_config("20b"), tmp_path / "routes"
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "released_gpt_oss_config", lambda size: {**known, **TINY})
        assert main(f"--random 20b --layers 2 --record {file} --tokens 5 --warm-up 2".split()) == 0
    trace = Trace.load(file)
    assert (trace.num_experts, trace.num_layers) == (8, 2)
    assert [len(each) for each in trace.passes] == [64, *[1] * 7]
    capsys.readouterr()
    options = ["--predict", "20b", "--macs", "M4 16GB", "--json", str(tmp_path / "json")]
    assert main([*options, "--trace", str(file)]) == 0
    by_trace = json.loads((tmp_path / "json").read_text())["macs"]
    assert "routed as the trace routes" in capsys.readouterr().out
    assert main(options) == 0
    by_demo = json.loads((tmp_path / "json").read_text())["macs"]
    assert [row["slots"] for row in by_trace] == [8, 12, 16, 20, 24, 28, 32]
    assert [row["uniform"] for row in by_trace] == [row["uniform"] for row in by_demo]
    assert [row["hit_rate"] for row in by_trace] != [row["hit_rate"] for row in by_demo]
    for rows in (by_trace, by_demo):
        rates = [row["tokens_per_second"] for row in rows]
        assert rates == sorted(rates)
        assert rows[-1]["hit_rate"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": np.zeros((0, 2, 4), int), "lengths": np.zeros(0, int)}, {"experts": np.full((6, 2, 4), 3)},
        {"experts": np.arange(48).reshape(6, 2, 4)}, {"experts": np.full((6, 2, 4), -2)}, {"lengths": [500, 3]},
        {"lengths": [6]}, {"experts": np.arange(8.0).reshape(1, 2, 4), "lengths": [1]}, {"experts": np.arange(6)},
        {"num_experts": 0}, {"lengths": [[6]]},
    ],
)  # fmt: skip
def test_a_trace_that_cannot_be_is_refused(tmp_path, changes):
    right = {"num_experts": 16, "experts": np.arange(8).reshape(1, 2, 4).repeat(6, 0), "lengths": [3, 1, 1, 1]}
    with (tmp_path / "trace").open("wb") as stream:
        np.savez_compressed(stream, **right)
    assert Trace.load(tmp_path / "trace").num_layers == 2
    with (tmp_path / "trace").open("wb") as stream:
        np.savez_compressed(stream, **{**right, **changes})
    with pytest.raises(SettingError, match="not a possible routing trace"):
        Trace.load(tmp_path / "trace")


def test_routing_that_never_changes_can_be_stretched_and_squeezed():
    """Of 128 experts always the same four: in 32 they would all fall into one place."""
    same = Trace(128, [np.arange(4, dtype=np.int16).reshape(1, 1, 4)] * 20)
    for num_experts in (4, 32, 512):
        chosen = np.concatenate(alike(same, 30, 3, num_experts).passes)
        assert chosen.shape == (30, 3, 4)
        assert all(len(set(row)) == 4 for token in chosen.tolist() for row in token)
        assert chosen.max() < num_experts


@pytest.mark.slow
def test_every_mac_is_predicted_as_a_plan_leaves_it(capsys, short_trace):
    assert main(["--predict", "20b", "--macs", "all"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    slots = {" ".join(row[: row.index("slots") - 1]): int(row[row.index("slots") - 1]) for row in rows}
    assert len(slots) > 40
    assert slots["M4 Max 128GB"] == 32
    assert slots["M4 16GB"] == om.plan("openai/gpt-oss-20b", mac="M4 16GB").expert_slots < 32


@pytest.mark.slow
def test_the_bench_over_a_tiny_shape(tmp_path, capsys, monkeypatch, short_trace):
    known = streaming.released_gpt_oss_config("20b")
    monkeypatch.setattr(streaming, "released_gpt_oss_config", lambda size: {**known, **TINY})
    monkeypatch.setattr("benchmarks.streaming.predict", lambda *_: None)
    arguments = (
        "--random 20b --layers 2 --routing own,uniform,skewed --cache warm,cold --writes view,copy --tokens 3 --warm-up 2 "
        f"--prefill 40 --slots 6,4 --json {tmp_path / 'out.json'}"
    )
    assert main(arguments.split()) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["row"]) == 2 * 2 * 3 * 2 * 2
    assert all(each["is_identical"] for each in found["identical"])
    assert all(
        each["floor_seconds"] > each["resident_seconds"] or each["bytes_per_token"] == 0 for each in found["row"]
    )
    assert all(each.get("reads_per_expert", 0) <= 1 for each in found["prefill"])
    assert [each.get("cache") for each in found["prefill"]] == [None, *["warm", "cold"] * 4]
    shown = capsys.readouterr().out
    assert "uniform" in shown
    assert "{" not in shown
    assert "all experts in memory, routing skewed: " in shown
    assert "    6 slots, routing own, writes copy: the same tokens as with all in memory" in shown
    assert "a prompt of 40 tokens in one chunk: " in shown


def test_a_trace_replaces_a_trace_and_no_other_archive(runs, tmp_path):
    file, trace = tmp_path / "trace.npz", runs[16][0]
    trace.save(file)
    trace.save(file)
    whole = file.read_bytes()
    np.savez_compressed(file, num_experts=1, lengths=2, experts=3, more=4)
    for theirs in (file.read_bytes(), whole[:60]):
        file.write_bytes(theirs)
        with pytest.raises(DestinationError, match="holds something else"):
            trace.save(file)
        assert file.read_bytes() == theirs
