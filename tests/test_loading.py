"""From a source to a model: what is found, in which order, in which type, and what is refused."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, load_fixture, random_model, save_folder
from mlx.utils import tree_flatten

import openelm_mlx as om
from openelm_mlx import placement, weights
from openelm_mlx.errors import CheckpointError, SettingError, TokenizerError
from openelm_mlx.hub import RepoFile
from openelm_mlx.loading import load
from openelm_mlx.placement import default_dtype
from openelm_mlx.sources import choose_model_files
from openelm_mlx.specs import spec_from_config
from openelm_mlx.tokenizers import resolve_chat_template

SPECS = {
    size: spec_from_config({"model_name": f"OpenELM-{size}", "vocab_size": 32000, "max_context_length": 2048})
    for size in ("270M", "3B")
}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def _no_cached_tokenizers(monkeypatch):
    """The machine's own Hugging Face cache must not decide a test."""
    monkeypatch.setattr("openelm_mlx.hub.cached_file", lambda *_: None)


def test_a_folder_with_its_tokenizer(model, tmp_path):
    ours, tokenizer = load(save_folder(tmp_path / "m", model, "llama"))
    assert mx.array_equal(ours(mx.array([[1, 2, 3]])), model(mx.array([[1, 2, 3]])))
    assert tokenizer.encode_prompt("Hello")[0] == 1
    assert om.generate(ours, tokenizer, "Hello", max_tokens=3)


def test_a_folder_without_a_tokenizer_loads_and_takes_tokens(model, tmp_path):
    ours, tokenizer = load(save_folder(tmp_path / "m", model))
    assert tokenizer is None
    assert len(list(om.stream_generate(ours, None, [1, 2, 3], max_tokens=2))) == 2
    with pytest.raises(TokenizerError, match="--tokenizer"):
        om.generate(ours, tokenizer, "Hello")


def test_the_search_for_a_tokenizer(model, tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "m", model)
    cached = FIXTURES / "tokenizers" / "llama" / "tokenizer.model"
    monkeypatch.setattr(
        "openelm_mlx.hub.cached_file",
        lambda repo, name: cached if "meta-llama" in repo and "model" in name else None,
    )
    assert load(folder)[1].files[0] == cached
    # What stands in the folder comes before the cache, and what was asked for before both.
    shutil.copyfile(FIXTURES / "tokenizers" / "llama_json" / "tokenizer.json", folder / "tokenizer.json")
    assert load(folder)[1].files[0] == folder / "tokenizer.json"
    asked = FIXTURES / "tokenizers" / "llama_metaspace"
    assert load(folder, tokenizer=asked)[1].files[0] == asked / "tokenizer.json"
    assert load(folder, tokenizer=asked / "tokenizer.json")[1].files[0] == asked / "tokenizer.json"


@pytest.mark.parametrize("vocab_size", [100, 4096])  # fewer rows than the tokenizer has tokens, or far more
@pytest.mark.parametrize("tokenizer", ["llama", "byte_level"])
def test_another_model_s_tokenizer(tmp_path, tokenizer, vocab_size):
    small = random_model(vocab_size=vocab_size)
    with pytest.raises(TokenizerError, match="another model"):
        load(save_folder(tmp_path / "m", small, tokenizer))


def test_a_tokenizer_that_begins_texts_with_another_token(model, tmp_path):
    folder = save_folder(tmp_path / "m", model, "llama", {"bos_token_id": 7})
    with pytest.raises(TokenizerError, match="begins texts with token 1 and the model expects 7"):
        load(folder)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_the_gpt_oss_demo_thinks_longer_the_more_effort_is_asked_for(effort):
    ours, tokenizer = load("demo-gpt-oss")
    chunks = list(om.stream_generate(ours, tokenizer, "What is a boat?", reasoning_effort=effort))
    thought = "".join(chunk.reasoning for chunk in chunks)
    answer = "".join(chunk.text for chunk in chunks)
    assert thought.count("a kind of") == {"low": 1, "medium": 3, "high": 6}[effort]
    assert answer == "a small vessel for travel on water"
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("source", ["a" * 300, "a\0b", None, 5])
def test_sources_that_can_be_no_path(source):
    with pytest.raises(CheckpointError):
        load(source)


