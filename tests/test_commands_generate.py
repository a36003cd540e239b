"""`python -m openelm_mlx.generate` as a person meets it: what stands on stdout, what on stderr, and how mistakes end."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import random_model, save_folder

from openelm_mlx.commands import main
from openelm_mlx.commands.answering import acceptance_clause
from openelm_mlx.engine.statistics import Statistics
from openelm_mlx.errors import PlatformError
from openelm_mlx.platforms import require_mlx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", random_model(), "llama")


@pytest.fixture
def generate(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("openelm_mlx.hub.cached_file", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["generate", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_answer_on_stdout_and_the_rest_on_stderr(generate, folder):
    code, out, err = generate("--model", folder, "--prompt", "Hello world", "--max-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    assert len(err.splitlines()) == 1
    assert "5 tokens at" in err
    quiet = generate("--model", folder, "--prompt", "Hello world", "--max-tokens", 5, "--quiet")
    assert quiet == (0, out, "")


def test_a_prompt_cache_is_made_used_and_refused(generate, folder, tmp_path):
    file, command = tmp_path / "cache", ("--model", folder, "--prompt", "Hello world", "--max-tokens", 5)
    cold = generate(*command, "--prompt-cache", file)
    warm = generate(*command, "--prompt-cache", file)
    assert (cold[0], warm[0]) == (0, 0)
    assert cold[1] == warm[1] == generate(*command)[1]
    assert "prompt cache" not in cold[2]
    assert "from the prompt cache)" in warm[2]
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = generate(*command, "--prompt-cache", file)
    assert (code, out) == (2, "")
    assert "is damaged" in err
    file.write_bytes(b"not a cache")
    code, out, err = generate(*command, "--prompt-cache", file)
    assert (code, out) == (2, "")
    assert "holds something else; name another file, or replace it with --overwrite." in err
    assert file.read_bytes() == b"not a cache"
    assert generate(*command, "--prompt-cache", file, "--overwrite")[:2] == cold[:2]
    assert "from the prompt cache)" in generate(*command, "--prompt-cache", file)[2]
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "damage", ["cut short", "another version", "no numbers", "half a description", "an unknown type"]
)
def test_a_damaged_prompt_cache_is_told_before_the_weights_are_read(generate, folder, tmp_path, monkeypatch, damage):
    file, command = tmp_path / "cache", ("--model", folder, "--prompt", "Hello world", "--max-tokens", 2)
    assert generate(*command, "--prompt-cache", file)[0] == 0
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    contents = json.loads(header["__metadata__"]["contents"])
    if damage == "cut short":
        data = data[:-1]
    elif damage == "another version":
        header["__metadata__"]["version"] = "99"
    elif damage == "no numbers":
        next(value for name, value in header.items() if name != "__metadata__")["data_offsets"] = ["a", "b"]
    elif damage == "half a description":
        del contents["entries"][0]["checkpoints"]
    else:
        next(value for name, value in header.items() if name != "__metadata__")["dtype"] = "F4"
    header["__metadata__"]["contents"] = json.dumps(contents)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    monkeypatch.setattr("openelm_mlx.loading.read_model", lambda *_, **__: pytest.fail("the weights were read"))
    code, out, err = generate(*command, "--prompt-cache", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has version 99" in err if damage == "another version" else "is damaged" in err
    assert "it will be made again" in err


@pytest.mark.parametrize("option", ["--prompt-file", "--json-schema", "--grammar", "--prompt-cache"])
def test_a_home_folder_that_there_is_not(generate, option):
    code, out, err = generate(*([] if option == "--prompt-file" else ["--prompt", "Hi"]), option, "~nobody-there/x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no home folder for ~nobody-there" in err


def test_guessing_changes_nothing_but_the_time(generate, folder, tmp_path):
    command = ("--model", folder, "--prompt", "Hello world", "--max-tokens", 40)
    expected = generate(*command)[1]
    other = save_folder(tmp_path / "draft", random_model(seed=1), "llama")
    for options in (("--prompt-lookup",), ("--draft-model", other), ("--draft-model", other, "--num-draft-tokens", 2)):
        code, out, err = generate(*command, *options)
        assert (code, out) == (0, expected), err
        assert ("drafted tokens accepted" in err) == ("--draft-model" in options)  # random text repeats nothing
        assert ("no draft was tried" in err) == ("--prompt-lookup" in options)
    for wrong, sentence in (
        (("--prompt-lookup", "--draft-model", other), "give one of them"),
        (("--num-draft-tokens", 3), "add one of them"),
        (("--prompt-lookup", "--num-draft-tokens", 0), "--num-draft-tokens is 0"),
        (("--draft-model", "demo-openelm"), "must share the tokenizer"),
    ):
        code, out, err = generate(*command, *wrong)
        assert (code, out) == (2, "")
        assert sentence in err


def test_json_for_machines(generate, folder):
    code, out, err = generate("--model", folder, "--prompt", "Hello", "--max-tokens", 4, "--json", "--logprobs", 2)
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert len(answer["tokens"]) == 4
    assert answer["finish_reason"] == "length"
    assert answer["statistics"]["completion_tokens"] == 4
    assert [len(entry["top"]) for entry in answer["logprobs"]] == [2] * 4
    plain = generate("--model", folder, "--prompt", "Hello", "--max-tokens", 4, "--quiet")[1]
    assert plain == answer["text"] + "\n"


def test_the_prompt_from_a_file_or_standard_input(generate, folder, tmp_path, monkeypatch):
    options = ("--model", folder, "--max-tokens", 4, "--quiet")
    expected = generate(*options, "--prompt", "Grüße, мир")
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße, мир", encoding="utf-8")
    assert generate(*options, "--prompt-file", file) == expected
    for arguments in ((), ("--prompt", "-")):
        with file.open("rb") as stream:
            monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": stream, "isatty": lambda self: False})())
            assert generate(*options, *arguments) == expected


def test_clipped_max_tokens_is_said(generate, folder):
    _, _, err = generate("--model", folder, "--prompt", "Hello", "--max-tokens", 1000)
    assert "--max-tokens 1000 was clipped" in err


def test_the_prompt_without_its_option(generate, folder):
    options = ("--model", folder, "--max-tokens", 4, "--quiet")
    assert generate(*options, "Hello") == generate(*options, "--prompt", "Hello")
    assert generate(*options, "Hello", "--prompt", "Hello")[0] == 2


@pytest.mark.slow
def test_a_full_disk_under_the_output_is_one_sentence(folder):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    command = f"{sys.executable} -m openelm_mlx.generate --model {folder} --prompt Hello --quiet > /dev/full"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1


def test_stop_seed_and_template_reach_the_loop(generate, folder):
    options = ("--model", folder, "--prompt", "Hello", "--quiet", "--max-tokens", 30)
    whole = generate(*options)[1].rstrip("\n")
    stop = whole[10:12]
    assert generate(*options, "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"
    warm = (*options, "--temperature", 1.0, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01)
    assert generate(*warm, "--seed", 3) == generate(*warm, "--seed", 3)
    assert generate(*warm, "--seed", 3) != generate(*warm, "--seed", 4)
    assert generate(*options, "--chat-template", "openelm-instruct")[1] != whole + "\n"
    assert generate(*options, "--logit-bias", "2=1000")[1] == "\n"
    assert generate(*options, "--chat-template", "openelm-instruct", "--system", "Be brief.")[0] == 0


def broken(folder, tmp_path, name):
    """A copy of the folder with one thing wrong."""
    import shutil

    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    match name:
        case "config is not valid JSON":
            config.write_text("{")
        case "config lacks a field":
            config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "head_dim"}))
        case "no config":
            config.unlink()
        case "truncated":
            os.truncate(weights, weights.stat().st_size - 100)
        case "over-long":
            with weights.open("ab") as file:
                file.write(b"\0" * 100)
        case "header lies":
            data = weights.read_bytes()
            weights.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))
        case "a tensor missing":
            del arrays["transformer.norm.weight"]
            mx.save_safetensors(str(weights), arrays)
        case "a tensor too many":
            mx.save_safetensors(str(weights), arrays | {"extra": mx.zeros((1,))})
        case "a wrong shape":
            mx.save_safetensors(str(weights), arrays | {"transformer.norm.weight": mx.zeros((3,))})
        case "a wrong type":
            mx.save_safetensors(str(weights), arrays | {"transformer.norm.weight": mx.zeros((64,), mx.int8)})
        case "not a number":
            mx.save_safetensors(str(weights), arrays | {"transformer.norm.weight": mx.full((64,), float("nan"))})
        case "a shard missing":
            index = {"weight_map": {"transformer.norm.weight": "model-00002-of-00002.safetensors"}}
            (copy / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.rename(copy / "model-00001-of-00002.safetensors")
        case "a pickle only":
            weights.rename(copy / "pytorch_model.bin")
        case "no tokenizer":
            (copy / "tokenizer.model").unlink()
        case "a damaged tokenizer":
            (copy / "tokenizer.model").write_bytes(b"hello")
        case _:
            raise AssertionError(name)
    return copy


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config is not valid JSON", "config.json"), ("config lacks a field", '"head_dim"'), ("no config", "config.json"),
        ("truncated", "model.safetensors"), ("over-long", "model.safetensors"), ("header lies", "offsets span"),
        ("a tensor missing", "transformer.norm.weight"), ("a tensor too many", "extra"), ("a wrong shape", "[3]"),
        ("a wrong type", "I8"), ("not a number", "not finite"), ("a shard missing", "model-00002-of-00002"),
        ("a pickle only", "pytorch_model.bin"), ("no tokenizer", "--tokenizer"), ("a damaged tokenizer", "tokenizer.model"),
    ],
)  # fmt: skip
def test_a_broken_model_is_one_sentence(generate, folder, tmp_path, name, said):
    code, out, err = generate("--model", broken(folder, tmp_path, name), "--prompt", "Hello")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"), (["--prompt", ""], "empty"), (["--prompt", "  \n"], "empty"),
        (["--prompt", "Hello " * 100], "context holds 64"), (["--temperature", "-1"], "--temperature is -1"),
        (["--temperature", "nan"], "--temperature is nan"), (["--top-k", "-5"], "--top-k is -5"),
        (["--top-p", "0"], "--top-p is 0"), (["--top-p", "7"], "--top-p is 7"), (["--min-p", "2"], "--min-p is 2"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--presence-penalty", "inf"], "--presence-penalty"), (["--frequency-penalty", "1e30"], "--frequency-penalty"),
        (["--seed", "-1"], "--seed is -1"), (["--max-tokens", "0"], "--max-tokens is 0"), (["--max-tokens", "many"], "many"),
        (["--logprobs", "-1", "--json"], "logprobs is -1"), (["--logprobs", "1"], "--json"),
        (["--logit-bias", "x"], "TOKEN=NUMBER"), (["--logit-bias", "9999=1"], "9999"),
        (["--sliding-window", "0"], "--sliding-window is 0"), (["--prefill-chunk", "0"], "--prefill-chunk is 0"),
        (["--context-length", "100"], "100"), (["--dtype", "int4"], "int4"), (["--chat-template", "chatml"], "chatml"),
        (["--tokenizer", "/no/tokenizer"], "/no/tokenizer"), (["--prompt-file", "/no/file"], "more than one prompt"),
        (["--system", "Be brief."], "--chat-template"), (["--stop", ""], "stop"), (["--no-such-option"], "--no-such-option"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(generate, folder, arguments, said):
    defaults = [] if "--model" in arguments else ["--model", folder]
    defaults += [] if "--prompt" in arguments else ["--prompt", "Hello"]
    code, out, err = generate(*defaults, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_standard_input_that_is_not_utf_8(folder):
    command = [sys.executable, "-m", "openelm_mlx.generate", "--model", str(folder)]
    finished = subprocess.run(command, input=b"caf\xe9 latin-1", capture_output=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == b""
    assert finished.stderr.decode().strip().endswith("iconv.")
    assert b"0xe9" in finished.stderr


# Says on stderr when the second token is wanted: nothing is on stdout yet with --json.
STARTS = """
import sys
import openelm_mlx.commands.generate as command
from openelm_mlx.commands import main

