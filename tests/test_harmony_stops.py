"""What ends an answer of gpt-oss does so whatever a file beside the model says, and in every copy of it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import FIXTURES, config_of

import openelm_mlx as om
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.errors import ConfigError
from openelm_mlx.sources import DEMOS
from openelm_mlx.specs import spec_from_config
from openelm_mlx.text.tokenizer import load_tokenizer

NAMES = ("<|return|>", "<|call|>", "<|endoftext|>")


@pytest.fixture
def demo(tmp_path) -> Path:
    """gpt-oss with a vocabulary of its own, whose generation config is as OpenAI's: without <|call|>."""
    folder = Path(shutil.copytree(DEMOS["demo-gpt-oss"], tmp_path / "demo"))
    special = load_tokenizer(folder).special_tokens
    write(folder, [special["<|return|>"], special["<|endoftext|>"]])
    return folder


def write(folder: Path, stops) -> None:
    for name in ("generation_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        content["eos_token_id"] = stops if name == "generation_config.json" or isinstance(stops, int) else stops[0]
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("stops", ["as it is", "none", 3, "no file", "not special"])
def test_the_vocabulary_of_any_size_says_what_stops(demo, stops):
    special = load_tokenizer(demo).special_tokens
    if stops == "no file":
        (demo / "generation_config.json").unlink()
        (demo / "tokenizer_config.json").unlink()
    elif stops == "not special":
        content = json.loads((demo / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["special"] &= token["content"] not in NAMES[1:]
        (demo / "tokenizer.json").write_text(json.dumps(content))
    elif stops == "none":
        (demo / "generation_config.json").write_text("{}")
    elif stops == 3:
        write(demo, 3)
    tokenizer = load_tokenizer(demo)
    assert {special[name] for name in NAMES} <= set(tokenizer.eos_tokens)
    assert {special[name] for name in NAMES} <= set(tokenizer.special_tokens.values())


def test_generation_stops_at_a_call(demo):
    """Whatever the prompt is: the model is made to say <|call|>, and says nothing after it."""
    model, tokenizer = om.load(demo)
    call = tokenizer.special_tokens["<|call|>"]
    sampling = om.SamplingParams(temperature=0.0, logit_bias={call: 1e4})
    chunks = list(om.stream_generate(model, tokenizer, [1, 2, 3], max_tokens=5, sampling=sampling))
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    assert len(chunks) <= 2


@pytest.mark.parametrize("source", ["demo", "mxfp4"])
def test_a_converted_copy_stops_there_too(demo, tmp_path, source):
    special = load_tokenizer(demo).special_tokens
    om.convert(demo, tmp_path / "copy", 8 if source == "demo" else None)
    for name in ("config.json", "generation_config.json"):
        stops = json.loads((tmp_path / "copy" / name).read_text())["eos_token_id"]
        assert stops[0] == special["<|return|>"]
        assert set(stops) == {special[each] for each in NAMES}
    assert set(spec_from_config(config_of(tmp_path / "copy")).eos_tokens) == {special[each] for each in NAMES}
    (tmp_path / "copy" / "tokenizer.json").unlink()
    assert set(om.load(tmp_path / "copy")[0].spec.eos_tokens) == {special[each] for each in NAMES}


@pytest.mark.parametrize(
    ("vocab_size", "eos", "expected"),
    [
        (201088, 200002, {200002, 199999, 200012}),
        (201088, None, {200002, 199999, 200012}),
        (201088, [3], {3, 200002, 199999, 200012}),
        (201152, 200002, {200002, 199999, 200012}),  # a fine-tune with more rows
        (200019, [200002, 199999], {200002, 199999, 200012}),  # cut to its tokens
        (200005, 200002, {200002, 199999}),
        (250000, 7, {7}),  # another vocabulary
        (320, 3, {3}),
    ],
)
def test_without_a_tokenizer_the_config_says_whose_vocabulary_it_is(vocab_size, eos, expected):
    config = {**released_gpt_oss_config("20b"), "vocab_size": vocab_size, "eos_token_id": eos}
    assert set(spec_from_config(config).eos_tokens) == expected


def test_openelm_s_stops_are_its_files(tmp_path):
    for name in ("llama", "llama_json"):
        assert load_tokenizer(FIXTURES / "tokenizers" / name).eos_tokens == (2,)


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="eos_token_id"):
        spec_from_config({**released_gpt_oss_config("20b"), "eos_token_id": 201088})