@pytest.mark.parametrize("source", ["nowhere", "./no/such/folder", "demo-nothing"])
def test_sources_that_are_not_there(source):
    with pytest.raises(CheckpointError, match="no file or folder"):
        load(source)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, mx.float32), ("bfloat16", mx.bfloat16), (mx.float16, mx.float16)]
)
def test_the_type_to_compute_in(model, tmp_path, dtype, expected):
    ours, _ = load(save_folder(tmp_path / "m", model), dtype=dtype)
    assert ours(mx.array([[1]])).dtype == expected


@pytest.mark.parametrize("dtype", ["float64", "int8", mx.int32, 3])
def test_types_that_are_none(model, tmp_path, dtype):
    with pytest.raises(SettingError, match="float32, bfloat16, float16"):
        load(save_folder(tmp_path / "m", model), dtype=dtype)


def test_3b_is_never_read_as_float16_by_itself():
    assert default_dtype(SPECS["3B"], mx.float16) == mx.bfloat16
    assert default_dtype(SPECS["3B"], mx.float32) == mx.float32
    assert default_dtype(SPECS["270M"], mx.float16) == mx.float16


def test_context_length(model, tmp_path):
    folder = save_folder(tmp_path / "m", model)
    assert load(folder)[0].context_length == 64
    assert load(folder, context_length=10)[0].context_length == 10
    for length in (0, -1, 65, 1.5):
        with pytest.raises(SettingError, match=r"context_length.*64"):
            load(folder, context_length=length)


def test_the_template_is_asked_for_or_stored_or_in_the_name(model, tmp_path):
    for name, stored, asked, expected in [
        ("OpenELM-270M-Instruct", None, None, "openelm-instruct"),
        ("OpenELM-270M", None, None, "plain"),
        ("OpenELM-270M", "openelm-instruct", None, "openelm-instruct"),
        ("OpenELM-270M-Instruct", "openelm-instruct", "plain", "plain"),
    ]:
        config = {} if stored is None else {"openelm_mlx": {"chat_template": stored}}
        folder = save_folder(tmp_path / name, model, "llama", config)
        assert load(folder, chat_template=asked)[1].chat_template == expected
        assert resolve_chat_template(json.loads((folder / "config.json").read_text()), asked, str(folder)).reason
    with pytest.raises(SettingError, match="openelm-instruct"):
        load(folder, chat_template="chatml")


def test_only_one_layout_of_a_repository_is_chosen():
    """gpt-oss repositories hold three copies of their weights; older ones hold pickles beside the safetensors."""
    names = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
        "LICENSE", "USAGE_POLICY", "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "original/model.safetensors", "original/config.json", "metal/model.bin",
        "pytorch_model.bin", "modeling_openelm.py", ".gitattributes",
    ]  # fmt: skip
    chosen = choose_model_files([RepoFile(name, 1) for name in names])
    assert set(chosen) == set(names) - {
        "original/model.safetensors", "original/config.json", "metal/model.bin", "pytorch_model.bin", "modeling_openelm.py",
        ".gitattributes",
    }  # fmt: skip


def test_a_repository_with_only_corenet_s_checkpoint():
    assert "checkpoint.pt" in choose_model_files([RepoFile("checkpoint.pt", 1), RepoFile("config.yaml", 1)])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("source", ["demo-gpt-oss", "openelm"])
