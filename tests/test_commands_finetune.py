"""`openelm_mlx finetune`: what it says before, during and after a run, and what it leaves when it is interrupted."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import random_model, save_folder

from openelm_mlx.commands import main
from openelm_mlx.commands.training_progress import TrainingBar, duration, loss_picture


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = random_model(context_length=128, num_transformer_layers=2)
    return save_folder(tmp_path_factory.mktemp("models") / "tiny-instruct", model, "llama")


@pytest.fixture
def data(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(5)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def finetune(source, data, output, *more):
    return main(["finetune", str(source), "--data", str(data), "--output", str(output), *map(str, more)])


def test_a_run_says_what_it_takes_and_how_it_goes(source, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert finetune(source, data, output, "--steps", 6, "--validation", 0.2, "--chart", tmp_path / "loss.png") == 0
    printed = capsys.readouterr()
    assert "4 examples" in printed.err
    assert "trained numbers; 6 steps of 4 examples" in printed.err
    assert "memory: " in printed.err
    assert "time: about" in printed.err
    assert "step 6 of 6: loss" in printed.err
    assert "validation" in printed.err
    assert "6 steps\n" in printed.err  # of the picture
    assert f"use it: openelm_mlx chat --model {source} --adapter {output}" in printed.out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter_config.json").exists()
    assert (
        main(["generate", "--model", str(source), "--adapter", str(output), "--prompt", "q1", "--max-tokens", "2"]) == 0
    )


def test_json_and_a_dry_run(source, data, tmp_path, capsys):
    assert finetune(source, data, tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["total_bytes"] == plan["weights_bytes"] + plan["trained_bytes"] + plan["activations_bytes"]
    assert not (tmp_path / "out").exists()
    assert finetune(source, data, tmp_path / "out", "--steps", 2, "--json", "-q") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [entry["step"] for entry in found["log"]] == [1, 2]
    assert printed.err == ""


WRONG = [
    (["--too-long", "shorten"], "--too-long is 'shorten': choose error"),
    (["--max-length", "5"], "data.jsonl, line 1: it has"),
    (["--learning-rate", "-1"], "--learning-rate is -1.0"),
    (["--memory-limit", "1MB"], "does not fit"),
    (["--methd", "lora"], "did you mean --method?"),
    (["--validation", "none.jsonl"], "none.jsonl cannot be read"),
    (["--chart", "x.gif"], "--chart x.gif: the name must end in .png or .svg"),
    (["--targets", "k_proj"], "'k_proj' matches no matrix"),
]


@pytest.mark.parametrize(("more", "message"), WRONG, ids=[each[0][0] for each in WRONG])
def test_a_mistake_is_one_sentence(source, data, tmp_path, capsys, more, message):
    try:
        code = finetune(source, data, tmp_path / "out", *more)
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert [each.name for each in tmp_path.iterdir()] == ["data.jsonl"]


def test_an_interrupted_run_shows_its_losses_so_far(source, data, tmp_path, capsys, monkeypatch):
    """As text and as the picture that was asked for, which the same command then replaces."""
    show, chart = TrainingBar.show, tmp_path / "loss.png"

    def stop_at_4(bar, progress):
        show(bar, progress)
        if progress.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingBar, "show", stop_at_4)
        assert finetune(source, data, tmp_path / "out", "--steps", 6, "--chart", chart) == 130
    said, first = capsys.readouterr().err, chart.read_bytes()
    assert "Interrupted after step 4" in said
    assert " 4 steps\n" in said
    assert finetune(source, data, tmp_path / "out", "--steps", 6, "--chart", chart) == 0
    assert "going on after step 4" in capsys.readouterr().err
    assert chart.read_bytes() != first


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(source, data, tmp_path, number):
    command = [sys.executable, "-m", "openelm_mlx", "finetune", str(source), "--data", str(data)]
    command += ["--output", str(tmp_path / "out"), "--steps", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 20 "):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    again = subprocess.run([*command[:-1], "200", "--restart", "--dry-run"], capture_output=True, text=True, check=True)
    assert "memory:" in again.stderr


def test_a_picture_of_losses():
    picture = loss_picture([4.0, 3.0, 2.0, 1.0], width=4, height=4)
    assert picture.splitlines()[0] == "   4.000 │█"
    assert picture.splitlines()[3] == "   0.000 │████"
    assert picture.splitlines()[-1].endswith("4 steps")
    assert loss_picture([1.0]) == ""
    assert (duration(12.2), duration(210), duration(7600)) == ("12 s", "3.5 min", "2.1 h")
