"""Whatever a file holds: a result, or one sentence of ours, soon and in little memory (file_fuzz.py makes the files).

FUZZ_CASES=10000 reads so many instead of a few hundred, from FUZZ_FIRST on.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import random_model, save_folder

from benchmarks.measurements.routing import Trace
from openelm_mlx.conversation.session import Chat
from openelm_mlx.conversion import convert
from openelm_mlx.decoding.prefix_file import load_entries
from openelm_mlx.errors import CheckpointError, PromptError, SettingError, TokenizerError
from openelm_mlx.files import one_line
from openelm_mlx.loading import load
from openelm_mlx.text.tokenizer import load_tokenizer

PROGRAM = Path(__file__).with_name("file_fuzz.py")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CASES = int(os.environ.get("FUZZ_CASES", "320"))


@pytest.mark.slow
def test_damaged_files_end_in_a_result_or_a_sentence():
    """In a child: a case that hangs, crashes or takes the memory of the machine ends that, and its number is known."""
    first, stop, faults = FIRST, FIRST + CASES, []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parent.parent), *sys.path])}
    while first < stop and len(faults) < 20:
        command = [sys.executable, str(PROGRAM), str(first), str(stop)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        begun = [int(line) for line in ended.stdout.splitlines() if line.isdigit()]
        faults += [line for line in ended.stdout.splitlines() if line.startswith("{")]
        last = begun[-1] if begun else first
        if ended.returncode:
            faults.append(f"case {last} ended the process with {ended.returncode}: {ended.stderr[-1500:]}")
        elif last != stop - 1:
            faults.append(f"the process ended after case {last}")
        first = last + 1
    assert not faults, "\n".join(faults)


# What it has found.


def damaged_cache(path: Path, header: dict[str, object]) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"__metadata__": None},
    ],
)
def test_a_prompt_cache_whose_offsets_are_none(tmp_path, header):
    with pytest.raises(CheckpointError, match="is damaged"):
        list(load_entries(damaged_cache(tmp_path / "x", header), None))


def test_a_prompt_cache_of_any_size_is_looked_at_before_it_is_read(tmp_path):
    path = damaged_cache(
        tmp_path / "x", {"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    )
    os.truncate(path, 1 << 42)
    with pytest.raises(CheckpointError, match="cut short"):
        list(load_entries(path, None))


def test_a_trace_whose_packing_is_damaged(tmp_path):
    Trace(4, [np.array([[[0, 1]]], np.int16)] * 40).save(tmp_path / "t")
    with zipfile.ZipFile(tmp_path / "t") as archive:
        place = archive.getinfo("experts.npy").header_offset
    data = bytearray((tmp_path / "t").read_bytes())
    data[place + 60 : place + 90] = b"\xff" * 30
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(SettingError, match="is not a routing trace"):
        Trace.load(tmp_path / "t")


@pytest.mark.parametrize("name", ["\ud800", "a" * 70_000, "\x1b]52;c;\x07"])
@pytest.mark.parametrize("kind", ["llama", "byte_level"])
def test_a_token_s_name_that_no_vocabulary_has(tmp_path, fixtures, kind, name):
    for file in (fixtures / "tokenizers" / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
    with pytest.raises(TokenizerError, match="is not in its vocabulary") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_pieces_that_are_no_text(tmp_path, fixtures):
    data = (fixtures / "tokenizers" / "llama" / "tokenizer.model").read_bytes()
    place = data.index("▁".encode(), 200)
    (tmp_path / "tokenizer.model").write_bytes(data[:place] + b"\xe2\xe2\xe2" + data[place + 3 :])
    with pytest.raises(TokenizerError, match="is damaged, cut short or not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["a" * 70_000, "\x1b[2J", "a\nb"])
def test_what_a_tokenizer_s_library_says_is_one_short_line(tmp_path, fixtures, value):
    data = json.loads((fixtures / "tokenizers" / "byte_level" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"version": value}))
    with pytest.raises(TokenizerError, match="is damaged, cut short or not a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_byte_s_piece_that_names_no_byte(tmp_path, fixtures):
    text = (fixtures / "tokenizers" / "llama_metaspace" / "tokenizer.json").read_text()
    assert "<0x0A>" in text
    (tmp_path / "tokenizer.json").write_text(text.replace("<0x0A>", "<0xZZ>"))
    tokenizer = load_tokenizer(tmp_path)
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    assert b"<0xZZ>" in pieces
    assert b"\n" not in pieces
    assert b"\x0b" in pieces


def test_a_saved_chat_of_another_format(tmp_path):
    (tmp_path / "x").write_text(json.dumps({"openelm_mlx_chat": "\x1b[2J" * 1000}))
    with pytest.raises(PromptError, match="is not a saved chat") as error:
        Chat(*load("demo-gpt-oss")).load(tmp_path / "x")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_one_line():
    assert one_line("a\n b\x1b[2J") == "a b\ufffd[2J"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 1000)) == 200


def test_half_a_character_in_a_tokenizer_s_settings_is_converted(tmp_path):
    source = save_folder(tmp_path / "m", random_model(), "llama")
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"note": "\ud800", "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["note"] == "\ufffd"
