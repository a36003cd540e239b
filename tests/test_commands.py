"""What all commands have in common: options, errors, streams, and nothing read before everything is checked."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from openelm_mlx import __version__
from openelm_mlx.checkpoint.layouts import Parameter
from openelm_mlx.commands import build_parser, main, output
from openelm_mlx.commands.spelling import flags_of, in_flags

COMMAND = [sys.executable, "-m", "openelm_mlx"]


# --- arguments -------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    return seen.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--verison", "there is no option --verison: did you mean --version? (see openelm_mlx -h)"),
        ("genrate x", "there is no command 'genrate': did you mean generate? (see openelm_mlx -h)"),
        ("", "there is no command: give generate, chat, serve"),
        ("--temperature", "there is no option --temperature"),
        ("xyz", "there is no command 'xyz': give generate, chat"),
        ("generate --temprature 1 x", "did you mean --temperature? (see openelm_mlx generate -h)"),
        ("chat --xyzzy", "there is no option --xyzzy (see openelm_mlx chat -h)"),
        (
            "serve --parallel tensor",
            "--parallel here, only generate has it; over several machines this command runs with --workers HOST:PORT (see",
        ),
        (
            "bench --parallel tensor",
            "there is no option --parallel here, only generate has it (see openelm_mlx bench -h)",
        ),
        ("generate What is it", "'is' is one argument too many: put a text of several words in quotes"),
        (
            "serve demo-openelm",
            "'demo-openelm' is one argument too many: put a text of several words in quotes, and name a",
        ),
        ("evaluate --model demo-openelm --tasks x", "there is no option --model: give the model without it"),
        ("generate --max-tokens many x", "--max-tokens is 'many', which is not a whole number"),
        ("generate --temperature warm x", "--temperature is 'warm', which is not a number"),
        ("generate --dtype float61 x", "--dtype cannot be 'float61': did you mean float16?"),
        ("generate x --system", "--system needs a value; one that begins with a - is given as --system=-..."),
    ],
)
def test_a_wrong_argument_is_one_sentence_with_the_nearest_right_one(capsys, arguments, said):
    assert said in refused(capsys, *arguments.split())


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"openelm_mlx {__version__}\n")


FLAGS = {
    "dense_bits": "--dense-bits", "memory_limit": "--memory-limit", "wire": "--wire", "stop": "--stop",
    "overwrite": "--overwrite", "reasoning_effort": "--reasoning-effort", "context_length": "--context-length",
}  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "typed"),
    [
        ("pass dense_bits=8.", "pass --dense-bits 8."), ('give memory_limit="8GB", or', "give --memory-limit 8GB, or"),
        ("context_length is 0: it", "--context-length is 0: it"), ("stop is '': give", "--stop is '': give"),
        ("replace it with overwrite=True.", "replace it with --overwrite."),
        ('with reasoning_effort="low".', "with --reasoning-effort low."), ("raise memory_limit= so", "raise --memory-limit so"),
        ("leave out dense_bits.", "leave out --dense-bits."), ("use memory_limit.\nThen", "use --memory-limit.\nThen"),
        # What only looks like one stays.
        ("dense_bits.txt is there", "dense_bits.txt is there"), ("memory_limit/x is", "memory_limit/x is"),
        ("it would stop there", "it would stop there"), ("'dense_bits=8' is there", "'dense_bits=8' is there"),
        ("/tmp/dense_bits is a folder", "/tmp/dense_bits is a folder"), ("other_name=3", "other_name=3"),
        ("my_dense_bits=8", "my_dense_bits=8"), ("the model's dense_bits and Apple's", "the model's --dense-bits and Apple's"),
    ],
)  # fmt: skip
def test_advice_is_in_the_command_line_s_spelling(sentence, typed):
    assert in_flags(sentence, FLAGS) == typed


@pytest.mark.parametrize("name", ["generate", "chat", "serve", "plan", "convert", "export", "bench"])
def test_every_option_with_a_name_of_its_own_is_spelled_as_the_command_has_it(name):
    parser = (
        build_parser("openelm_mlx", [name])
        .parse_args([name, *(["x", "y"] if name in ("convert", "export") else [])])
        .command
    )
    flags = flags_of(parser)
    for action in parser._actions:
        if action.option_strings and "_" in action.dest and action.help != "==SUPPRESS==":
            assert flags[action.dest] in action.option_strings
            assert in_flags(f"raise {action.dest}=8", flags) == f"raise {flags[action.dest]} 8"


# --- nothing is read before all is checked -----------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that were read."""
    found, read = [], Parameter.read
    monkeypatch.setattr(Parameter, "read", lambda self, checkpoint: found.append(self.name) or read(self, checkpoint))
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tokenizer demo-gpt-oss", "belongs to another model"), ("--tokenizer /no/tokenizer", "/no/tokenizer"),
        ("--max-tokens 0", "--max-tokens is 0"), ("--temperature -1", "--temperature is -1"),
        ("--chat-template chatml", "chatml"), ("--stop=", "empty stop string"), ("--prefill-chunk 0", "--prefill-chunk is 0"),
        ("--logit-bias 999999=1", "999999"), ("--context-length 99999", "--context-length is 99999"),
        ("--memory-limit 1MB", "1"),
        ("--draft-model demo-gpt-oss", "must share the tokenizer"), ("--prompt-lookup --num-draft-tokens 0", "is 0"),
        ("--draft-model /no/such/model", "/no/such/model"), ("--reasoning-effort low", "only gpt-oss"),
        ("--json-schema /no/schema", "/no/schema"), ("--regex (", "The regex cannot"), ("--wire --expert-slots 4", "expert"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_wrong_is_said_before_a_tensor_is_read(capsys, reads, monkeypatch, command, arguments, said):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    code = main([command, *arguments.split(), *(["Hello"] if command == "generate" else [])])
    seen = capsys.readouterr()
    assert (code, seen.out, reads) == (2, "", [])
    assert said in seen.err
    assert seen.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate --logprobs -1 --json Hello", "--logprobs is -1"),
        ("generate --sliding-window 0 Hello", "--sliding-window is 0"),
        ("generate --system Short Hello --raw", "no chat template"), ("generate " + "Hello_" * 3000, "there is no room"),
        (f"generate --prompt-cache {__file__} Hello", "holds something else"),
        ("chat --tools calculator", "OpenELM has no format for tools"), (f"chat --load {__file__}", "is not a saved chat"),
        ("chat --tools nonsense", "nonsense"),
        ("bench --against nothing --prompt-tokens 99999", "--prompt-tokens 99999"), ("bench --chart /no/a.png", "/no"),
    ],
)  # fmt: skip
def test_so_do_the_options_that_one_command_has(capsys, reads, monkeypatch, arguments, said):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    code = main(arguments.split())
    seen = capsys.readouterr()
    assert (code, seen.out, reads) == (2, "", [])
    assert said in seen.err


