"""The self-check: all is well here, what is broken is found, nothing in a report says whose machine it is, and whatever
happens to one check costs no other."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from openelm_mlx.bench import (
    report,
    selfcheck,
    selfcheck_kernels,
    selfcheck_machine,
    selfcheck_models,
    selfcheck_sandbox,
    speeds,
)
from openelm_mlx.bench.selfcheck import Check, CheckFailed, Clock, NotHere, Outcome, all_checks, run_check, run_checks
from openelm_mlx.commands import main
from openelm_mlx.commands import selfcheck as command
from openelm_mlx.errors import DestinationError
from openelm_mlx.memory.calibration import calibrated
from openelm_mlx.memory.machine import this_machine
from openelm_mlx.memory.measured import MeasuredRates

PLENTY = 1e6


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENELM_MLX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def outcomes_of(monkeypatch, outcomes, raised=None):
    """Have the command find these outcomes, and then be interrupted if that is `raised`."""

    def run(checks, seconds):
        yield from outcomes
        if raised is not None:
            raise raised

    monkeypatch.setattr(selfcheck, "run_checks", run)


def outcome(number=1, passed=True, found="all is well"):
    return Outcome(number, f"check {number}", passed, "that all is well", found, 0.5)


# --- the fifteen ------------------------------------------------------------------------------------------------------


def test_there_are_fifteen_with_an_expected_value_each_and_the_cheap_ones_first():
    checks = all_checks()
    assert sorted(checks) == list(range(1, 16))
    assert all(check.expected and check.number == number for number, check in checks.items())
    order = list(checks)
    assert order[0] == 1
    assert order.index(4) < order.index(12)
    assert order.index(9) < order.index(13)
    assert selfcheck.MOST_SECONDS + 20 <= 300
    assert max(check.seconds for check in checks.values()) <= selfcheck.MOST_SECONDS - selfcheck.TIMING_SECONDS


# The heavy ones run whole in the test of the command below; here each with the least that says something.
@pytest.mark.slow(first=1)
@pytest.mark.parametrize("number", [1, 4, 6, 9, 10, 12, 15])
def test_a_check_passes_here(number, monkeypatch):
    monkeypatch.setattr(selfcheck_machine, "disk_rates", lambda n, **k: DISK(2**22, (1, 4), **k))
    found = run_check(all_checks()[number])
    assert found.passed is (None if number == 10 else True), found.found
    assert found.found
    json.dumps(found.as_dict())


DISK = selfcheck_machine.disk_rates


def test_views_keep_their_memory_for_as_many_rounds_as_there_is_time():
    assert "100 rounds" in selfcheck_kernels.check_views(Clock(PLENTY), 100)
    assert selfcheck_kernels.check_views(Clock(0.5), 100).startswith("1 rounds")


def test_attention_in_the_forms_there_is_time_for(monkeypatch):
    assert "no time for the rest" in selfcheck_kernels.check_attention(Clock(0))
    for queries, window in ((1, None), (9, 16), (64, 16)):
        for dtype, most in ((mx.float32, 1e-5), (mx.bfloat16, 2e-2)):
            off = selfcheck_kernels._attention_error(queries, queries + 15, window, True, 4, 2, dtype)
            assert off <= most
    real = selfcheck_kernels.attend
    monkeypatch.setattr(selfcheck_kernels, "attend", lambda *a: real(*a) * 1.0001)
    with pytest.raises(CheckFailed, match="in float32: off float64"):
        selfcheck_kernels.check_attention(Clock(PLENTY))


def test_gpt_oss_loads_with_few_open_files():
    assert "24 layers" in selfcheck_models.check_open_files(Clock(PLENTY))


def test_a_wrong_model_is_found(monkeypatch):
    original = selfcheck_models._fixture

    def wrong(name):
        model, tokens, expected = original(name)
        return model, tokens, expected + 0.001

    monkeypatch.setattr(selfcheck_models, "_fixture", wrong)
    with pytest.raises(CheckFailed, match="off by"):
        selfcheck_models.check_parity(Clock(PLENTY))


def test_a_kernel_that_turns_wrongly_is_found(monkeypatch):
    real = selfcheck_kernels.rotate
    monkeypatch.setattr(selfcheck_kernels, "rotate", lambda *a: real(*a) + 1e-5)
    with pytest.raises(CheckFailed, match=r"off float64 by 1\.0e-05 at 33"):
        selfcheck_kernels.check_rope(Clock(PLENTY))


def test_a_product_that_depends_on_its_neighbours_is_found(monkeypatch):
    real = mx.gather_qmm

    def leaky(x, *words, **options):
        return real(x, *words, **options) + mx.mean(x) * 0.1

    monkeypatch.setattr(selfcheck_kernels.mx, "gather_qmm", leaky)
    with pytest.raises(CheckFailed, match="with the other rows"):
        selfcheck_kernels.check_expert_products(Clock(PLENTY))


def test_views_that_are_copies_are_found(monkeypatch):
    monkeypatch.setattr(selfcheck_kernels, "memory_of", lambda array: None)
    with pytest.raises(CheckFailed, match="copy"):
        selfcheck_kernels.check_views(Clock(PLENTY))
    monkeypatch.setattr(selfcheck_kernels, "memory_of", lambda array: np.zeros(array.shape, np.uint32))
    with pytest.raises(CheckFailed, match="round 0: a kernel summed 0"):
        selfcheck_kernels.check_views(Clock(PLENTY))


class Metal:
    """MLX with a wired limit. forgets: it does not keep it; leaks: bytes that each answer leaves."""

    def __init__(self, available=True, forgets=False, leaks=0):
        self.limit, self.forgets, self.leaks, self.active = 7, forgets, leaks, 1000
        self.metal, self.available = self, available

    def is_available(self):
        return self.available

    def set_wired_limit(self, limit):
        before, self.limit = self.limit, 0 if self.forgets else limit
        return before

    def clear_cache(self):
        pass

    def get_active_memory(self):
        return self.active

    def answers(self, count):
        self.active += self.leaks * count
        return count


def wired(metal, charged=lambda: None):
    return selfcheck_machine.check_wired_limit(Clock(PLENTY), metal, metal.answers, charged)


def test_the_wired_limit_goes_round_and_is_restored():
    metal = Metal()
    assert wired(metal).startswith("200 answers")
    assert metal.limit == 7
    with pytest.raises(CheckFailed, match="read back as 0"):
        wired(Metal(forgets=True))
    with pytest.raises(CheckFailed, match="bytes more are in use"):
        wired(Metal(leaks=10**5))
    footprints = iter([10**9, 2 * 10**9])
    with pytest.raises(CheckFailed, match="footprint is 1,000 MB larger"):
        wired(Metal(), lambda: SimpleNamespace(now=next(footprints)))
    with pytest.raises(NotHere):
        wired(Metal(available=False))


def test_a_peak_below_mlx_s_is_found(monkeypatch):
    monkeypatch.setattr(selfcheck_machine, "this_machine", lambda: SimpleNamespace(backend="metal"))
    peaks = {"MLX's": 90 * 10**6, "ru_maxrss": 5 * 10**6, "the process's": 100 * 10**6, "plan": 120 * 10**6}
    monkeypatch.setattr(selfcheck_machine, "run_fresh", lambda *_, **__: peaks)
    assert "MLX's 90 MB, ru_maxrss 5 MB, the process's 100 MB" in selfcheck_machine.check_peaks(Clock(PLENTY))
    peaks["the process's"] = 80 * 10**6
    with pytest.raises(CheckFailed, match="below MLX's"):
        selfcheck_machine.check_peaks(Clock(PLENTY))


def test_a_sandbox_that_lets_something_through_is_found(tmp_path):
    def through(script):
        return "MB of memory" if "parts" in script else "'a password'"

    names = [name for name, _ in selfcheck_sandbox._attacks(through, tmp_path, 1, True)]
    assert "the network is there" in names
    assert "another process's environment can be read" in names
    assert len(names) == 7
    right = {"numpy": "3", "KERN": "-1", "sysctl": "-1", "parts": "stopped: 2,100 MB of memory"}

    def refused(script):
        return next((text for word, text in right.items() if word in script), "PermissionError: [Errno 1]")

    assert selfcheck_sandbox._attacks(refused, tmp_path, 1, True) == []


def test_the_watchdog_is_named(monkeypatch):
    def struck(*_, **__):
        raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error")

    monkeypatch.setattr(selfcheck_models, "prefill", struck)
    found = run_check(all_checks()[13])
    assert found.passed is False
    assert "GPU Timeout" in found.found


# --- processes, time, and what ends either ----------------------------------------------------------------------------


class Script:
    """In a worker's place: what it says of each check, None where it says nothing; `ends`: how its process ended."""

    def __init__(self, says, clock, ends):
        self.says, self.clock, self.ends, self.ended = iter(says), clock, ends, 0

    def next(self, seconds):
        found = next(self.says, None)
        self.clock.now += seconds if found is None else found.seconds
        return found

    def end(self):
        self.ended += 1
        return self.ends


