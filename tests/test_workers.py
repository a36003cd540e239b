"""How many processes the tests run in: one more than cores for a folder, this one alone for files named one by one."""

from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

HERE = Path(__file__)


@pytest.mark.parametrize(
    ("arguments", "cores", "expected"),
    [
        ([HERE.parent], 2, 3),
        ([HERE.parent], 10, conftest.MOST_WORKERS),
        ([HERE.parent], 1, 0),
        ([HERE], 10, 0),
        ([f"{HERE}::test_one"], 10, 0),
        ([HERE.parent, HERE], 10, 0),
    ],
)
def test_workers_of_a_folder_and_of_files(monkeypatch, arguments, cores, expected):
    monkeypatch.setattr(conftest.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    config = SimpleNamespace(args=[str(each) for each in arguments])
    assert conftest.pytest_xdist_auto_num_workers(config) == expected
