"""Two processes that share a model through `mx.distributed`, on this machine: answers, errors of one, and the end of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import random_model, save_folder
from test_parallel import GPT_OSS, OPENELM

from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss

ROOT = Path(__file__).parent.parent
SECONDS = 120  # on a loaded machine

# What both processes run; the first one prints what the two have found.
PROGRAM = """
import json, sys
from openelm_mlx.platforms import keep_float32
keep_float32()
import mlx.core as mx
import openelm_mlx as om
from openelm_mlx.errors import SettingError
from openelm_mlx.parallel.group import joined

found = {}
prompt = [5, 9, 11, 40, 2, 7, 77, 31, 8, 90, 4, 6, 61, 13, 17]
sampled = om.SamplingParams(temperature=1.5)
for folder, form in json.loads(sys.argv[1]):
    of = found[f"{folder.rpartition('/')[2]} {form}"] = {}
    whole, shared = om.load(folder, dtype="float32")[0], om.load(folder, dtype="float32", parallel=form)[0]
    tokens = mx.array([prompt])
    one, two = whole(tokens), shared(tokens)
    of["difference"] = (mx.abs(one - two).max() / mx.abs(one).max()).item()
    answers = []
    for model in (whole, shared):
        options = dict(max_tokens=12, prefill_chunk=8 if model is whole else 8 - joined().rank)
        answers.append([chunk.token for chunk in om.stream_generate(model, None, prompt, **options)])
    of["answers"] = answers
    drawn = [chunk.token for chunk in om.stream_generate(shared, None, prompt, max_tokens=9, sampling=sampled)]
    of["drawn"] = joined().exchange(drawn)
    half = om.load(folder, dtype="bfloat16", parallel=form)[0]
    again = om.load(folder, dtype="bfloat16")[0]
    one, two = again(tokens).astype(mx.float32), half(tokens).astype(mx.float32)
    of["difference in half precision"] = (mx.abs(one - two).max() / mx.abs(one).max()).item()
    of["bytes"] = joined().exchange(sum(a.nbytes for _, a in __import__("mlx.utils").utils.tree_flatten(shared.parameters())))
    of["refused"] = []
    for options in (dict(draft=om.PromptLookup()), dict(prefix_cache=om.PrefixCache()), dict(max_tokens=joined().rank + 1)):
        try:
            om.stream_generate(shared, None, prompt, **options)
        except SettingError as error:
            of["refused"].append(str(error))
    try:
        om.Engine(shared)
    except SettingError as error:
        of["refused"].append(str(error))
if joined().is_first:
    print(json.dumps(found))
"""


def start(rank: int, hosts: Path, *command: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def two(folder: Path, first: list[str], second: list[str]):
    """Two processes, which are killed in the end whatever happens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    processes = [start(rank, hosts, *command) for rank, command in enumerate((first, second))]
    try:
        yield processes
    finally:
        for each in processes:
            each.kill()
            each.wait()


def results(processes) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    deadline, found = time.monotonic() + SECONDS, []
    for each in processes:
        out, error = each.communicate(timeout=max(1, deadline - time.monotonic()))
        found.append((each.returncode, out, error))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {
        "gpt-oss": write_random_gpt_oss(top / "gpt-oss", GPT_OSS),
        "openelm": save_folder(top / "openelm", random_model(**OPENELM), tokenizer="llama"),
    }


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """What the program found, with all forms of both families."""
    forms = [(models["openelm"], "tensor"), (models["gpt-oss"], "tensor"), (models["gpt-oss"], "experts")]
    command = ["-c", PROGRAM, json.dumps([(str(folder), form) for folder, form in forms])]
    with two(tmp_path_factory.mktemp("run"), command, command) as processes:
        (code, out, error), (other, _, other_error) = results(processes)
    assert (code, other) == (0, 0), error + other_error
    return json.loads(out)