class FakeTime:
    now = 0.0

    def __call__(self):
        return self.now


def fake_checks(count=3, seconds=40):
    return [Check(n, f"check {n}", "that all is well", seconds, lambda clock: "fine") for n in range(1, count + 1)]


def test_a_check_whose_process_ends_fails_and_the_others_run_in_another():
    clock, scripts = FakeTime(), []

    def start(numbers, seconds):
        scripts.append(
            Script(
                [outcome(1)] if len(scripts) == 0 else [outcome(3)], clock, "its process ended with signal 6 (SIGABRT)"
            )
        )
        assert numbers == ([1, 2, 3] if len(scripts) == 1 else [3])
        return scripts[-1]

    found = list(run_checks(fake_checks(), 1000, clock, start))
    assert [(each.number, each.passed) for each in found] == [(1, True), (2, False), (3, True)]
    assert "SIGABRT" in found[1].found
    assert all(each.ended for each in scripts)


def test_a_check_that_never_ends_is_ended_and_one_without_time_is_not_run():
    clock = FakeTime()
    scripts = []

    def start(numbers, seconds):
        scripts.append(Script([], clock, None))
        return scripts[-1]

    found = list(run_checks(fake_checks(5), 100, clock, start))
    assert [each.passed for each in found] == [False, None, None, None, None]
    assert "longer than 40 s and was ended" in found[0].found
    assert "not run" in found[2].found
    assert "--only 3 runs it alone" in found[2].found
    assert clock.now <= 100 + selfcheck._LATE_SECONDS


