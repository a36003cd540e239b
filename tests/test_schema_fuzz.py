"""Schemas at random, each in a child process: whatever a schema holds, the process lives and what it writes is valid.

`OPENELM_MLX_FUZZ=10000` takes as many, with OPENELM_MLX_FUZZ_SEED as their seed.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import schema_fuzz

from openelm_mlx.decoding.json_patterns import matches

HERE = Path(__file__).parent
COUNT = int(os.environ.get("OPENELM_MLX_FUZZ", "300"))
SEED = int(os.environ.get("OPENELM_MLX_FUZZ_SEED", "7"))
SHARE = 500  # schemas a child


def faults_of(seed: int, first: int, count: int) -> tuple[dict[str, int], list[str]]:
    """The outcomes of one child, and what went wrong, each with the schema it was."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "schema_fuzz.py"), str(seed), str(first), str(count)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = child.stdout.splitlines()
    reports = [json.loads(line) for line in lines if line.startswith("{")]
    faults = [
        f"{report['fault']}\n  in schema {report['number']}: {_text_of(schema_fuzz.schema_of(seed, report['number']))[:2000]}"
        for report in reports
        if "fault" in report
    ]
    if child.returncode != 0:
        number = next((int(line) for line in reversed(lines) if line.isdigit()), first)
        schema = _text_of(schema_fuzz.schema_of(seed, number))[:2000]
        faults.append(f"the process ended with {child.returncode} in schema {number}: {schema}\n{child.stderr[-2000:]}")
    outcomes = next((report["outcomes"] for report in reports if "outcomes" in report), {})
    return outcomes, faults


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, COUNT, SHARE))
def test_the_process_lives_and_its_answers_are_valid(first):
    count = min(SHARE, COUNT - first)
    outcomes, faults = faults_of(SEED, first, count)
    assert not faults, "\n\n".join(faults[:10])
    assert sum(outcomes.values()) == count
    assert outcomes["answered"] > count // 4  # most are sound: the others are refused in a sentence


def test_a_schema_is_known_by_its_number():
    for number in (0, 17, 123):
        assert _text_of(schema_fuzz.schema_of(3, number)) == _text_of(schema_fuzz.schema_of(3, number))
    kinds: set[str] = set()
    for number in range(1500):
        text = _text_of(schema_fuzz.schema_of(3, number))
        kinds.update(key for key in schema_fuzz.KEYWORDS if f"{key!r}: " in text)
    assert set(schema_fuzz.KEYWORDS) <= kinds


@pytest.mark.parametrize("pattern", schema_fuzz.FOR_RE)
def test_what_re_is_given_in_place_of_a_pattern_means_the_same(pattern):
    """By the engine, which takes as many steps as there are characters."""
    texts = [*("a" * count for count in range(90)), "b", "ab", "aab", "größe", "ab_1", "123-4567", "123-456", "x y"]
    texts += ["a" * 40 + "b", "\u0661\u0662\u0663-\u0664\u0665\u0666\u0667"]
    found = [matches(pattern, text) for text in texts]
    assert found == [re.search(schema_fuzz.FOR_RE[pattern], text) is not None for text in texts]
    assert {True, False} == set(found)
    assert pattern in schema_fuzz.PATTERNS or pattern in inspect.getsource(schema_fuzz._large)


def _text_of(schema) -> str:
    try:
        return repr(schema)
    except (RecursionError, ValueError):  # very deep, or a number that Python refuses to print
        return "a schema that cannot be printed"


@pytest.mark.parametrize(
    ("code", "says"), [("os.kill(os.getpid(), 11)", "ended with -11"), ("1 / 0", "ZeroDivisionError")]
)
def test_a_child_that_dies_or_raises_is_reported_with_its_schema(monkeypatch, tmp_path, code, says):
    text = (HERE / "schema_fuzz.py").read_text(encoding="utf-8")
    changed = text.replace('    """ "refused",', f'    import os\n\n    {code}\n    """ "refused",')
    assert changed != text
    child = tmp_path / "tests" / "schema_fuzz.py"
    child.parent.mkdir()
    child.write_text(changed, encoding="utf-8")
    (tmp_path / "openelm_mlx").symlink_to(HERE.parent / "openelm_mlx")
    monkeypatch.setattr(sys.modules[__name__], "HERE", child.parent)
    _, faults = faults_of(3, 2, 1)
    assert says in faults[0]
    assert "schema 2" in faults[0]
