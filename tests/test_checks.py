"""The checks of whole numbers and the printed sizes that all rooms share, and that nobody writes another."""

import ast
import json
import re
from pathlib import Path

import pytest

import openelm_mlx as om
from openelm_mlx.checks import is_number, is_whole, size, whole_number
from openelm_mlx.decoding.drafts import PromptLookup
from openelm_mlx.errors import ConfigError, SettingError
from openelm_mlx.specs import spec_from_config

PACKAGE = Path(om.__file__).parent
HUGE = 10**5000  # Python refuses to write it out
WRONG = [True, False, 1.0, "1", None, float("nan"), 0, 9, HUGE]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_what_is_no_whole_number_of_the_range(value):
    with pytest.raises(
        SettingError, match=r"^count is .*: it must be a whole number, at least 1 and at most the box's 8\.$"
    ):
        whole_number("count", value, high=8, whose="the box's ")
    with pytest.raises(ConfigError):
        whole_number("count", value, 1, 8, error=ConfigError)


def test_whole_numbers_of_the_range():
    assert [whole_number("count", value, 0, 8) for value in (0, 1, 8)] == [0, 1, 8]
    assert whole_number("count", HUGE) == HUGE
    with pytest.raises(SettingError, match=r"count is -1: it must be a whole number, at least 0\.$"):
        whole_number("count", -1, low=0)
    assert [is_whole(value) for value in (0, True, 1.0)] == [True, False, False]
    assert [is_number(value) for value in (0, True, 1.5, "1")] == [True, False, True, False]


def test_sizes_for_people():
    sizes = {0: "0 bytes", 999: "999 bytes", 1234: "1.2 kB", 3_100_000: "3.1 MB", 12_713_120_000: "12.71 GB"}
    assert {count: size(count) for count in sizes} == sizes


NUMBERS = {
    "generate": ("max_tokens", "prefill_chunk", "sliding_window"),
    "plan": ("context_length", "batch_size", "prefill_chunk", "expert_slots"),
    "load": ("context_length", "batch_size", "expert_slots", "dense_bits", "kv_bits", "memory_limit"),
    "SamplingParams": ("top_k", "seed"),
    "PrefixCache": ("max_bytes", "max_buffers"),
    "PromptLookup": ("num_draft_tokens", "ngram"),
}


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, names in NUMBERS.items() for name in names])
def test_every_option_that_is_a_whole_number_is_refused_in_a_sentence(call, name):
    has_no_end = (call, name) in (("generate", "max_tokens"), ("generate", "prefill_chunk")) or call == "PrefixCache"
    for value in (True, -1, 1.5, *(() if has_no_end else (HUGE,))):
        with pytest.raises(SettingError, match=name):
            called(call, {name: value})


def called(call, options):
    if call == "generate":
        return om.generate(*om.load("demo-openelm"), "1 2", **{"max_tokens": 1, **options})
    if call == "PromptLookup":
        return PromptLookup(**options)
    return getattr(om, call)(*(["demo-gpt-oss"] if call in ("plan", "load") else []), **options)


def test_a_config_s_whole_numbers():
    config = json.loads((PACKAGE / "demo" / "gpt_oss" / "config.json").read_text())
    for value in (True, 0, HUGE, "3"):
        with pytest.raises(ConfigError, match=r'The config\'s "num_hidden_layers" is .*whole number'):
            spec_from_config(config | {"num_hidden_layers": value})


HOMES = {"Progress": "hub/names.py", "INTERRUPTED": "commands/__init__.py", "DEFAULT_CHUNK": "memory/plan.py"}


def test_nobody_writes_them_anew():
    """One sentence for a whole number out of its range, one for sizes, one progress, one exit code of Ctrl-C."""
    for file in PACKAGE.rglob("*.py"):
        name, text = file.relative_to(PACKAGE).as_posix(), file.read_text()
        assert name == "checks.py" or not re.search(r"must be a whole number, ", text), name
        defined = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert name == "checks.py" or not {"size", "_size", "in_words", "_in_words"} & set(defined), name
        for word, home in {
            "Progress": "hub/names.py",
            "INTERRUPTED": "commands/__init__.py",
            "DEFAULT_CHUNK": "memory/plan.py",
        }.items():
            assert not re.search(rf"^{word} = (Callable|\d)", text, re.MULTILINE) or name == home, (name, word)
