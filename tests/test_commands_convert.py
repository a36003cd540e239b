"""`python convert.py` as a person meets it: the table of a dry run, the report, and how mistakes and Ctrl-C end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FIXTURES, random_model, save_folder

from openelm_mlx.checkpoint.reader import open_checkpoint
from openelm_mlx.commands import convert as command
from openelm_mlx.commands import main
from openelm_mlx.loading import load

TINY = FIXTURES / "openelm_tiny"
PROJECT = FIXTURES.parent.parent


@pytest.fixture
def convert(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("openelm_mlx.hub.cached_file", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["convert", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_report_on_stdout_and_nothing_else(convert, tmp_path):
    code, out, err = convert(TINY / "corenet", tmp_path / "out", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'out'}: 34 tensors, 334,592 bytes (49.6% of the source's), bfloat16")
    assert "tokenizer: none found; add one with --tokenizer" in out
    assert load(tmp_path / "out")


def test_every_option_arrives(convert, tmp_path):
    source = save_folder(tmp_path / "source", random_model())
    options = (
        "--quantize 4 --group-size 32 --dtype bfloat16 --chat-template openelm-instruct --max-file-size 0.05 --verify"
    )
    tokenizer = FIXTURES / "tokenizers" / "llama"
    code, out, _ = convert(source, tmp_path / "out", *options.split(), "--tokenizer", tokenizer, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["destination"] == str(tmp_path / "out")
    assert report["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert report["dtype"] == "bfloat16"
    assert report["chat_template"] == "openelm-instruct"
    assert report["tokenizer"] == ["tokenizer.model", "tokenizer_config.json"]
    assert report["verification"]["kl_divergence"] > 0
    assert report["checksums"] == report["verification"]["checksums"]
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.chat_template == "openelm-instruct"


def test_files_are_divided(convert, tmp_path):
    assert convert(TINY, tmp_path / "out", "--max-file-size", "0.002")[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert convert(TINY, tmp_path / "no", "--max-file-size", "0")[0] == 2


def test_a_dry_run_lists_every_tensor_and_the_total(convert, tmp_path):
    code, out, err = convert(TINY / "corenet", tmp_path / "out", "--dry-run", "--quantize", "4", "--group-size", "32")
    assert (code, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    head, *rows, _, total = out.splitlines()
    assert head.split() == ["source", "shape", "type", "destination", "shape", "type", "bytes"]
    cells = [re.split(r" +", row.strip()) for row in rows]
    assert cells[0] == [
        "token_embeddings.weight", "320x64", "F32", "transformer.token_embeddings.weight", "300x8", "U32", "9,600",
    ]  # fmt: skip
    sources = {row[0] for row in cells}
    assert sources == set(open_checkpoint(TINY / "corenet").entries)
    nbytes = sum(int(row[-1].replace(",", "")) for row in cells)
    assert total.startswith(f"{len(rows)} tensors, {nbytes:,} bytes (")
    assert "nothing was written" in total


def test_a_dry_run_for_machines_without_a_destination(convert):
    code, out, _ = convert(FIXTURES / "openelm_lora/dora", "--dry-run", "--json")
    report = json.loads(out)
    assert (code, report["destination"], report["layout"]) == (0, None, "corenet-adapters")
    assert report["tensors"][0]["name"] == "transformer.token_embeddings.weight"
    assert len(report["tensors"][0]["sources"]) == 3


def test_merged_tensors_keep_the_table_narrow(convert):
    _, out, _ = convert(FIXTURES / "openelm_lora/dora", "--dry-run")
    assert "token_embeddings.base_layer.weight +2" in out
    assert max(map(len, out.splitlines())) < 140


def test_verification_is_reported(convert, tmp_path):
    code, out, _ = convert(TINY, tmp_path / "out", "--quantize", "mixed", "--group-size", "32", "--verify")
    assert code == 0
    assert re.search(r"[0-9a-f]{64}  model\.safetensors", out)
    assert [line.split()[0] for line in out.splitlines() if re.match(r"(embedding|layer|head) ", line)] == [
        "embedding", "layer", "layer", "layer", "layer", "head",
    ]  # fmt: skip
    assert re.search(r"KL divergence of the next token: \d\.\d+e-\d\d nats on average", out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [TINY],
        ["nowhere", "OUT"],
        [TINY, TINY],
        [TINY, "OUT", "--quantize", "7"],
        [TINY, "OUT", "--dtype", "int8"],
        [TINY, "OUT", "--group-size", "64"],
        [TINY, "OUT", "--group-size", "many"],
        [TINY, "OUT", "--private"],
        [TINY, "OUT", "--upload", "nobody"],
        [TINY, "OUT", "--tokenizer", FIXTURES / "tokenizers" / "llama"],
        [TINY, "OUT", "--chat-template", "chatml"],
        [TINY, "OUT", "--max-file-size", "-1"],
    ],
    ids=lambda arguments: " ".join(str(argument).rpartition("/")[2] for argument in arguments) or "nothing",
)
def test_mistakes_are_one_sentence(convert, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = convert(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_second_conversion_to_the_same_place(convert, tmp_path):
    assert convert(TINY, tmp_path / "out")[0] == 0
    code, out, err = convert(TINY, tmp_path / "out")
    assert (code, out) == (2, "")
    assert "nothing is overwritten" in err


def test_interrupted_and_taken_up(convert, tmp_path, monkeypatch):
    class Interrupting:
        def show(self, stage: str, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(command, "StageBars", Interrupting)
        code, out, err = convert(TINY, tmp_path / "out")
        assert (code, out) == (130, "")
        assert err.endswith(f"{tmp_path / 'out'} was not written; the same command resumes where this one stopped.\n")
    code, out, _ = convert(TINY, tmp_path / "out")
    assert code == 0
    assert "were there from an interrupted conversion" in out


def test_a_bar_in_a_terminal_and_none_elsewhere(convert, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err = convert(TINY, tmp_path / "out", "--verify")
    assert code == 0
    assert re.search(r"convert: 100%.*669k/669k", err)
    assert re.search(r"verify: 100%.*6/6", err)
    assert "100%" not in out
    assert convert(TINY, tmp_path / "quiet", "--quiet")[2] == ""


def run_script(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "convert.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "HF_HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


@pytest.mark.slow
def test_the_script_from_another_folder(tmp_path):
    done = run_script(TINY, "out", "--quantize", "8", "--group-size", "32", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(tmp_path / "out"))
    failed = run_script(TINY, "out", cwd=tmp_path)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1


def test_help_imports_nothing_slow():
    script = (
        "import sys; sys.argv = ['openelm_mlx', 'convert', '--help']\n"
        "from openelm_mlx.commands import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('mlx.core', 'numpy', 'tqdm', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert "--group-size" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_from_the_keyboard(convert, tmp_path):
    """A real SIGINT, while the journal grows."""
    source = save_folder(tmp_path / "source", random_model())
    slow = (
        "import sys, time\n"
        "from openelm_mlx import hub\n"
        "from openelm_mlx.checkpoint import writer\n"
        "from openelm_mlx.commands import main\n"
        "hub.cached_file = lambda *_: None\n"
        "append = writer._append\n"
        "def slow_append(stream, data): time.sleep(0.02); append(stream, data)\n"
        "writer._append = slow_append\n"
        "sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", slow, str(source), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, cwd=PROJECT
    )
    journal = tmp_path / "out.partial/journal.jsonl"
    while running.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < 4):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert not Path(tmp_path / "out").exists()
    assert convert(source, tmp_path / "out")[0] == 0