def test_quantizing_while_reading_equals_converting_first(source, bits, model, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_UNPACKED_BYTES", 0)
    path = save_folder(tmp_path / "m", model, "llama") if source == "openelm" else source
    om.convert(path, tmp_path / "converted", quantize=bits, dtype="bfloat16")
    converted, _ = load(tmp_path / "converted", dtype="float32")
    at_once, _ = load(path, dense_bits=bits, dtype="bfloat16")
    theirs, ours = dict(tree_flatten(converted.parameters())), dict(tree_flatten(at_once.parameters()))
    assert ours.keys() == theirs.keys()
    packed = [name for name in ours if name.endswith(".weight") and ours[name].dtype == mx.uint32]
    assert len(packed) >= 2 * len(at_once.layers)
    for name in packed:
        assert mx.array_equal(ours[name], theirs[name]), name


def test_quantizing_while_reading_keeps_what_is_packed_and_the_routers(monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_UNPACKED_BYTES", 0)
    plain, dense = (dict(tree_flatten(load("demo-gpt-oss", dense_bits=bits)[0].parameters())) for bits in (None, 8))
    for name in (name for name in plain if ".experts." in name or ".router." in name):
        assert mx.array_equal(plain[name], dense[name]), name
    assert dense["lm_head.weight"].dtype == mx.uint32
    # What is packed in the package already stays as it is.
    before, after = (dict(tree_flatten(load("demo-openelm", dense_bits=bits)[0].parameters())) for bits in (None, 4))
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_a_small_packed_openelm_is_unpacked_on_the_cpu_backend(monkeypatch):
    unpacked, _ = load("demo-openelm")
    parameters = dict(tree_flatten(unpacked.parameters()))
    assert {array.dtype for array in parameters.values()} == {mx.float32}
    assert unpacked.plan.weights_bytes == sum(array.nbytes for array in parameters.values())
    tokens = mx.array([[1, 5, 7, 300]])
    ours = unpacked(tokens)
    for options in (
        {"dense_bits": 8},
        {"dtype": "bfloat16"},
        {},
    ):  # asked for, of another type, or too large: as stored
        if not options:
            monkeypatch.setattr(placement, "LARGEST_UNPACKED_BYTES", 0)
        packed, _ = load("demo-openelm", **options)
        stored = dict(tree_flatten(packed.parameters()))
        assert stored["transformer.layers.0.ffn.proj_1.weight"].dtype == mx.uint32, options
        assert packed.plan.weights_bytes == sum(array.nbytes for array in stored.values())
        if "dtype" not in options:
            assert mx.abs(packed(tokens) - ours).max().item() < 1e-4


def test_matrices_lie_by_columns_on_the_cpu_backend(monkeypatch):
    ours = load_fixture(FIXTURES / "gpt_oss_tiny")
    monkeypatch.setattr(placement, "runs_on_cpu", lambda: False)
    usual = load_fixture(FIXTURES / "gpt_oss_tiny")
    for name, array in tree_flatten(usual.parameters()):
        same = dict(tree_flatten(ours.parameters()))[name]
        assert mx.array_equal(same, array), name
        if name.endswith(("qkv_proj.weight", "lm_head.weight")):
            strides = [np.array(each, copy=False).strides for each in (array, same)]
            assert strides == [(4 * array.shape[1], 4), (4, 4 * array.shape[0])], name


def test_quantizing_while_reading_takes_bits_that_exist(model, tmp_path):
    for bits in (0, 7, "8", True, 16):
        with pytest.raises(SettingError, match="8, 6, 5, 4"):
            load(save_folder(tmp_path / f"m{bits}", model), dense_bits=bits)


def test_large_gpt_oss_keeps_16_bits_on_the_cpu_and_small_or_dense_packed_ones_do_not(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    experts = ["model.layers.0.mlp.experts.down_proj"]
    spec = SPECS["270M"]
    assert default_dtype(spec, mx.bfloat16, experts, 3_600_000_000) == mx.bfloat16
    assert default_dtype(spec, mx.bfloat16, experts, 10_000_000) == mx.float32
    assert default_dtype(spec, mx.bfloat16, [*experts, "lm_head"], 3_600_000_000) == mx.float32


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_not_the_current_folder(empty, monkeypatch):
    monkeypatch.chdir(FIXTURES / "openelm_tiny")
    for what in (om.load, om.plan):
        with pytest.raises(CheckpointError, match="give a folder, a file, or a Hugging Face repository"):
            what(empty)


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a named pipe: give a folder, a weight file, or a repository"):
        load(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a device"):
        load("/dev/zero")


def test_wide_groups_are_two_of_half_the_width_in_float32_on_cuda(monkeypatch):
    """MLX's kernel there asks for more memory than a multiprocessor gives, and the driver refuses it."""
    monkeypatch.setattr(placement, "runs_on_cpu", lambda: False)
    usual = load("demo-openelm", dtype="float32")[0]
    monkeypatch.setattr(weights, "backend_name", lambda: "cuda")
    split = load("demo-openelm", dtype="float32")[0]
    widths = [module.group_size for _, module in split.named_modules() if "scales" in module]
    assert widths
    assert set(widths) == {64}
    a, b = (each.layers[0].attn.qkv_proj for each in (usual, split))
    wanted = mx.dequantize(a.weight, a.scales, a.biases, group_size=128, bits=8)
    assert bool((mx.dequantize(b.weight, b.scales, b.biases, group_size=64, bits=8) == wanted).all())
    tokens = mx.array([[1, 5, 9, 40]])
    assert float(mx.abs(split(tokens) - usual(tokens)).max()) < 1e-3
    assert {m.group_size for _, m in load("demo-openelm", dtype="bfloat16")[0].named_modules() if "scales" in m} == {
        128
    }
