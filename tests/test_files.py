"""Whatever a path names and whatever a file holds: one sentence in the caller's error class, at once."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.measurements.routing import Trace
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.commands import main
from openelm_mlx.errors import CheckpointError, ConfigError, UserError
from openelm_mlx.experts.records import RecordFile
from openelm_mlx.files import files_in, parse_json, read_bytes, read_json, read_object, read_text, read_yaml, shown
from openelm_mlx.text.tokenizer import load_tokenizer
from openelm_mlx.tools.mcp import read_servers


def pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    # A name as long as pytest's folders is too long for a socket: bind it from inside.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a named pipe": pipe,
    "a socket": a_socket,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a file that is not there": lambda path: path.symlink_to("nowhere"),
    "No such file": lambda path: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(tmp_path, kind):
    KINDS[kind](tmp_path / "x")
    for read in (read_bytes, read_text, read_json, read_object, read_yaml):
        with pytest.raises(ConfigError, match=kind) as error:
            read(tmp_path / "x", ConfigError)
        assert str(tmp_path / "x") in str(error.value)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("model.safetensors", open_checkpoint),
    "index": ("model.safetensors.index.json", open_checkpoint),
    "torch": ("model.pt", open_checkpoint),
    "config": ("config.json", read_config),
    "yaml": ("model.yaml", read_config),
    "tokenizer.model": ("tokenizer.model", load_tokenizer),
    "tokenizer.json": ("tokenizer.json", load_tokenizer),
    "servers": ("servers.json", lambda folder: read_servers(folder / "servers.json")),
    "trace": ("trace.npz", lambda folder: Trace.load(folder / "trace.npz")),
    "experts": ("experts", lambda folder: RecordFile(folder / "experts")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_every_reader_goes_through_the_door(tmp_path, reader, kind):
    name, read = READERS[reader]
    KINDS[kind](tmp_path / name)
    with pytest.raises(UserError, match=kind):
        read(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_companions_of_a_tokenizer_too(tmp_path, fixtures, name):
    (tmp_path / "tokenizer.model").symlink_to(fixtures / "tokenizers" / "llama" / "tokenizer.model")
    pipe(tmp_path / name)
    with pytest.raises(UserError, match="a named pipe"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("option", ["--prompt-file", "--json-schema", "--grammar"])
def test_files_named_on_the_command_line(tmp_path, capsys, option):
    pipe(tmp_path / "x")
    prompt = [] if option == "--prompt-file" else ["--prompt", "Hello"]
    assert main(["generate", "--model", "demo-openelm", *prompt, option, str(tmp_path / "x")]) == 2
    assert "a named pipe" in capsys.readouterr().err


def test_what_a_shell_hands_over_is_read(capsys):
    """`--prompt-file <(command)` is the path of a pipe's end that is open already."""
    end, other = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(other, b"Once upon"), os.close(other)))
    writer.start()
    try:
        options = ["generate", "--model", "demo-openelm", "--max-tokens", "2", "--prompt-file", f"/dev/fd/{end}"]
        assert main(options) == 0
    finally:
        writer.join()
        os.close(end)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"\xff\xfe", "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b" " * 2000, "2,000 bytes and at most 1,000"),
    ],
)
def test_what_is_no_object(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_object(tmp_path / "x", ConfigError, 250_000_000 if len(content) > 2000 else 1000)


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join(['x' if i == 0 else f'*a{i - 1}'] * 9)}]" for i in range(12))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LAUGHS, "more than"),
        ("a: &a [*a]", "nested too deep"),
        ("[" * 100_000, "YAML|nested|most"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [x]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a" * 300_000, "at most"),
    ],
)
def test_yaml_that_is_none(tmp_path, content, said):
    (tmp_path / "x").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_yaml(tmp_path / "x", ConfigError)


def test_yaml_has_json_s_types(tmp_path):
    (tmp_path / "x").write_text("a: 2024-01-02\n1: {b: !!set {c}}\nd: &d [1, 2.5, null, true]\ne: *d\n")
    found = read_yaml(tmp_path / "x", ConfigError)
    assert found == {"a": "2024-01-02", "1": {"b": ["c"]}, "d": [1, 2.5, None, True], "e": [1, 2.5, None, True]}
    json.dumps(found)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, ""])
def test_names_that_are_none(name):
    with pytest.raises(CheckpointError):
        read_bytes(name, CheckpointError)


def test_hidden_files_and_folders_are_no_part_of_a_listing(tmp_path):
    for name in ("b.json", "a.json", "._a.json", ".a.json", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.json").mkdir()
    pipe(tmp_path / "e.json")
    assert [path.name for path in files_in(tmp_path, "*.json", CheckpointError)] == ["a.json", "b.json", "e.json"]


def test_values_in_messages_are_short():
    deep: list = []
    for _ in range(1000):
        deep = [deep, deep]
    for value in (deep, "x" * 10**6, 10**5000, dict.fromkeys(range(1000), "y" * 1000), "\x1b]52;c;x\x07\ud800"):
        assert len(shown(value)) < 1000
        assert shown(value).isprintable()


def test_a_text_says_where_it_is_from():
    with pytest.raises(ConfigError, match=r"^the answer is not JSON .*: try again\.$"):
        parse_json("}", "the answer", ConfigError, "try again")