def test_five_minutes_are_enough_whatever_hangs():
    clock = FakeTime()
    found = list(run_checks(list(all_checks().values()), clock=clock, start=lambda *_: Script([], clock, None)))
    assert len(found) == 15
    assert clock.now <= 295
    # Whether the last one would have ended nobody has waited to see.
    assert {each.passed for each in found if each.seconds < 30} == {None}


def test_a_process_that_not_even_a_kill_ends_is_left_behind(monkeypatch):
    """One that waits for its GPU in the kernel: macOS ends it when the GPU does."""
    worker, waits = selfcheck.Worker([1], 100), []
    worker.next(60)
    process = worker._process

    def wait(timeout=None):
        waits.append(timeout)
        assert timeout is not None, "would wait for ever"
        raise subprocess.TimeoutExpired("python", timeout)

    with monkeypatch.context() as patch:
        patch.setattr(process, "wait", wait)
        assert worker.end() is None
    assert len(waits) == 2
    process.wait()


def test_who_stops_listening_ends_the_process():
    clock = FakeTime()
    script = Script([outcome(1), outcome(2)], clock, None)
    for _ in run_checks(fake_checks(), 1000, clock, lambda *_: script):
        break
    assert script.ended == 1


def test_real_processes_run_and_can_be_ended():
    checks = all_checks()
    found = list(run_checks([checks[1], checks[4], checks[10]]))
    assert [(each.number, each.passed) for each in found] == [(1, True), (4, True), (10, None)]
    worker = selfcheck.Worker([1], 100)
    os.kill(worker._process.pid, signal.SIGABRT)
    assert worker.next(60) is None
    assert "SIGABRT" in worker.end()


