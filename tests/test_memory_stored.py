"""What is kept of a machine's measurements: round trip, another machine, damage, and a folder that cannot be written."""

from pathlib import Path

import pytest

from openelm_mlx.errors import DestinationError
from openelm_mlx.memory.stored import cache_folder, load_stored, machine_key, store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENELM_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_stored_comes_back(cache):
    file = store("tuning", {"compile": True, "rows": 128})
    assert file.parent == cache
    assert load_stored("tuning") == {"compile": True, "rows": 128}
    assert list(cache.iterdir()) == [file]  # no partial file is left


def test_another_machine_and_another_subject_have_nothing():
    store("tuning", {"compile": True}, machine="Apple M1, gpu, mlx 0.32")
    assert load_stored("tuning") == {}
    assert load_stored("scratch", machine="Apple M1, gpu, mlx 0.32") == {}
    assert load_stored("tuning", machine="Apple M1, gpu, mlx 0.32") == {"compile": True}


def test_names_that_give_one_file_name_are_told_apart():
    store("tuning", {"compile": True}, machine="Apple M1")
    assert load_stored("tuning", machine="apple-m1") == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2, "machine": "x", "values": {}}', '{"format": 1}'])
def test_a_damaged_file_counts_as_nothing(content):
    store("tuning", {"compile": True}, machine="x").write_text(content)
    assert load_stored("tuning", machine="x") == {}


def test_a_folder_that_cannot_be_written_is_an_error(cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DestinationError, match="OPENELM_MLX_CACHE"):
        store("tuning", {})


def test_the_folder_follows_the_system():
    assert cache_folder({}, "darwin") == Path.home() / "Library/Caches/openelm_mlx"
    assert cache_folder({"XDG_CACHE_HOME": "/x"}, "linux") == Path("/x/openelm_mlx")
    assert cache_folder({"OPENELM_MLX_CACHE": "/y"}, "darwin") == Path("/y")


def test_the_machine_has_a_name():
    assert "mlx" in machine_key()
