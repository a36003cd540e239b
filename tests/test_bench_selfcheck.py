"""The self-check: all is well here, what is broken is found, and an error in one check ends no other."""

import json

import mlx.core as mx
import pytest

from openelm_mlx.bench import selfcheck
from openelm_mlx.bench.selfcheck import CheckFailed, NotHere, check_parity, check_views, check_wired_limit, run_checks
from openelm_mlx.commands import main


def test_everything_passes_here(capsys):
    assert main(["selfcheck"]) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out
    assert "FAILED" not in out
    for name in selfcheck.CHECKS:
        assert name in out


def test_as_json_and_one_check(capsys):
    assert main(["selfcheck", "--only", "views", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [outcome["passed"] for outcome in report["outcomes"]] == [True]
    assert main(["selfcheck", "--only", "nothing of the kind"]) == 2
    assert "wired limit" in capsys.readouterr().err


def test_a_wrong_model_is_found(monkeypatch):
    original = selfcheck._fixture

    def wrong(name):
        model, tokens, expected = original(name)
        return model, tokens, expected + 0.001

    monkeypatch.setattr(selfcheck, "_fixture", wrong)
    with pytest.raises(CheckFailed, match="off by"):
        check_parity()


def test_views_that_are_copies_are_found(monkeypatch):
    import numpy as np

    monkeypatch.setattr(selfcheck.np, "array", lambda array, copy=True: np.asarray(array.tolist(), np.uint32))
    with pytest.raises(CheckFailed):
        check_views()


class Metal:
    def __init__(self, available=True, forgets=False):
        self.limit, self.forgets, self.calls = 7, forgets, []
        self.metal = self
        self.available = available

    def is_available(self):
        return self.available

    def set_wired_limit(self, limit):
        self.calls.append(limit)
        before, self.limit = self.limit, 0 if self.forgets else limit
        return before


def test_the_wired_limit_goes_round_and_is_restored():
    metal = Metal()
    assert "restored to 7" in check_wired_limit(metal)
    assert metal.limit == 7
    with pytest.raises(CheckFailed, match="read back"):
        check_wired_limit(Metal(forgets=True))
    with pytest.raises(NotHere):
        check_wired_limit(Metal(available=False))


def test_an_error_in_one_check_is_a_failure_and_ends_no_other(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CHECKS", {"first": lambda: 1 / 0, "second": lambda: "fine"})
    outcomes = list(run_checks())
    assert [outcome.passed for outcome in outcomes] == [False, True]
    assert "ZeroDivisionError" in outcomes[0].detail
    assert main(["selfcheck"]) == 1
    assert "1 failed" in capsys.readouterr().out
    assert mx.default_device() is not None