def told(show):
    def begun(chunks):
        yield next(chunks)
        sys.stderr.write(".")
        sys.stderr.flush()
        yield from chunks
    return lambda chunks, args: show(begun(chunks), args)

command.print_json, command.print_text = told(command.print_json), told(command.print_text)
sys.exit(main(["generate", *sys.argv[1:]]))
"""


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_ctrl_c_ends_cleanly_with_what_was_generated(folder, arguments):
    # 100,000 tokens in a window: it would take minutes.
    command = [sys.executable, "-c", STARTS, "--model", str(folder), "--prompt", "Hello", "--quiet"]
    command += ["--max-tokens", "100000", "--sliding-window", "32", "--logit-bias", "2=-inf", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr.read(1) == b"."
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out.endswith(b"\n")
    if arguments:
        answer = json.loads(out)
        assert answer["finish_reason"] == "interrupted"
        assert len(answer["tokens"]) > 0


def test_a_closed_pipe_is_no_error(folder):
    command = (
        f"{sys.executable} -m openelm_mlx.generate --model {folder} --prompt Hello --quiet --max-tokens 50 | head -c 1"
    )
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert finished.stderr == ""


@pytest.mark.parametrize("command", [["-m", "openelm_mlx", "--help"], ["-m", "openelm_mlx", "generate", "--help"]])
def test_help(command):
    finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert "generate" in finished.stdout


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["frobnicate"])
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("facts", "said"),
    [(("Darwin", "x86_64", True), "Rosetta.*arm64"), (("Darwin", "x86_64", False), "Intel Mac.*Apple silicon")],
)
def test_macs_that_cannot_run_mlx_are_told_what_is_needed(facts, said):
    with pytest.raises(PlatformError, match=said):
        require_mlx(*facts)


def test_a_missing_mlx_is_one_sentence(tmp_path):
    """Without MLX the help still works, and everything else says what to install."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('no MLX here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "openelm_mlx.generate"]
    assert subprocess.run([*command, "--help"], env=environment, capture_output=True, check=False).returncode == 0
    finished = subprocess.run([*command, "--prompt", "x"], env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert "pip install 'mlx" in finished.stderr


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    ("options", "is_shown"),
    [
        (["--reasoning-effort", "high"], True),
        ([], False),
        (["--show-reasoning"], True),
        (["--reasoning-effort", "high", "--no-show-reasoning"], False),
        (["--reasoning-effort", "high", "--quiet"], False),
    ],
)
def test_reasoning_is_shown_to_who_asks_for_it(capsys, options, is_shown):
    assert main(["generate", "--model", "demo-gpt-oss", "--prompt", "What is a boat?", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("a small vessel")
    assert ("a kind of vessel" in shown.err) == is_shown


@pytest.mark.slow
def test_no_answer_is_said_with_the_option_to_raise(generate):
    question = ("--model", "demo-gpt-oss", "What is a piano?")
    code, out, err = generate(*question, "--max-tokens", 20, "--quiet")
    assert (code, out.strip()) == (2, "")
    assert "all 20 tokens" in err
    assert "raise --max-tokens above 20" in err
    code, out, err = generate(*question, "--max-tokens", 20, "--json")
    assert code == 0  # all is said in it
    assert json.loads(out)["statistics"]["reasoning_tokens"] == 20
    assert "raise --max-tokens above 20" in err
    code, out, err = generate(*question, "--hide-reasoning")
    assert code == 0
    assert "keyboard" in out
    assert "reasoning)" in err


def test_whether_guessing_paid_is_said():
    statistics = Statistics(1, 9, 0.1, 1.0, 1.0, 0, 9)
    for drafted, speedup, words in (
        (0, None, "no draft was tried, so nothing was gained; "),
        (8, None, "6 of 8 drafted tokens accepted, too few to measure a gain; "),
        (8, 1.5, "6 of 8 drafted tokens accepted: 1.50 times as fast as without; "),
        (8, 0.9, "6 of 8 drafted tokens accepted, no gain: 0.90 times as fast as without; "),
    ):
        found = replace(statistics, drafted_tokens=drafted, accepted_tokens=6, speculation_speedup=speedup)
        assert acceptance_clause(found, True) == words
        assert acceptance_clause(found, False) == ""
