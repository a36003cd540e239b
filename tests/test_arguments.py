"""Every public callable with arguments of the wrong kind: one sentence that names the value, and no TypeError."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import openelm_mlx as om
from openelm_mlx import tools
from openelm_mlx.arguments import SAMPLING
from openelm_mlx.errors import SettingError, ToolError, UserError

TRAIN_CONFIG = Path(__file__).parent.parent / "examples" / "train" / "demo_openelm.yaml"
ODD = object()
# Values that are not text, number, path, function or collection that anything here takes.
NOT_TEXT = (5, -1, 1.5, b"x", [5], {5: 5}, ODD, True)
NOT_A_NUMBER = ("x", b"x", [5], {}, ODD, float("nan"), "")
NOT_A_FLAG = (5, 0, 1.5, "yes", "", b"x", [], {}, ODD)
NOT_A_FUNCTION = (5, 1.5, "x", b"x", [], {}, ODD, True)
NOT_A_PATH = (5, 1.5, b"x", [], {}, ODD, True, "a\0b", "\ud800")
NOT_A_MODEL = (5, None, "x", b"x", [], {}, ODD, True, print)
NOT_ONE_OF_OURS = (5, 1.5, "x", b"x", [], {}, ODD, True)

LOAD = {
    "source": NOT_TEXT, "context_length": NOT_A_NUMBER, "dtype": NOT_TEXT, "preset": NOT_TEXT, "dense_bits": NOT_A_NUMBER,
    "kv_bits": NOT_A_NUMBER, "expert_slots": NOT_A_NUMBER, "memory_limit": ("x", b"x", [5], {}, ODD, True, 5),
    "batch_size": (*NOT_A_NUMBER, None), "wire": NOT_A_FLAG, "tokenizer": NOT_TEXT, "chat_template": NOT_TEXT,
    "revision": NOT_TEXT, "adapter": NOT_TEXT, "progress": NOT_A_FUNCTION,
    "workers": (5, 1.5, b"x", {}, ODD, True, "", "a\0b", [5]), "secret_file": (5, 1.5, b"x", [], {}, ODD, True),
    "layers": (5, 1.5, b"x", {}, ODD, True, "a", [ODD]), "worker_timeout": (*NOT_A_NUMBER, 0, -1),
    "parallel": (*NOT_TEXT, "x", "tensor"),
}  # fmt: skip
FINETUNE = {
    "source": NOT_TEXT, "data": (5, 1.5, b"x", {}, ODD, True, [5], []), "output": (5, 1.5, b"x", [], {}, ODD, True, None),
    "method": NOT_TEXT, "recipe": NOT_TEXT, "validation": (b"x", {}, ODD, True, 1.5, 5), "steps": NOT_A_NUMBER,
    "epochs": NOT_A_NUMBER, "batch_size": NOT_A_NUMBER, "learning_rate": NOT_A_NUMBER, "final_learning_rate": NOT_A_NUMBER,
    "warmup_steps": NOT_A_NUMBER, "weight_decay": NOT_A_NUMBER, "max_grad_norm": NOT_A_NUMBER, "z_loss": NOT_A_NUMBER,
    "rank": NOT_A_NUMBER, "alpha": NOT_A_NUMBER, "dropout": NOT_A_NUMBER, "targets": (5, 1.5, b"x", {}, ODD, True, [5]),
    "layers": (5, 1.5, "x", b"x", {}, ODD, True, ["x"]), "preference": NOT_TEXT, "beta": NOT_A_NUMBER, "learn": NOT_TEXT,
    "too_long": NOT_TEXT, "max_length": NOT_A_NUMBER, "validate_every": NOT_A_NUMBER, "patience": NOT_A_NUMBER,
    "checkpointing": (5, 1.5, "x", b"x", [], {}, ODD), "tokens_at_once": NOT_A_NUMBER, "memory_limit": LOAD["memory_limit"],
    "dtype": NOT_TEXT, "tokenizer": NOT_TEXT, "chat_template": NOT_TEXT, "revision": NOT_TEXT,
    "reasoning_effort": NOT_TEXT, "date": NOT_TEXT, "format": NOT_TEXT, "seed": NOT_A_NUMBER, "restart": NOT_A_FLAG,
    "progress": NOT_A_FUNCTION,
}  # fmt: skip
TRAIN = {
    "config": (5, 1.5, b"x", [], {}, ODD, True, None, "no/such.yaml"),
    "output": (5, 1.5, b"x", [], {}, ODD, True, None),
    "steps": NOT_A_NUMBER,
    "restart": NOT_A_FLAG,
    "progress": NOT_A_FUNCTION,
    "started": NOT_A_FUNCTION,
}
SHARED = (
    "source",
    "context_length",
    "dtype",
    "preset",
    "dense_bits",
    "kv_bits",
    "expert_slots",
    "memory_limit",
    "revision",
    "adapter",
)
PLAN = {
    **{name: LOAD[name] for name in SHARED}, "batch_size": (*NOT_A_NUMBER, None), "prefill_chunk": NOT_A_NUMBER,
    "mac": NOT_TEXT, "machine": NOT_ONE_OF_OURS,
}  # fmt: skip
CONVERT = {
    **{name: LOAD[name] for name in ("source", "dtype", "preset", "tokenizer", "chat_template", "revision", "progress")},
    "destination": NOT_A_PATH, "quantize": (-1, 1.5, b"x", [5], ODD, True, "x"), "group_size": NOT_A_NUMBER,
    "max_file_bytes": (5, -1, 20_000, "x", "", b"x", [], {}, ODD, True, None, float("nan")),
    "verify": NOT_A_FLAG, "dry_run": NOT_A_FLAG, "private": NOT_A_FLAG, "upload": NOT_TEXT, "target": NOT_TEXT,
    "gguf_type": NOT_TEXT, "gguf_experts": NOT_TEXT, "adapter": NOT_TEXT, "merge_anyway": NOT_A_FLAG,
    "on_merge": NOT_A_FUNCTION,
}  # fmt: skip
EXPORT = {
    **{
        name: LOAD[name]
        for name in ("source", "dtype", "preset", "memory_limit", "tokenizer", "chat_template", "revision", "progress")
    },
    "destination": (*NOT_A_PATH, None, ""), "places": (5, "x", b"x", [], {}, ODD, True, None, [0], ["x"], [1.5], [True]),
    "chunk": (*NOT_A_NUMBER, None), "dense_bits": LOAD["dense_bits"],
}  # fmt: skip
GENERATE = {
    "model": NOT_A_MODEL, "tokenizer": NOT_ONE_OF_OURS, "prompt": (5, 1.5, b"x", [], {}, ODD, True, None, ""),
    "max_tokens": NOT_A_NUMBER, "sampling": NOT_ONE_OF_OURS, "stop": (5, b"x", {}, [5], ODD, True, None),
    "logprobs": NOT_A_NUMBER, "raw": (*NOT_A_FLAG, None), "chat_template": NOT_TEXT, "reasoning_effort": NOT_TEXT,
    "sliding_window": NOT_A_NUMBER, "prefill_chunk": NOT_A_NUMBER, "kv_bits": NOT_A_NUMBER, "schema": (5, b"x", [5], ODD),
    "regex": NOT_TEXT, "grammar": NOT_TEXT, "tool_schemas": (5, "x", b"x", [5], ODD, True), "prefix_cache": NOT_ONE_OF_OURS,
    "tools": (5, "x", b"x", {}, [5], ["x"], ODD, True), "tool_choice": (5, 1.5, "x", b"x", [], {}, ODD, True),
    "draft": NOT_ONE_OF_OURS, "adapter": (*NOT_TEXT, "x"),
}  # fmt: skip
CHAT = {
    "model": NOT_A_MODEL, "tokenizer": (*NOT_ONE_OF_OURS, None), "instructions": NOT_TEXT, "tools": (5, "x", {}, [5], ODD),
    "reasoning_effort": NOT_TEXT, "sampling": NOT_ONE_OF_OURS, "max_tokens": NOT_A_NUMBER,
    "max_rounds": (*NOT_A_NUMBER, None), "time_limit": NOT_A_NUMBER, "options": (5, "x", [], ODD, None, {"x": 5}),
    "prefix_cache": NOT_ONE_OF_OURS, "messages": (5, "x", {}, ODD, None, [5]),
}  # fmt: skip
NUMBERS = dict.fromkeys(SAMPLING, (*NOT_A_NUMBER, None, True))
# callable -> what else it needs, the wrong values of each parameter
TABLE = {
    "om.load": (om.load, {"source": "demo-openelm"}, LOAD),
    "om.add_adapter": (
        om.add_adapter, {"model": "MODEL", "source": "."},
        {"model": NOT_A_MODEL, "source": (*NOT_TEXT, None, "x"), "name": (*NOT_TEXT, "none", "\n"), "activate": NOT_A_FLAG},
    ),
    "om.remove_adapter": (
        om.remove_adapter, {"model": "MODEL", "name": "x"}, {"model": NOT_A_MODEL, "name": (*NOT_TEXT, None, "x")},
    ),
    "om.use_adapter": (
        om.use_adapter, {"model": "MODEL", "name": "x"}, {"model": NOT_A_MODEL, "name": (*NOT_TEXT, "x")},
    ),
    "om.convert_adapter": (
        om.convert_adapter, {"source": "x", "destination": "o", "base": "demo-openelm"},
        {
            "source": (*NOT_TEXT, None, "x"), "destination": (*NOT_A_PATH, None), "base": (*NOT_TEXT, None),
            "format": (*NOT_TEXT, None, "gguf"),
        },
    ),
    "om.adapter_names": (om.adapter_names, {"model": "MODEL"}, {"model": NOT_A_MODEL}),
    "om.finetune": (
        om.finetune, {"source": "demo-openelm", "data": [{"prompt": "a", "completion": "b"}], "output": "o"}, FINETUNE,
    ),
    "om.train": (om.train, {"config": str(TRAIN_CONFIG), "output": "o"}, TRAIN),
    "om.plan": (om.plan, {"source": "demo-openelm"}, PLAN),
    "om.convert": (om.convert, {"source": "demo-openelm", "destination": None, "dry_run": True}, CONVERT),
    "om.export": (om.export, {"source": "demo-openelm", "destination": "o"}, EXPORT),
    "om.generate": (om.generate, {"model": "MODEL", "tokenizer": "TOKENIZER", "prompt": "Hi", "max_tokens": 1}, GENERATE),
    "om.stream_generate": (om.stream_generate, {"model": "MODEL", "tokenizer": "TOKENIZER", "prompt": "Hi"}, GENERATE),
    "om.Engine": (
        om.Engine, {"model": "MODEL", "tokenizer": "TOKENIZER"},
        {
            "model": NOT_A_MODEL, "tokenizer": NOT_ONE_OF_OURS, "max_running": NOT_A_NUMBER, "max_waiting": NOT_A_NUMBER,
        },
    ),
    "om.SamplingParams": (
        om.SamplingParams, {}, {**NUMBERS, "logit_bias": (5, "x", [5], None, {"x": 1}, {5: "x"}), "seed": NOT_A_NUMBER},
    ),
    "om.PromptLookup": (om.PromptLookup, {}, dict.fromkeys(("num_draft_tokens", "ngram"), (*NOT_A_NUMBER, None))),
    "om.DraftModel": (
        om.DraftModel, {"model": "MODEL"},
        {"model": NOT_A_MODEL, "tokenizer": NOT_ONE_OF_OURS, "num_draft_tokens": (*NOT_A_NUMBER, None)},
    ),
    "om.PrefixCache": (om.PrefixCache, {}, dict.fromkeys(("max_bytes", "max_buffers"), (*NOT_A_NUMBER, None))),
    "om.score": (
        om.score, {"model": "MODEL", "tokenizer": "TOKENIZER", "requests": (("a", "b"),)},
        {
            "model": NOT_A_MODEL, "tokenizer": (*NOT_ONE_OF_OURS, None), "add_bos": NOT_A_FLAG, "on_scores": NOT_A_FUNCTION,
            "requests": (5, "x", b"x", {}, [5], ["ab"], [("a", 5)], [("a", "")], ODD, True, None),
        },
    ),
    "om.perplexity": (
        om.perplexity, {"model": "MODEL", "tokenizer": "TOKENIZER", "text": "Hi"},
        {
            "model": NOT_A_MODEL, "tokenizer": (*NOT_ONE_OF_OURS, None), "on_scores": NOT_A_FUNCTION, "window": NOT_A_NUMBER,
            "text": (5, "", b"x", {}, [5], [], ODD, True, None),
        },
    ),
    "om.compare": (
        om.compare, {"a": "MODEL", "b": "MODEL", "texts": "Hi"},
        {
            "a": (*NOT_A_MODEL, "no-such-model"), "b": NOT_A_MODEL, "texts": (5, "", b"x", {}, [5], [], ODD, True, None),
            "window": NOT_A_NUMBER, "load_options": (5, "x", [5], ODD, True), "other_load_options": (5, "x", [5], ODD, True),
            "progress": NOT_A_FUNCTION,
        },
    ),
    "om.Chat": (om.Chat, {"model": "MODEL", "tokenizer": "TOKENIZER"}, CHAT),
    "Toolbox": (
        tools.Toolbox, {"names": "calculator"},
        {"names": (*NOT_TEXT, None), "allow_unsandboxed": NOT_A_FLAG, "count_tokens": NOT_A_FUNCTION},
    ),
    "PythonTool": (
        tools.PythonTool, {"allow_unsandboxed": True},
        {
            "limits": NOT_ONE_OF_OURS, "allow_unsandboxed": (*NOT_A_FLAG, None), "python": NOT_ONE_OF_OURS,
            "sandbox": (*NOT_TEXT, "x", ""),
        },
    ),
    "FileBrowser": (tools.FileBrowser, {"folder": "."}, {"folder": NOT_A_PATH, "count_tokens": NOT_A_FUNCTION}),
    "PatchTool": (tools.PatchTool, {"folder": "."}, {"folder": (*NOT_A_PATH, None, "")}),
    "apply_patch": (
        tools.apply_patch, {"patch": "*** Begin Patch", "folder": "."},
        {"patch": (*NOT_TEXT, None), "folder": (*NOT_A_PATH, None, "")},
    ),
    "McpServer": (
        tools.McpServer, {"source": "no-such-program"},
        {
            "source": (5, b"x", {}, [5], ODD, None, True), "environment": (5, "x", [5], ODD, {"x": 5}),
            "timeout": (*NOT_A_NUMBER, 0, -1, True, None),
        },
    ),
    "calculator": (tools.calculator, {"expression": "1"}, {"expression": (*NOT_TEXT, None)}),
    "function_tool": (tools.function_tool, {"function": tools.calculator}, {"function": (5, "x", None, [], {}, ODD)}),
}  # fmt: skip
# What comes back and is not made by who uses the library, and a description.
RESULTS = {
    "Chunk", "Statistics", "UserError", "EngineFullError", "NoAnswerWarning", "Tool", "FunctionTool", "__version__",
}  # fmt: skip
CASES = [(name, parameter) for name, (_, _, wrong) in TABLE.items() for parameter in wrong]


@pytest.fixture(scope="module")
def loaded():
    """demo-gpt-oss: the model with tools and efforts."""
    return om.load("demo-gpt-oss", context_length=128)


def filled(given: dict, loaded) -> dict:
    model, tokenizer = loaded
    own = {"MODEL": model, "TOKENIZER": tokenizer}
    return {name: own.get(value, value) if isinstance(value, str) else value for name, value in given.items()}


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.rstrip()[-1] in ".?"
    return text


def test_every_public_callable_and_each_of_its_parameters_is_in_the_table():
    names = {f"om.{name}" for name in om.__all__ if name not in RESULTS} | {*tools.__all__} - RESULTS
    assert names == {*TABLE}
    for name, (target, _, wrong) in TABLE.items():
        target = om.stream_generate if name == "om.generate" else target
        parameters = inspect.signature(target).parameters
        assert {*parameters} - {"self"} == {*wrong}, name


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=lambda value: value)
def test_a_wrong_value_is_a_sentence(name, parameter, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, given, wrong = TABLE[name]
    for value in wrong[parameter]:
        with pytest.raises(UserError) as error:
            call(**{**filled(given, loaded), parameter: value})
        sentence(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TABLE)
def test_names_and_numbers_of_arguments_are_sentences(name, loaded):
    call, given, wrong = TABLE[name]
    given = filled(given, loaded)
    with pytest.raises(UserError) as error:
        call(**given, nonsense=5)
    assert "has no keyword 'nonsense'" in sentence(error)
    with pytest.raises(UserError) as error:
        call(*[7] * 30)
    assert re.search(r"takes (no|\d+) values? without a name and got 30, the first one too many 7", sentence(error))
    if name not in ("om.SamplingParams", "om.PromptLookup", "om.PrefixCache", "PythonTool"):
        with pytest.raises(UserError) as error:
            call()
        assert f"{name} has no {next(iter(wrong))}: write {name}(" in sentence(error)
        first = next(iter(inspect.signature(call).parameters))
        with pytest.raises(UserError, match=f"got {first} twice"):
            call(given[first], **{first: given[first]})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: om.SamplingParams(temp=0.7), "Did you mean temperature"),
        (lambda: om.SamplingParams(top_q=0.7), "Did you mean top_"),
        (lambda: om.PromptLookup(num_draft=3), "Did you mean num_draft_tokens"),
        (lambda: om.PrefixCache(max_byte=3), "Did you mean max_bytes"),
        (lambda: om.PrefixCache(temperature=1), r"om\.generate, in sampling=om\.SamplingParams\(temperature=1\)"),
        (lambda: om.load("demo-openelm", 4), "name the others, for example context_length="),
        (lambda: om.load("demo-openelm", progress=5), "progress is 5: give a function, or leave it out"),
        (lambda: om.convert("demo-openelm", destination=5), "destination is 5: give a path"),
        (lambda: om.convert("demo-openelm", "o", max_file_bytes="x"), 'max_file_bytes is \'x\'.*"8GB"'),
        (lambda: om.convert("demo-openelm", "~nobody-there/o"), "no home folder for ~nobody-there"),
        (lambda: om.PrefixCache().save("~nobody-there/o"), "no home folder for ~nobody-there"),
        (lambda: om.load(10**5000), "a number of thousands of digits"),
        (lambda: om.load("demo-openelm", progress=10**5000), "a number of thousands of digits"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_to_write(call, said):
    with pytest.raises(UserError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tools.FileBrowser(5), "folder is 5: give a path"),
        (lambda: tools.PatchTool("~nobody-there/x"), "is not a folder"),
        (lambda: tools.apply_patch("*** Begin Patch\n*** End Patch", "no-such-folder"), "is not a folder"),
        (lambda: tools.apply_patch(5, "."), "patch is 5: give text"),
        (lambda: tools.Toolbox(5), "names is 5: give names with commas"),
        (lambda: tools.McpServer(5), "source is 5: give a command line"),
        (lambda: tools.calculator(5), "expression is 5: give text"),
        (lambda: tools.calculator("1/0"), "'1/0' cannot be computed: division by zero"),
        (lambda: tools.calculator("sqrt(0-1)"), "cannot be computed"),
        (lambda: tools.calculator("round()"), "cannot be computed"),
        (lambda: tools.calculator("import os"), "not an arithmetic expression"),
    ],
)
def test_tools_say_it_in_their_own_error(call, said):
    with pytest.raises(ToolError, match=said):
        call()


def test_a_size_as_text_divides_files(tmp_path):
    found = om.convert("demo-openelm", tmp_path / "o", max_file_bytes="2MB")
    sizes = [size for name, size in found.files.items() if name.endswith(".safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 2_100_000


def test_what_looks_like_a_model_is_one(loaded):
    model, _ = loaded
    wrapped = SimpleNamespace(spec=model.spec)
    assert om.DraftModel(wrapped).model is wrapped


def test_the_names_of_sampling_are_those_of_its_params():
    assert tuple(each.name for each in dataclasses.fields(om.SamplingParams)) == SAMPLING


def test_what_is_checked_is_still_what_it_was():
    params = om.SamplingParams(0.5, 3)
    assert (params.temperature, params.top_k) == (0.5, 3)
    assert dataclasses.replace(params, seed=4) == om.SamplingParams(temperature=0.5, top_k=3, seed=4)
    assert [*inspect.signature(om.SamplingParams).parameters] == [*SAMPLING]
    assert inspect.signature(om.load).parameters["source"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert tools.FileBrowser(Path(".")).folder == Path.cwd()
    with pytest.raises(SettingError):
        om.SamplingParams(temperature=-1)
