"""What a user can get wrong with gpt-oss, on the command line: one sentence on stderr, nothing on stdout, exit code 2."""

import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.errors import PromptError, SettingError
from openelm_mlx.sources import DEMOS
from openelm_mlx.text.openai_chat import conversation
from openelm_mlx.text.schema import Tool

EXPERTS = "model.layers.0.mlp.experts."


@pytest.fixture
def demo(tmp_path) -> Path:
    return Path(shutil.copytree(DEMOS["demo-gpt-oss"], tmp_path / "demo"))


def changed(folder: Path, **tensors) -> Path:
    """The folder with tensors of layer 0 replaced by what a function makes of them; names end as the keywords do."""
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    for ending, change in tensors.items():
        (name,) = [each for each in arrays if each.startswith("model.layers.0.") and each.endswith(ending)]
        arrays[name] = mx.array(change(np.array(arrays[name].astype(mx.float32)))).astype(arrays[name].dtype)
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "changed.safetensors"), arrays)
    (folder / "changed.safetensors").replace(folder / "model.safetensors")
    return folder


def refused(capsys, folder, *options) -> str:
    assert main(["generate", "--model", str(folder), "--prompt", "What is a piano?", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = captured.err.strip().splitlines()
    return line


def with_a_byte_of_255(scales):
    scales[3, 5, 0] = 255
    return scales


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"gate_up_proj_scales": lambda a: a[:, :-1]}, r"gate_up_proj_scales.*\[16, 383, 8\].*\[16, 384, 8\]"),
        ({"down_proj_blocks": lambda a: a[..., :-1, :]}, r"down_proj_blocks.*\[16, 256, 5, 16\]"),
        ({"down_proj_scales": with_a_byte_of_255}, r"layers\.0\.mlp\.experts\.down_proj.*255.*NaN"),
        ({"router.weight": lambda a: a[:-1], "router.bias": lambda a: a[:-1]}, r"router\.weight.*\[15, 256\]"),
        ({"gate_up_proj_bias": lambda a: a[:-1]}, r"gate_up_proj_bias.*\[15, 384\]"),
    ],
)
def test_tensors_that_disagree(demo, capsys, tensors, said):
    assert re.search(said, refused(capsys, changed(demo, **tensors)))


@pytest.mark.parametrize("options", [[], ["--expert-slots", "4"]])
def test_a_damaged_scale_is_found_wherever_experts_are_read(demo, tmp_path, capsys, options):
    folder = changed(demo, down_proj_scales=with_a_byte_of_255)
    assert "255" in refused(capsys, folder, *options)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"layers\.0\.mlp\.experts\.down_proj_scales in .*model\.safetensors.*255.*NaN", line)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo"]


def test_a_missing_part_of_the_original_folder(tmp_path, capsys):
    config = {
        **released_gpt_oss_config("20b"), "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "eos_token_id": 3,
    }  # fmt: skip
    folder = write_random_gpt_oss(tmp_path / "original", config, "openai-original", max_file_bytes=60_000)
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    model, tokenizer = om.load(folder)
    assert (model.spec.hidden_size, tokenizer) == (64, None)
    parts[1].unlink()
    assert f"lacks 1 of the {len(parts)} shards" in refused(capsys, folder)
    (folder / "model.safetensors.index.json").unlink()  # OpenAI's folder has none
    assert f"part 2 of {len(parts)} is missing" in refused(capsys, folder)
    shutil.rmtree(folder)
    shutil.copytree(FIXTURES / "gpt_oss_tiny" / "original", folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(capsys, folder)
    (folder / "model.safetensors").unlink()
    shutil.copyfile(FIXTURES / "gpt_oss_tiny" / "original" / "config.json", folder / "config.json")
    assert "holds no weights" in refused(capsys, folder)


def test_the_original_folder_finds_the_tokenizer_above_it(demo, tmp_path, capsys):
    original = tmp_path / "demo" / "original"
    original.mkdir()
    for name in ("config.json", "model.safetensors"):
        (demo / name).rename(original / name)
    _, tokenizer = om.load(original)
    assert tokenizer.files[0].parent == demo
    (demo / "tokenizer.json").unlink()
    assert "--tokenizer openai/gpt-oss-20b" in refused(capsys, original)


def test_a_tokenizer_without_harmony_s_tokens(demo, capsys):
    path = demo / "tokenizer.json"
    path.write_text(path.read_text().replace("<|channel|>", "<|kanal|>"))
    line = refused(capsys, demo)
    assert "<|channel|>" in line


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "tool", "content": "42"}], "tool"),
        ([{"role": "user", "content": "hi"}, {"role": "tool", "tool_call_id": "x", "content": "42"}], "x"),
        ([{"role": "narrator", "content": "hi"}], "narrator"),
        ([], "no messages"),
    ],
)
def test_conversations_that_break_the_rules(messages, said):
    with pytest.raises(PromptError, match=said):
        conversation(messages)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "object", "properties": {"a": {"type": "nothing"}}}, "nothing"),
        ({"type": "object", "properties": ["a"]}, "properties"),
        ({"type": "object", "properties": {"a": {"enum": "red"}}}, "enum"),
        ("a string", "a str; give a JSON Schema"),
    ],
)
def test_tools_whose_schema_is_none(parameters, said):
    with pytest.raises(SettingError, match=said):
        Tool("search", "Looks things up.", parameters)