FORMS = ["openelm tensor", "gpt-oss tensor", "gpt-oss experts"]


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_give_the_tokens_of_one(found, form):
    whole, shared = found[form]["answers"]
    assert whole == shared
    assert len(whole) > 3
    assert found[form]["difference"] <= (0 if "experts" in form else 1e-5)
    assert found[form]["difference in half precision"] <= (0 if "experts" in form else 0.05)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_without_a_seed_is_the_same_on_both(found, form):
    first, second = found[form]["drawn"]
    assert first == second
    assert len(first) > 1


@pytest.mark.parametrize("form", FORMS)
def test_what_one_of_them_would_decide_alone_is_refused_on_both(found, form):
    draft, prefix_cache, options, engine = found[form]["refused"]
    assert draft.startswith("draft is not for a model that several machines share")
    assert prefix_cache.startswith("prefix_cache is not for a model that several machines share")
    assert options.startswith("Machine 2 of 2 has another prompt or other options")
    assert engine.startswith("An engine decides by the clock")


def generate(folder: Path, form: str, *arguments: str) -> list[str]:
    return ["-m", "openelm_mlx.generate", "--model", str(folder), "--parallel", form, *arguments]


def test_only_the_first_one_is_heard(models, tmp_path):
    command = generate(
        models["openelm"], "tensor", "--prompt", "Hello", "--max-tokens", "8", "--temperature", "1", "--json"
    )
    with two(tmp_path, command, command) as processes:
        (code, out, error), other = results(processes)
    assert code == 0, error
    assert len(json.loads(out)["tokens"]) > 1
    assert other == (0, "", "")


def test_an_error_of_the_second_is_shown_by_the_first(models, tmp_path):
    """It has another file: of its model, or of the prompt; or it cannot be divided, which both say."""
    (tmp_path / "other").mkdir()
    other = save_folder(tmp_path / "other" / "openelm", random_model(seed=1, **OPENELM), tokenizer="llama")
    prompt = ["--prompt", "Hello"]
    with two(tmp_path, generate(models["openelm"], "tensor", *prompt), generate(other, "tensor", *prompt)) as processes:
        first, second = results(processes)
    assert first == (2, "", "openelm_mlx: Machine 2 of 2 has other files of the model: give all of them the same ones, at the "
                     "same revision.\n")  # fmt: skip
    assert second == (2, "", "")
    with two(
        tmp_path,
        generate(models["openelm"], "tensor", "--prompt-file", "README.md"),
        generate(models["openelm"], "tensor", "--prompt-file", "nothing.txt"),
    ) as processes:
        first, second = results(processes)
    assert first[:2] == (2, "")
    assert first[2].startswith("openelm_mlx: Machine 2 of 2: nothing.txt cannot be read")
    assert first[2].count("\n") == 1
    assert second == (2, "", "")


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGSTOP, signal.SIGINT))]
)
def test_when_one_ends_the_other_does(models, tmp_path, how):
    """The second one is killed or sleeps, and the first says so; or Ctrl-C ends the first one, and the second with it."""
    command = generate(
        models["openelm"], "tensor", "--prompt", "Hello", "--sliding-window", "16", "--max-tokens", "1000000"
    )
    command += ["--logit-bias", "2=-1000000", "--worker-timeout", "3"]  # it never ends by itself
    with two(tmp_path, command, command) as processes:
        first, second = processes
        assert first.stdout.read(1)
        (first if how == signal.SIGINT else second).send_signal(how)
        _, error = first.communicate(timeout=SECONDS)
        second.send_signal(signal.SIGCONT)
        other_out, other_error = second.communicate(timeout=SECONDS)
    if how == signal.SIGINT:
        assert first.returncode == 130
    else:
        what = "was lost" if how == signal.SIGKILL else "has been silent for 3 seconds"
        assert first.returncode == 2
        assert f"Another of the 2 machines {what}" in error
        assert error.count("\n") == 1
    assert other_out + other_error == ""
    assert "Traceback" not in error