def test_the_counter_counts(capsys, reads):
    assert main(["generate", "--max-tokens", "1", "--quiet", "Hello"]) == 0
    assert len(reads) > 10


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    ("closing", "code", "out", "said"),
    [
        (">&-", 2, "", "Standard output is closed"), ("2>&-", 0, "openelm", ""), ("<&-", 0, "openelm", ""),
        (">/dev/full", 2, "", "The output cannot be written: No space left on device"), ("2>/dev/full", 0, "openelm", ""),
        ("<&- 2>&-", 0, "openelm", ""), (">&- 2>&-", 2, "", ""),
    ],
)  # fmt: skip
def test_closed_and_full_streams(closing, code, out, said):
    command = f'"{sys.executable}" -m openelm_mlx info demo-openelm {closing}'
    finished = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (finished.returncode, "Traceback" in finished.stderr, "Exception ignored" in finished.stderr) == (
        code,
        False,
        False,
    )
    assert out in finished.stdout
    assert said in finished.stderr


def in_terminal(*arguments: str, script: str | None = None, **environment: str) -> str:
    """What a terminal is sent by a command whose streams all end there."""
    main_end, end = pty.openpty()
    command = [*COMMAND, *arguments] if script is None else [sys.executable, "-c", script]
    process = subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, env={**os.environ, "TERM": "xterm", **environment}
    )
    os.close(end)
    sent = b""
    while True:
        try:
            data = os.read(main_end, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        sent += data
    os.close(main_end)
    process.wait(60)
    return sent.decode()


HOSTILE = "\\x1b]52;c;cm0=\\x07\\x9b2J\\r\\u202e"
SPEAKS = f"""
from openelm_mlx.commands import output
output.answer("{HOSTILE}"); output.end_answer()
output.dimmed("{HOSTILE}"); output.end_dimmed()
output.say("{HOSTILE}"); output.report("{HOSTILE}"); output.report_json({{"a": "{HOSTILE}"}})
output.error("p", "{HOSTILE}")
"""


def test_nothing_in_a_terminal_obeys_what_others_wrote():
    sent = in_terminal(script=SPEAKS, PYTHONPATH=os.pathsep.join(sys.path))
    ours = sent.replace("\x1b[2m", "").replace("\x1b[0m", "").replace("\r\n", "\n")
    assert ours.count("52;c;cm0=") == 6
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", ours) is None


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_none_are_wanted(variable, value):
    assert "\x1b[2m" in in_terminal(script=SPEAKS, PYTHONPATH=os.pathsep.join(sys.path), NO_COLOR="")
    assert "\x1b" not in in_terminal(
        script=SPEAKS, PYTHONPATH=os.pathsep.join(sys.path), **{"NO_COLOR": "", variable: value}
    )


def test_an_answer_in_a_pipe_is_what_the_model_gave(capsys):
    output.answer("\x1b[1m\r")
    output.answer("\u202e\udcff")
    output.end_answer()
    assert capsys.readouterr().out == "\x1b[1m\r\u202e\ufffd\n"


def test_file_names_and_arguments_are_harmless_in_errors(capsys):
    assert main(["generate", "--model", "/no/\x1b]0;x\x07\u202e\n", "Hello"]) == 2
    err = capsys.readouterr().err
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", err) is None
    assert err.count("\n") == 1


def test_our_own_mistake_is_told_harmlessly(capsys, monkeypatch):
    def fails(args):
        raise RuntimeError("\x1b]0;x\x07")

    monkeypatch.setattr("openelm_mlx.commands.info.run", fails)
    assert main(["info", "demo-openelm"]) == 70
    err = capsys.readouterr().err
    assert "RuntimeError" in err
    assert "\x1b" not in err
    assert "please open an issue" in err


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_says_the_same_in_text_json_and_by_layer(capsys):
    assert main(["info", "demo-openelm", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["info", "demo-openelm"]) == 0
    text = capsys.readouterr().out
    assert f"parameters             {facts['parameters']:,}" in text
    assert "feed-forward" not in text
    assert main(["info", "demo-openelm", "--layers"]) == 0
    assert capsys.readouterr().out.startswith(text)
    assert main(["info", "demo-openelm", "--layers"]) == 0
    heading, *rows = capsys.readouterr().out.removeprefix(text).strip().splitlines()
    assert heading.split()[:3] == ["layer", "query", "heads"]
    names = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    assert [[int(each) for each in row.split()] for row in rows] == [
        [i, *(layer[name] for name in names)] for i, layer in enumerate(facts["layers"])
    ]
