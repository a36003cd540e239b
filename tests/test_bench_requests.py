"""`bench --requests`: equal work on both sides, figures that are what they say, and errors that cost themselves only."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import pytest
from test_bench_against import small

from benchmarks import requests as command
from openelm_mlx.bench import random_pair as pairs
from openelm_mlx.bench import request_runs, requests
from openelm_mlx.bench.random_pair import random_pair
from openelm_mlx.bench.request_rows import PARTS, Row, Settings, titles
from openelm_mlx.bench.request_runs import (
    Load,
    Timeline,
    Window,
    aligned_load,
    mixed_load,
    read_prompt,
    run_batches,
    run_engine,
    without_ends,
)
from openelm_mlx.bench.requests import OURS, THEIRS, run_parts
from openelm_mlx.commands import main
from openelm_mlx.errors import SettingError
from openelm_mlx.generate import stream_generate
from openelm_mlx.memory import machine

PLENTY = 600.0
TINY = Settings(
    (1, 2), prompt_tokens=8, completion_tokens=6, long_prompt=40, num_mixed=5, rounds=1, seconds=PLENTY, parts=PARTS
)


def tiny(shape, num_layers=None):
    config = small(shape, num_layers)
    if shape.startswith("openelm"):
        config |= {"max_context_length": 256}
    return config


@pytest.fixture(scope="module", params=["openelm-270m", "gpt-oss-20b"])
def pair(request):
    model, other = random_pair(tiny(request.param), 4 if request.param.startswith("openelm") else None)
    return without_ends(model), other


@pytest.fixture(scope="module")
def openelm():
    model, other = random_pair(tiny("openelm-270m"))
    return without_ends(model), other


# --- loads ------------------------------------------------------------------------------------------------------------


def test_the_usual_mixed_load_is_always_the_same_and_as_large_as_it_says(pair):
    model, _ = pair
    load, again = (mixed_load(model, longest=2048) for _ in range(2))
    assert load == again
    assert mixed_load(model, seed=1, longest=2048) != load
    assert mixed_load(model).num_prompt_tokens < 31_950 / 16 * 1.02  # on a CPU
    assert all(
        len(prompt) + new <= model.context_length for prompt, new in zip(load.prompts, load.new_tokens, strict=True)
    )
    if model.context_length >= 2240:
        assert (len(load.prompts), load.num_prompt_tokens, load.num_new_tokens) == (64, 31_950, 7_176)
        assert min(map(len, load.prompts)) >= 64
        assert 1900 < max(map(len, load.prompts)) <= 2048
    else:
        assert load.num_prompt_tokens < 31_950 * 256 / 2048 * 1.05


def test_aligned_prompts_are_of_one_length_and_no_two_are_equal(openelm):
    load = aligned_load(openelm[0], 5, 12, 3)
    assert {len(each) for each in load.prompts} == {12}
    assert len(set(map(tuple, load.prompts))) == 5
    assert load.first(2, 1) == Load(load.prompts[:2], [1, 1])


# --- how a load is answered -------------------------------------------------------------------------------------------


def test_both_sides_give_every_request_all_its_tokens(pair):
    model, other = pair
    load = Load(aligned_load(model, 3, 6, 1).prompts, [5, 1, 9])
    for timeline in (run_engine(model, load, PLENTY), run_batches(other, load, PLENTY)):
        assert [len(each) for each in timeline.arrivals] == [5, 1, 9]
        assert timeline.is_complete
        assert all(sooner <= later for each in timeline.arrivals for sooner, later in pairwise(each))
        assert timeline.seconds == max(each[-1] for each in timeline.arrivals)
        assert timeline.peak_bytes > 0


def test_an_end_of_text_ends_nothing():
    model, _ = random_pair(tiny("openelm-270m"), theirs=False)
    prompt = aligned_load(model, 1, 6, 1).prompts[0]
    likeliest = next(stream_generate(model, None, prompt, max_tokens=1)).token
    assert len(list(stream_generate(model, None, prompt, max_tokens=4))) == 4
    model.spec = replace(model.spec, eos_tokens=(likeliest,))
    assert len(list(stream_generate(model, None, prompt, max_tokens=4))) == 1
    assert len(run_engine(without_ends(model), Load([prompt], [4]), PLENTY).arrivals[0]) == 4


def test_what_takes_too_long_is_given_up(openelm):
    model, other = openelm
    load = aligned_load(model, 2, 6, 100)
    for timeline in (run_engine(model, load, 0.0), run_batches(other, load, 0.0)):
        assert not timeline.is_complete
        assert timeline.given_up_after > 0
        assert timeline.num_tokens < 200
    assert run_engine(model, load.first(2, 3), PLENTY).is_complete  # nothing is left of it


def test_a_window_counts_from_when_all_decode():
    window = Window(wanted=2, left_out=1)
    seen = [([1, 0], 1.0), ([4, 0], 2.0), ([5, 1], 3.0), ([6, 2], 4.0), ([7, 3], 5.0), ([9, 4], 6.0)]
    over = [window.is_over([[0.0] * each for each in counts], now) for counts, now in seen]
    assert over == [False] * 5 + [True]
    assert (window.began, window.ended) == (4.0, 6.0)
    assert window.rate == (9 + 4 - 6 - 2) / 2.0
    assert window.tokens_before == 4.0
    assert Window(2, 1).rate is None


@pytest.mark.parametrize("side", [OURS, THEIRS])
def test_a_window_ends_a_run(openelm, side):
    model, other = openelm
    window, load = Window(3, 2), aligned_load(model, 2, 6, 200)
    timeline = run_engine(model, load, PLENTY, window) if side == OURS else run_batches(other, load, PLENTY, window)
    assert timeline.is_complete
    assert window.rate > 0
    assert all(5 < len(each) < 200 for each in timeline.arrivals)


@pytest.mark.slow(first=1)
def test_mlx_lm_s_rows_begin_together_where_ours_are_on_average(pair):
    """After a prompt that is computed once, the same as if each had computed it."""
    ours, other = pair
    is_gpt_oss = ours.spec.layers[0].window is not None
    prompt = list(range(3, 150 if is_gpt_oss else 80))  # past gpt-oss's window of 128, and past a chunk
    load = Load([[5], [9], [11]], [4] * 3)
    together = run_batches(other, load, PLENTY, caches=read_prompt(other, prompt, 3, chunk=64))
    assert len({each[0] for each in together.arrivals}) == 1
    assert [len(each) for each in together.arrivals] == [4] * 3
    cache = read_prompt(other, prompt, 1, chunk=64)[0]
    known = other(mx.array([[*prompt, 5]]))[0, -1].astype(mx.float32)
    found = other(mx.array([[5]]), cache=cache)[0, -1].astype(mx.float32)
    assert mx.abs(found - known).max().item() < 0.1 * mx.std(known).item() + 0.05


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _short_loads(monkeypatch):
    for name, value in (("SHORTEST", 4), ("LONGEST", 48), ("FEWEST", 2), ("MOST", 12)):
        monkeypatch.setattr(request_runs, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("_short_loads")
def test_every_part_has_its_rows(pair):
    said = []
    rows = list(run_parts(*pair, TINY, said.append))
    assert [row.error for row in rows] == [None] * len(rows)
    assert [(row.part, row.what) for row in rows] == [
        ("decode", "1"), ("decode", "2"), ("mixed", "until all are answered"), ("mixed", "median first token after"),
        ("mixed", "last first token after"), ("mixed", "most memory beside the weights"), ("one", "decode"),
        ("one", "first token after"), ("gap", "a prompt of 40 tokens"), ("gap", "until its first token"), ("together", "2"),
    ]  # fmt: skip
    sides = {row.part: list(row.samples) for row in reversed(rows)}
    assert sides == {
        "decode": [OURS, THEIRS], "mixed": [OURS, THEIRS], "one": ["engine", "alone"], "gap": ["longest", "usual"],
        "together": ["together", "in turn"],
    }  # fmt: skip
    assert all(value > 0 for row in rows for each in row.samples.values() for value in each)
    assert any("decode of 2: mlx-lm" in each for each in said)
    assert {row.part for row in rows} == set(titles(TINY))


@pytest.mark.usefixtures("_short_loads")
def test_ours_alone_has_no_ratio_with_mlx_lm(openelm):
    settings = Settings(**{**vars(TINY), "numbers": (2,), "parts": ("decode", "mixed")})
    rows = list(run_parts(openelm[0], None, settings, lambda _: None))
    assert [list(row.samples) for row in rows] == [[OURS]] * 5
    assert {row.ratio for row in rows} == {None}
    assert "ratio" not in rows[0].line()


def test_without_time_one_round_is_made_and_the_rest_is_told(openelm, monkeypatch):
    monkeypatch.setattr(requests, "LEAST_SECONDS", PLENTY)
    settings = Settings(**{**vars(TINY), "seconds": 0.0, "rounds": 5, "parts": ("decode", "gap")})
    rows = list(run_parts(*openelm, settings, lambda _: None))
    assert [len(each) for each in rows[0].samples.values()] == [1, 1]
    assert rows[1].error.startswith("not measured, no time was left")
    assert [len(each) for each in rows[2].samples.values()] == [1, 1]


@pytest.mark.usefixtures("_short_loads")
def test_a_part_that_fails_ends_no_other(openelm, monkeypatch):
    def short(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 1.7 GB.")

    monkeypatch.setattr(requests, "run_batches", short)
    settings = Settings(**{**vars(TINY), "numbers": (2,), "parts": ("decode", "mixed", "together")})
    rows = list(run_parts(*openelm, settings, lambda _: None))
    assert [row.error for row in rows] == ["RuntimeError: [malloc] Unable to allocate 1.7 GB."] * 2 + [None]
    assert "Unable to allocate" in rows[0].line()


def test_requests_that_end_before_all_are_in_are_told(openelm):
    part = requests._Part(*openelm, TINY, lambda _: None, math.inf)
    row = Row("decode", "30", "tokens/s")
    assert not part._count(row, 1, OURS, Window(2, 2), Timeline([[1.0]]))
    assert "ask for shorter prompts, or fewer requests" in row.error
    assert not part._count(row, 1, OURS, Window(2, 2), Timeline([[1.0]], given_up_after=7.0))
    assert row.error == "ours: not within 7 s: give more --seconds"


@pytest.mark.usefixtures("_short_loads")
def test_mlx_lm_that_does_not_finish_gives_bounds(openelm, monkeypatch):
    real = request_runs.run_batches

    def slow(model, load, seconds, *rest, **options):
        timeline = real(model, load, PLENTY, *rest, **options)
        if len(load.prompts) == 5:  # not the one that warms up
            timeline.given_up_after = timeline.seconds
            timeline.arrivals[4].clear()
        return timeline

    monkeypatch.setattr(requests, "run_batches", slow)
    settings = Settings(**{**vars(TINY), "rounds": 2, "parts": ("mixed",)})
    rows = list(run_parts(*openelm, settings, lambda _: None))
    assert [sorted(row.at_least) for row in rows] == [[THEIRS], [], [THEIRS], []]
    assert "mlx-lm > " in rows[0].line()
    assert "ratio < " in rows[0].line()
    assert "mlx-lm was given up after" in rows[0].note
    assert [len(row.samples[THEIRS]) for row in rows] == [1] * 4  # it is not tried again
    assert [len(row.samples[OURS]) for row in rows] == [2] * 4


def test_a_row():
    row = Row("decode", "8", "tokens/s", {OURS: [30.0, 10.0, 20.0], THEIRS: [10.0]}, note="at 136 to 200 tokens each")
    assert row.ratio == 2.0
    assert row.line().split("  ")[0] == "8"
    assert " ".join(row.line().split()) == (
        "8 ours 20 [10 to 30] tokens/s mlx-lm 10 tokens/s ratio 2 at 136 to 200 tokens each"
    )
    row.at_least.add(OURS)
    assert row.ratio is None
    assert json.loads(json.dumps(row.as_dict()))["at_least"] == [OURS]


@pytest.mark.parametrize("change", [{"rounds": 0}, {"prompt_tokens": 1}, {"parts": ["speed"]}, {"num_mixed": 0}])
def test_settings_are_checked(change):
    with pytest.raises(SettingError, match="speed" if "parts" in change else "must be at least"):
        Settings(**change)


# --- the commands -----------------------------------------------------------------------------------------------------

QUICK = [
    "--prompt-tokens",
    "8",
    "--completion-tokens",
    "4",
    "--rounds",
    "1",
    "--seconds",
    "600",
    "--long-context",
    "30",
]


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(pairs, "shape_config", lambda shape, num_layers=None: tiny(shape))


@pytest.mark.slow
def test_bench_requests_prints_tables(tiny_shapes, capsys):
    assert main(["bench", "--random", "openelm-270m", "--requests", "1,2,1", *QUICK]) == 0
    told = capsys.readouterr()
    assert "decode of N requests at once, tokens/s of all (prompts of 8 tokens)\n  1  " in told.out
    assert "N requests together, and one after the other" in told.out
    assert told.out.count("\n  2  ") == 2
    assert "mlx-lm" in told.out
    assert "many lengths" not in told.out
    assert "decode of 2: ours" in told.err


@pytest.mark.slow
def test_bench_requests_of_a_source_prints_json(capsys):
    options = ["--against", "nothing", "--requests", "2", "--json"]
    assert main(["bench", "--model", "demo-openelm", *options, *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "demo-openelm"
    assert {row["part"] for row in found["rows"]} == {"decode", "one", "gap", "together"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests", "0"], "--requests is '0'"), (["--requests", "two"], "--requests is 'two'"),
        (["--requests", "2000"], "from 1 to 1,024"), (["--mixed"], "--mixed: only for --requests"),
        (["--requests", "2", "--apart", "--random", "openelm-270m"], "--apart: not with --requests"),
        (["--requests", "2", "--chart", "x.png"], "--chart: not with --requests"),
        (["--requests", "2", "--rounds", "0"], "--rounds is 0"), (["--requests", "2", "--bits", "4"], "--random"),
        (["--requests", "2", "--long-context", "-1"], "--long-context is -1"),
        (["--requests", "2", "--random", "gpt-5"], "gpt-oss-20b"),
    ],
)  # fmt: skip
def test_bad_options_are_sentences(options, said, capsys):
    assert main(["bench", *options]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_model_that_leaves_no_room_for_mlx_lm_s_is_told(monkeypatch, capsys):
    real = machine.this_machine()
    small_machine = replace(real, working_set_bytes=10_000_000)
    monkeypatch.setattr(machine, "this_machine", lambda: small_machine)
    assert main(["bench", "--requests", "2", *QUICK]) == 2
    assert "add --against nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_developers_command(tiny_shapes, capsys):
    options = ["--shapes", "openelm-270m:4,gpt-oss-20b", "--requests", "2", "--parts", "decode,gap", *QUICK]
    assert command.main(options) == 0
    told = capsys.readouterr()
    assert "openelm-270m in 4 bits: random weights drawn in" in told.out
    assert "gpt-oss-20b: random weights drawn in" in told.out
    assert told.out.count("decode of N requests at once") == 2


def test_the_developers_command_goes_on_after_a_shape_that_fails(tiny_shapes, monkeypatch, capsys):
    real = pairs.random_pair

    def short(config, bits=None, theirs=True):
        if bits == 4:
            raise RuntimeError("[malloc] Unable to allocate 1.7 GB.")
        return real(config, bits, theirs)

    monkeypatch.setattr(pairs, "random_pair", short)
    options = ["--shapes", "openelm-270m:4,openelm-270m", "--requests", "1", "--parts", "one", "--json"]
    assert command.main([*options, "--against", "nothing", *QUICK]) == 1
    found = json.loads(capsys.readouterr().out)["shapes"]
    assert found["openelm-270m:4"] == {"rows": [], "error": "RuntimeError: [malloc] Unable to allocate 1.7 GB."}
    assert [row["what"] for row in found["openelm-270m"]["rows"]] == ["decode", "first token after"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "openelm-270m:3"], "after the colon stand bits"), (["--seconds", "0"], "--seconds is 0"),
        (["--layers", "0"], "--layers is 0"), (["--parts", "speed"], "no part 'speed'"),
        (["--requests", "1,x"], "--requests is '1,x'"), (["--rounds", "0"], "rounds is 0"),
    ],
)  # fmt: skip
def test_its_bad_options_are_one_sentence(words, said, capsys):
    assert command.main(words) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""