def test_an_unexpected_error_is_a_failure():
    found = run_check(replace(all_checks()[1], run=lambda clock: 1 / 0))
    assert found.passed is False
    assert found.found.startswith("ZeroDivisionError: division by zero (test_bench_selfcheck.py:")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_report_has_each_check_with_what_should_be_and_what_is(monkeypatch, capsys, own_folder):
    outcomes_of(monkeypatch, [outcome(1), outcome(10, None, "the wired limit is Metal's")])
    assert main(["selfcheck", "--no-timings"]) == 0
    out = capsys.readouterr().out
    assert "pass                 1. check 1 (0.5 s)" in out
    assert "expected: that all is well" in out
    assert "reason:   the wired limit is Metal's" in out
    assert "1 of 15 checks passed, 0 failed, 14 did not run or do not apply here" in out
    (file,) = own_folder.iterdir()
    assert file.name == f"selfcheck-{time.strftime('%Y-%m-%d')}.json"
    kept = json.loads(file.read_text())
    assert [each["number"] for each in kept["checks"]] == [1, 10]
    assert kept["checks"][0]["expected"] == "that all is well"
    assert {"chip", "memory_bytes", "working_set_bytes", "architecture", "open_files", "system"} <= set(kept["facts"])
    assert main(["selfcheck", "--no-timings"]) == 0  # its own report of the same day may go


