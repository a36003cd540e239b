"""A volume that takes names for one whatever their case and the form of their accents, as a Mac's does.

On a volume that tells them apart, the second name is a hard link that listings do not show.
"""

import json
import os
from pathlib import Path

import hub_server
import mlx.core as mx
import pytest
from hub_server import HubServer

from openelm_mlx.checkpoint.reader import open_checkpoint, weight_files
from openelm_mlx.conversion.card import licence_files
from openelm_mlx.errors import CheckpointError, DestinationError, HubError
from openelm_mlx.finder import is_named, is_same_name, same_file, sync
from openelm_mlx.hub import download, list_files
from openelm_mlx.text.tokenizer import load_tokenizer

hub = hub_server.hub


@pytest.fixture
def also(monkeypatch):
    """Give a file another name, which no listing shows."""
    hidden: set[Path] = set()
    listed, globbed = os.listdir, Path.glob

    def link(file: Path, name: str) -> Path:
        other = file.with_name(name)
        os.link(file, other)
        hidden.add(other)
        return other

    monkeypatch.setattr(os, "listdir", lambda place=".": [n for n in listed(place) if Path(place) / n not in hidden])
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: (path for path in globbed(self, pattern) if path not in hidden)
    )
    return link


def test_names_that_are_one():
    assert is_same_name("Model", "model")
    assert is_same_name("mod\u00e8le", "MODE\u0300LE")
    assert not is_same_name("model", "model2")


def test_a_name_is_one_only_where_the_volume_says_so(tmp_path, also):
    (tmp_path / "model").write_text("x")
    (tmp_path / "model2").write_text("x")
    assert not is_named(tmp_path, "Model", os.listdir(tmp_path))
    assert not same_file(tmp_path / "model", tmp_path / "model2")
    also(tmp_path / "model", "Model")
    assert is_named(tmp_path, "Model", os.listdir(tmp_path))


@pytest.mark.parametrize("spelled", ["Model-1.safetensors", "model-1.safetensors"])
def test_an_index_in_other_letters_than_the_shards(tmp_path, also, spelled):
    file = tmp_path / "model-1.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((2,))})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": spelled}}))
    if spelled != file.name:
        with pytest.raises(CheckpointError, match="lacks 1 of the 1 shards"):  # another file, where letters count
            weight_files(tmp_path)
        also(file, spelled)
    assert set(open_checkpoint(tmp_path).entries) == {"a"}


def test_two_spellings_of_one_shard_are_read_once(tmp_path, also):
    file = tmp_path / "mod\u00e8le.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((2,)), "b": mx.ones((2,))})
    other = also(file, "Mode\u0300le.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": file.name, "b": other.name}})
    )
    assert len(weight_files(tmp_path)) == 1
    assert set(open_checkpoint(tmp_path).entries) == {"a", "b"}


def test_a_tokenizer_that_was_named_in_other_letters(tmp_path, also, fixtures):
    file = tmp_path / "tokenizer.json"
    file.write_bytes((fixtures / "tokenizers" / "byte_level" / "tokenizer.json").read_bytes())
    assert load_tokenizer(also(file, "Tokenizer.JSON")).files == (file,)


def test_two_licences_that_a_mac_takes_for_one(tmp_path):
    for name in ("LICENSE", "License"):
        (tmp_path / name).write_text("The same.")
    assert [path.name for path in licence_files(tmp_path)] == ["LICENSE"]
    (tmp_path / "License").write_text("Another.")
    with pytest.raises(CheckpointError, match="LICENSE and License with different texts"):
        licence_files(tmp_path)


def test_a_revision_in_other_letters_is_another_one(hub: HubServer, also, monkeypatch):
    first = hub.add_repo("owner/name", {"config.json": b"{}"}, revision="V1")
    folder = download("owner/name", lambda files: [f.name for f in files], revision="V1")
    assert folder.name == first
    refs = folder.parent.parent / "refs"
    also(refs / "V1", "v1")
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    hub.stop()
    assert list_files("owner/name", "V1")
    with pytest.raises(HubError):
        list_files("owner/name", "v1")


def test_a_prompt_cache_is_synced_as_a_mac_s_disk_wants_it(tmp_path, monkeypatch):
    from openelm_mlx import outputs
    from openelm_mlx.decoding import prefix_file

    synced = []
    monkeypatch.setattr(outputs, "sync", lambda stream: (synced.append(stream.name), sync(stream)))
    prefix_file.save_entries(tmp_path / "cache", [], None)
    assert len(synced) == 1

    def fails(stream: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(outputs, "sync", fails)
    with pytest.raises(DestinationError, match="Input/output error"):
        prefix_file.save_entries(tmp_path / "other", [], None)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