def test_a_failed_check_gives_1(monkeypatch, capsys):
    outcomes_of(monkeypatch, [outcome(1), outcome(2, False, "off by 3")])
    monkeypatch.setattr(command, "time_machine", lambda *_: pytest.fail("timed"))
    assert main(["selfcheck", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["passed"] for each in found["checks"]] == [True, False]


def test_ctrl_c_tells_what_is_known(monkeypatch, capsys, own_folder):
    outcomes_of(monkeypatch, [outcome(1)], KeyboardInterrupt())
    assert main(["selfcheck"]) == 130
    assert "Interrupted. 1 of 15 checks passed" in capsys.readouterr().out
    (file,) = own_folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["interrupted"] is True
    assert len(kept["checks"]) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[METAL] no such kernel in /Users/ada/x"), "RuntimeError: [METAL] no such kernel in ~/x (test_bench_"),
        (DestinationError("The folder /Volumes/T7/c cannot be written."), "The folder /Volumes/.../c cannot be written."),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=["metal", "cache", "full disk"],
)  # fmt: skip
def test_an_error_while_timing_costs_no_report(error, said, monkeypatch, capsys, own_folder):
    """Minutes of checks are in it; and it is there before, for an error that ends the process."""
    outcomes_of(monkeypatch, [outcome(1)])

    def time_machine(*_):
        (file,) = own_folder.iterdir()
        assert len(json.loads(file.read_text())["checks"]) == 1
        raise error

    monkeypatch.setattr(command, "time_machine", time_machine)
    assert main(["selfcheck"]) == 1
    told = capsys.readouterr()
    (file,) = own_folder.iterdir()
    kept = json.loads(file.read_text())
    assert said in kept["timing_failed"]
    assert f"The timing ended with an error: {kept['timing_failed']}" in told.out
    assert "Traceback" not in told.err
    assert "1 of 15 checks passed, 0 failed" in told.out


def test_one_check(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(selfcheck, "run_checks", lambda checks, seconds: asked.extend(checks) or iter(()))
    assert main(["selfcheck", "--only", "disk"]) == 0
    assert main(["selfcheck", "--only", "12"]) == 0
    assert [each.number for each in asked] == [8, 12, 12]
    capsys.readouterr()
    assert main(["selfcheck", "--only", "nothing of the kind"]) == 2
    assert "10 wired limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f.write_text("mine"), "holds something else"), (lambda f: f.mkdir(), "is a folder"),
        (lambda f: f.write_text('{"format": "x"}'), "holds something else"),
    ],
    ids=["text", "folder", "json"],
)  # fmt: skip
def test_what_it_did_not_write_stays(make, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(selfcheck, "run_checks", lambda *_: pytest.fail("minutes were spent on it"))
    file = tmp_path / "report.json"
    make(file)
    before = file.is_dir() or file.read_text()
    assert main(["selfcheck", "--no-timings", "--output", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert (file.is_dir() or file.read_text()) == before
    assert main(["selfcheck", "--no-timings", "--output", str(tmp_path / "no" / "x.json")]) == 2


RATES = {"openelm": MeasuredRates(46e-6, 336e9, 152e9, 9e12)}


@pytest.mark.parametrize(("words", "answer", "kept"), [([], "n", {}), ([], "y", RATES), (["--keep"], None, RATES)])
def test_speeds_are_kept_when_somebody_says_so(words, answer, kept, monkeypatch, capsys):
    outcomes_of(monkeypatch, [outcome(1)])
    monkeypatch.setattr(speeds, "measured_speeds", lambda machine, **_: speeds.Speeds(RATES, {}, []))
    monkeypatch.setattr("builtins.input", lambda prompt="": answer if answer else pytest.fail("asked"))
    monkeypatch.setattr(command.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(command, "terminal", lambda: SimpleNamespace(isatty=lambda: True))
    assert main(["selfcheck", *words]) == 0
    assert "openelm: 46 us a layer, weights at 336 GB/s" in capsys.readouterr().out
    calibration = calibrated(this_machine()).calibration
    assert ({} if calibration is None else calibration.rates) == kept


def test_without_a_terminal_nobody_is_asked(monkeypatch, capsys):
    outcomes_of(monkeypatch, [outcome(1)])
    monkeypatch.setattr(speeds, "measured_speeds", lambda machine, **_: speeds.Speeds(RATES, {}, []))
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("asked"))
    assert main(["selfcheck"]) == 0
    assert "They are not kept: use --keep" in capsys.readouterr().out


# --- nothing personal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "then"),
    [
        ("FileNotFoundError: /Users/ada/models/x.json (a.py:3)", "FileNotFoundError: ~/models/x.json (a.py:3)"),
        ("/Users/ada", "~"), ("/home/grace/x", "~/x"), ("/Users/Shared/x", "/Users/Shared/x"),
        ("in '/Volumes/Adas Disk/models' it", "in '/Volumes/.../models' it"),
        ("in '/Volumes/Eve O'Brien/models' it", "in '/Volumes/.../models' it"),
        ("in '/Volumes/Eve\u2019s (old), 2/m' it", "in '/Volumes/.../m' it"),
        ("'/Volumes/T7' and '/x/y'", "'/Volumes/...' and '/x/y'"), ("/Volumes/T7: full", "/Volumes/...: full"),
        ("/private/var/folders/q4/8xk2_1n/T/openelm_mlx-1/m", "<temporary>/T/openelm_mlx-1/m"),
        ("Adas-MacBook-Pro.local says", "<name> says"), ("user ADA of lovelace", "user <name> of <name>"),
        ("Canada and adapters", "Canada and adapters"), ("Apple M3 Max, root", "Apple M3 Max, root"),
    ],
)  # fmt: skip
def test_names_and_places_are_left_out(text, then):
    names = ["Adas-MacBook-Pro.local", "Adas-MacBook-Pro", "ada", "Ada Lovelace", "Ada", "Lovelace", "root", "apple"]
    clean = report.cleaner(Path("/Users/ada"), names, "/var/folders/q4/8xk2_1n/T")
    assert clean(text) == then
    assert clean({"a": [text, 3, None, True]}) == {"a": [then, 3, None, True]}


def test_a_report_says_nothing_of_whose_machine_it_is(monkeypatch, capsys, own_folder):
    home = Path.home()
    leaks = f"{home}/secret failed on {os.uname().nodename} in {own_folder}"
    monkeypatch.setattr(report.platform, "node", lambda: "Adas-MacBook-Pro.local")
    monkeypatch.setenv("USER", "ada_lovelace")
    outcomes_of(monkeypatch, [outcome(1, False, leaks + " by ada_lovelace, /Users/ada/x, Adas-MacBook-Pro")])
    main(["selfcheck", "--no-timings"])
    (file,) = own_folder.iterdir()
    for text in (capsys.readouterr().out, file.read_text()):
        for word in (str(home) + "/", "ada_lovelace", "/Users/ada", "Adas-MacBook-Pro"):
            assert word not in text
        assert os.uname().nodename not in text or len(os.uname().nodename) < 3
        assert "~/secret failed on" in text


@pytest.mark.slow
def test_the_whole_of_it_here(own_folder):
    """As a user runs it, but for what is timed: fifteen checks in processes of their own, none of which fails."""
    finished = subprocess.run(
        [sys.executable, "-m", "openelm_mlx", "selfcheck", "--no-timings", "--output", "r.json"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path(selfcheck.__file__).parents[2])},
    )  # fmt: skip
    kept = json.loads((own_folder / "r.json").read_text())
    assert len(kept["checks"]) == 15
    failed = [each for each in kept["checks"] if each["passed"] is False and "took longer" not in each["found"]]
    assert not failed, finished.stdout + finished.stderr
    assert [each["number"] for each in kept["checks"]] == list(all_checks())
    assert str(Path.home()) + "/" not in finished.stdout
