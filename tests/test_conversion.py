"""Converted = original; every recipe loads here and in mlx-lm; interrupted = uninterrupted; and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hub_server
import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, config_of, max_difference, oracle, random_model, save_folder

import openelm_mlx as om
from openelm_mlx import hub as hub_module
from openelm_mlx.bench.random_checkpoint import write_random_checkpoint
from openelm_mlx.checkpoint import writer as writer_module
from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.quantize import RECIPES, Quantization, parse_recipe, quantization_of
from openelm_mlx.checkpoint.reader import TensorEntry, open_checkpoint, read_config
from openelm_mlx.checkpoint.released import released_openelm_config
from openelm_mlx.conversion import convert, plan_conversion, planned_weight
from openelm_mlx.conversion import verify as verify_module
from openelm_mlx.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    HubError,
    SettingError,
    TokenizerError,
    UserError,
)
from openelm_mlx.specs import openelm_config, spec_from_config

hub = hub_server.hub

TINY, UNTIED, LORA = FIXTURES / "openelm_tiny", FIXTURES / "openelm_untied", FIXTURES / "openelm_lora"
LLAMA = FIXTURES / "tokenizers" / "llama"
ORIGINALS = {
    "tiny": TINY, "tiny, CoreNet": TINY / "corenet", "untied": UNTIED, "untied, CoreNet": UNTIED / "corenet",
    "lora": LORA / "lora", "dora": LORA / "dora",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_cached_tokenizers(monkeypatch):
    """The machine's own Hugging Face cache must not decide a test."""
    monkeypatch.setattr(hub_module, "cached_file", lambda *_: None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A small float32 model with a tokenizer, in Apple's layout."""
    return save_folder(tmp_path_factory.mktemp("source") / "OpenELM-small-Instruct", random_model(), "llama")


def message_of(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arrays_of(folder: Path) -> dict[str, mx.array]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def logits_of(folder: Path, tokens: mx.array) -> np.ndarray:
    model, _ = om.load(folder, dtype="float32")
    return np.array(model(tokens))


def mlx_lm_logits(folder: Path, tokens: mx.array) -> np.ndarray:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(tokens))


def copy_with(folder: Path, target: Path, **changes) -> Path:
    """A checkpoint like `folder` with some tensors replaced: name with _ for . -> function of the array."""
    target.mkdir()
    arrays = arrays_of(folder)
    for name, change in changes.items():
        stored = next(each for each in arrays if each.replace(".", "_") == name)
        arrays[stored] = change(arrays[stored])
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


# --- converted = original


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_float32_gives_the_originals_logits_here_and_in_mlx_lm(tmp_path, name):
    source = ORIGINALS[name]
    facts = oracle(source if (source / "oracle.npz").exists() else source.parent)
    report = convert(source, tmp_path / "out")
    assert report.dtype == "float32"
    vocab_size = read_config(tmp_path / "out")["vocab_size"]
    expected, tokens = facts["logits_fp32"][..., :vocab_size], mx.array(facts["tokens"])
    ours, theirs = logits_of(tmp_path / "out", tokens), mlx_lm_logits(tmp_path / "out", tokens)
    assert ours.shape == theirs.shape == expected.shape
    assert max_difference(mx.array(ours), expected) < 5e-5
    assert max_difference(mx.array(theirs), expected) < 5e-5


@pytest.mark.parametrize("folder", [TINY, UNTIED], ids=["tiny", "untied"])
def test_corenet_and_hugging_face_become_the_same_bytes(tmp_path, folder):
    """CoreNet's rows of padding go; what is left is bit for bit what Apple published."""
    convert(folder, tmp_path / "hf")
    convert(folder / "corenet", tmp_path / "corenet")
    assert files_of(tmp_path / "hf")["model.safetensors"] == files_of(tmp_path / "corenet")["model.safetensors"]
    assert config_of(tmp_path / "corenet")["vocab_size"] == 300
    source = arrays_of(folder)
    for name, array in arrays_of(tmp_path / "corenet").items():
        assert mx.array_equal(array, source[name]), name


def test_converting_twice_is_converting_once(tmp_path):
    convert(TINY / "corenet", tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    assert files_of(tmp_path / "once")["model.safetensors"] == files_of(tmp_path / "twice")["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", mx.bfloat16])
def test_casts_are_mlxs_own(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(planned_weight, "SLICE_ELEMENTS", 1000)  # many slices even of a small weight
    report = convert(TINY, tmp_path / "out", dtype=dtype)
    target = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    for name, array in arrays_of(tmp_path / "out").items():
        assert mx.array_equal(array, arrays_of(TINY)[name].astype(target)), name
    assert report.nbytes == sum(array.nbytes for array in arrays_of(tmp_path / "out").values())
    assert config_of(tmp_path / "out")["torch_dtype"] == report.dtype == str(target).removeprefix("mlx.core.")


def test_stored_types_stay_each_its_own(tmp_path):
    norm = {"transformer_norm_weight": lambda a: a.astype(mx.float16)}
    convert(copy_with(TINY, tmp_path / "source", **norm), tmp_path / "out")
    types = {name: array.dtype for name, array in arrays_of(tmp_path / "out").items()}
    assert types.pop("transformer.norm.weight") == mx.float16
    assert set(types.values()) == {mx.float32}


# --- quantized


@pytest.mark.slow(first=1)
@pytest.mark.parametrize(
    ("recipe", "group_size"), [(r, None) for r in RECIPES] + [("4", 32), ("3", 128), ("mixed", 32)]
)
def test_every_recipe_loads_here_and_in_mlx_lm_with_equal_logits(
    tmp_path, monkeypatch, model_folder, recipe, group_size
):
    monkeypatch.setattr(planned_weight, "SLICE_ELEMENTS", 1000)
    if group_size == 128:  # no column of the small model is that long
        wide = {
            "num_transformer_layers": 3,
            "model_dim": 128,
            "head_dim": 32,
            "vocab_size": 600,
            "max_context_length": 64,
        }
        model_folder = write_random_checkpoint(tmp_path / "wide", {"model_name": "OpenELM-wide", **wide})
    report = convert(model_folder, tmp_path / "out", recipe, group_size=group_size)
    tokens = mx.array([[1, 5, 599, 42, 7, 300]])
    ours = logits_of(tmp_path / "out", tokens)
    np.testing.assert_allclose(ours, mlx_lm_logits(tmp_path / "out", tokens), atol=5e-5 * np.abs(ours).max())
    assert report.dtype == "float16"
    assert report.nbytes < report.source_nbytes / 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_in_slices_is_packed_whole(tmp_path, monkeypatch, model_folder, recipe):
    monkeypatch.setattr(planned_weight, "SLICE_ELEMENTS", 1000)
    convert(model_folder, tmp_path / "out", recipe, dtype="bfloat16")
    written = arrays_of(tmp_path / "out")
    spec = spec_from_config(config_of(model_folder))
    for name, array in arrays_of(model_folder).items():
        packing = quantization_of(parse_recipe(recipe), spec, name, array.shape)
        expected = {"weight": array.astype(mx.bfloat16)}
        if packing is not None:
            expected = packing.quantize(expected["weight"])
        for part, value in expected.items():
            assert mx.array_equal(written.pop(name.removesuffix("weight") + part), value), name
    assert not written


def test_the_mixed_recipe_in_the_config_is_what_was_packed(tmp_path, model_folder):
    convert(model_folder, tmp_path / "out", "mixed")
    config = config_of(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    packed = understand(checkpoint, config, spec_from_config(config)).quantized
    assert packed["transformer.token_embeddings"].bits == packed["transformer.layers.0.ffn.proj_1"].bits == 8
    assert packed["transformer.layers.1.ffn.proj_1"].bits == 4
    assert config["quantization"] == config["quantization_config"]


def test_weights_whose_columns_are_no_whole_groups_stay(tmp_path):
    convert(TINY, tmp_path / "out", 4, group_size=64)
    arrays = arrays_of(tmp_path / "out")
    assert arrays["transformer.layers.0.attn.out_proj.weight"].dtype == mx.float16  # 32 columns
    assert arrays["transformer.layers.0.attn.qkv_proj.weight"].dtype == mx.uint32
    tokens = mx.array(oracle(TINY)["tokens"])
    np.testing.assert_allclose(logits_of(tmp_path / "out", tokens), mlx_lm_logits(tmp_path / "out", tokens), atol=2e-4)
    with pytest.raises(ConversionError, match="whole groups of 128"):
        convert(LORA, tmp_path / "none", 4, group_size=128)


def packed_source(folder: Path, prefix: str) -> Path:
    """openelm_tiny in 8 bits as mlx-lm (prefix "transformer.") or Apple's converter (none, embedding plain) has it."""
    folder.mkdir()
    config, arrays = config_of(TINY), {}
    if not prefix:
        config = json.loads((TINY / "corenet/corenet.json").read_text()) | {"vocab_size": 300}
    for name, array in arrays_of(TINY).items():
        stored = prefix + name.removeprefix("transformer.")
        plain = not Quantization(8, 32).fits(array.shape) or (not prefix and "embed" in name)
        parts = {"weight": array} if plain else Quantization(8, 32).quantize(array)
        arrays |= {stored.replace("weight", part): value for part, value in parts.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 8}}))
    return folder


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["mlx-lm", "apple-mlx"])
def test_a_quantized_source_stays_packed_or_is_unpacked(tmp_path, prefix):
    source = packed_source(tmp_path / "source", prefix)
    tokens = mx.array(oracle(TINY)["tokens"])
    expected = logits_of(source, tokens)
    kept = convert(source, tmp_path / "kept", verify=True)
    assert kept.verification.kl_divergence == 0.0
    assert {t.name: t.dtype for t in kept.tensors}["transformer.layers.0.ffn.proj_1.weight"] == "U32"
    assert np.array_equal(logits_of(tmp_path / "kept", tokens), expected)
    np.testing.assert_allclose(mlx_lm_logits(tmp_path / "kept", tokens), expected, atol=5e-5)
    plain = convert(source, tmp_path / "plain", dtype="float32", verify=True)
    assert plain.quantization is None
    assert "quantization" not in config_of(tmp_path / "plain")
    np.testing.assert_allclose(logits_of(tmp_path / "plain", tokens), expected, atol=5e-5)
    with pytest.raises(ConversionError) as error:
        convert(source, tmp_path / "again", 4)
    assert "quantized already (8 bits)" in message_of(error)


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("layout", ["", "original"])
@pytest.mark.parametrize("options", [{}, {"quantize": 8, "group_size": 32}, {"dtype": "float32"}], ids=str)
def test_the_experts_of_gpt_oss_pass_through_byte_for_byte(tmp_path, layout, options):
    source = FIXTURES / "gpt_oss_tiny" / layout
    report = convert(source, tmp_path / "out", verify=True, **options)
    before, after = arrays_of(FIXTURES / "gpt_oss_tiny"), arrays_of(tmp_path / "out")
    for i in range(4):
        for matrix in ("gate_up_proj", "down_proj"):
            ours = after[f"model.layers.{i}.mlp.experts.{matrix}.weight"]
            theirs = before[f"model.layers.{i}.mlp.experts.{matrix}_blocks"]
            assert bytes(ours) == bytes(theirs)
    tokens = mx.array(oracle(FIXTURES / "gpt_oss_tiny")["tokens"])
    difference = max_difference(
        mx.array(logits_of(tmp_path / "out", tokens)), oracle(FIXTURES / "gpt_oss_tiny")["logits_fp32"]
    )
    if "quantize" in options:
        assert 0 < report.verification.kl_divergence < 0.05
    else:
        assert report.verification.kl_divergence == 0.0
        assert difference < 1e-4
    assert report.chat_template is None


# --- plans of the released sizes, from headers alone


class Headers:
    """A checkpoint of a released size that has no tensors, only their descriptions."""

    files = (Path("model.safetensors"),)

    def __init__(self, config: dict, dtype: str) -> None:
        size = {"F32": 4, "F16": 2}[dtype]
        self.entries = {
            name: TensorEntry(name, dtype, shape, self.files[0], 0, size * int(np.prod(shape)))
            for name, shape in spec_from_config(config).parameter_shapes().items()
        }


def plan_of(size: str, stored: str = "F32", **options):
    config = released_openelm_config(size)
    return plan_conversion(understand(Headers(config, stored), config, spec_from_config(config)), config, **options)


@pytest.mark.parametrize(("size", "nbytes"), [("270M", 543_054_336), ("1.1B", 2_159_782_912), ("3B", 6_073_294_848)])
def test_bytes_in_16_bits(size, nbytes):
    assert plan_of(size, dtype="bfloat16").nbytes == nbytes


@pytest.mark.parametrize(("size", "gigabytes"), [("270M", 0.15), ("450M", 0.26), ("1.1B", 0.61), ("3B", 1.71)])
def test_bytes_in_4_bits(size, gigabytes):
    assert plan_of(size, quantize=4).nbytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_3b_is_never_float16():
    for options in ({}, {"quantize": 4}, {"dtype": "bfloat16"}):
        for stored in ("F32", "F16"):
            assert plan_of("3B", stored, **options).dtype == "bfloat16"
    with pytest.raises(ConversionError) as error:
        plan_of("3B", dtype="float16")
    assert "bfloat16" in message_of(error)
    assert plan_of("3B", dtype="float32").dtype == "float32"
    assert plan_of("1.1B").dtype == "float32"
    assert plan_of("1.1B", quantize=4).dtype == "float16"


def test_files_of_5_gb_by_default():
    plan = plan_of("3B")
    assert [file.name for file in plan.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert all(file.nbytes < 5_001_000_000 for file in plan.files)


# --- what the dry run says


@pytest.mark.parametrize("name", ["tiny, CoreNet", "dora"])
@pytest.mark.parametrize("recipe", [None, 4])
def test_a_dry_run_says_what_a_conversion_writes(tmp_path, name, recipe):
    group_size = None if recipe is None else 32
    planned = convert(ORIGINALS[name], tmp_path / "out", recipe, group_size=group_size, dry_run=True)
    assert planned.destination is None
    assert list(tmp_path.iterdir()) == []
    written = convert(ORIGINALS[name], tmp_path / "out", recipe, group_size=group_size)
    assert written.tensors == planned.tensors
    entries = open_checkpoint(tmp_path / "out").entries
    said = {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in planned.tensors}
    assert said == {e.name: (e.dtype, e.shape, e.nbytes) for e in entries.values()}
    sources = open_checkpoint(ORIGINALS[name]).entries
    for tensor in planned.tensors:
        assert all(source in sources for source in tensor.sources)
        assert (tensor.source_shape, tensor.source_dtype) == (sources[tensor.sources[0]].shape, "F32")
    assert {source for tensor in planned.tensors for source in tensor.sources} == set(sources)
    assert planned.nbytes == sum(entry.nbytes for entry in entries.values())
    assert planned.source_nbytes == sum(entry.nbytes for entry in sources.values())


def test_a_dry_run_needs_no_destination():
    assert convert(TINY, None, dry_run=True).tensors


# --- the files beside the weights


def test_the_config_keeps_the_sources_fields_and_says_what_is_new(tmp_path):
    convert(TINY, tmp_path / "out", dtype="bfloat16")
    before, after = config_of(TINY), config_of(tmp_path / "out")
    assert "auto_map" in before
    assert after["openelm_mlx"] == {"chat_template": "plain", "source": "openelm_tiny", "version": om.__version__}
    changed = {"auto_map", "torch_dtype", "openelm_mlx"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: v for k, v in after.items() if k not in changed}


def test_a_config_of_pairs_is_written_out_for_mlx_lm(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").symlink_to(TINY / "model.safetensors")
    config = {k: v for k, v in config_of(TINY).items() if k not in ("num_query_heads", "num_kv_heads")}
    (source / "config.json").write_text(json.dumps(config | {"ffn_multipliers": [0.5, 4.0]}))
    convert(source, tmp_path / "out")
    tokens = mx.array(oracle(TINY)["tokens"])
    assert max_difference(mx.array(mlx_lm_logits(tmp_path / "out", tokens)), oracle(TINY)["logits_fp32"]) < 5e-5


@pytest.mark.parametrize(("asked", "stored"), [(None, "openelm-instruct"), ("plain", "plain")])
def test_the_chat_template_is_stored(tmp_path, model_folder, asked, stored):
    report = convert(model_folder, tmp_path / "base", chat_template=asked)
    assert report.chat_template == config_of(tmp_path / "base")["openelm_mlx"]["chat_template"] == stored
    assert om.load(tmp_path / "base")[1].chat_template == stored
    with pytest.raises(SettingError):
        convert(model_folder, tmp_path / "out", chat_template="chatml")


def test_the_tokenizer_is_stored_and_mlx_lm_reads_it_the_same_way(tmp_path, model_folder):
    import mlx_lm

    report = convert(model_folder, tmp_path / "out")
    assert report.tokenizer == ("tokenizer.model", "tokenizer_config.json")
    ours = om.load(tmp_path / "out")[1]
    _, theirs = mlx_lm.load(str(tmp_path / "out"))
    assert ours.encode_prompt("The river was wide.")[1:] == theirs.encode(
        "The river was wide.", add_special_tokens=False
    )
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["add_bos_token"]


@pytest.mark.parametrize("kind", ["llama", "llama_json"])
def test_a_bare_vocabulary_gets_the_file_that_mlx_lm_needs(tmp_path, kind):
    import mlx_lm

    source = save_folder(tmp_path / "source", random_model())
    bare = tmp_path / "bare"
    bare.mkdir()
    name = "tokenizer.model" if kind == "llama" else "tokenizer.json"
    (bare / name).write_bytes((FIXTURES / "tokenizers" / kind / name).read_bytes())
    report = convert(source, tmp_path / "out", tokenizer=bare)
    assert report.tokenizer == (name,)
    _, theirs = mlx_lm.load(str(tmp_path / "out"))
    assert theirs.encode("The river.") == om.load(tmp_path / "out")[1].encode_prompt("The river.")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(TokenizerError):
        convert(TINY, tmp_path / "out", tokenizer=LLAMA)  # 600 tokens, and the model has 300
    assert list(tmp_path.iterdir()) == []


def test_licence_and_safety_notice_come_along(tmp_path, model_folder):
    source = save_folder(tmp_path / "OpenELM-x", random_model())
    card = "---\nlicense: other\nlicense_name: apple\ntags: [a]\n---\n# Card\n\n## Bias, Risks, and Limitations\n\nBeware.\n"
    for name, text in {
        "LICENSE": "terms",
        "NOTICE.txt": "who",
        "ACKNOWLEDGEMENTS": "thanks",
        "README.md": card,
    }.items():
        (source / name).write_text(text)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "modeling_openelm.py").write_text("1 / 0")
    convert(source, tmp_path / "out", 4)
    files = files_of(tmp_path / "out")
    assert (files["LICENSE"], files["NOTICE.txt"], files["ACKNOWLEDGEMENTS"]) == (b"terms", b"who", b"thanks")
    assert files["generation_config.json"] == b'{"eos_token_id": 2}'
    assert "modeling_openelm.py" not in files
    text = files["README.md"].decode()
    assert text.startswith("---\nlicense: other\nlicense_name: apple\n")
    assert "library_name: mlx" in text
    assert "## Bias, Risks, and Limitations\n\nBeware." in text
    assert "[LICENSE](LICENSE)" in text
    assert "4 bits" in text
    convert(model_folder, tmp_path / "bare")
    bare = (tmp_path / "bare/README.md").read_text()
    assert "## Licence" in bare
    assert "without safety guarantees" in bare


def test_apples_sizes_without_a_licence_file_point_to_apples():
    from openelm_mlx.conversion.card import CardFacts, model_card

    facts = CardFacts("OpenELM-3B", "3B", None, None, "p", ["cast"], "None.", [], is_released_openelm=True)
    assert "https://huggingface.co/apple/OpenELM" in model_card(None, facts)
    assert "ask its publisher" in model_card(None, replace(facts, is_released_openelm=False))


def test_a_card_with_broken_fields_loses_nothing():
    from openelm_mlx.conversion.card import CardFacts, model_card

    facts = CardFacts("x", "x", None, None, "p", ["cast"], "None.", [], is_released_openelm=False)
    broken = "---\nlicense: [apple\n---\ntext"
    assert broken in model_card(broken, facts)


# --- bad input: one sentence, nothing half-written


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(tmp_path, value):
    def poison(array):
        array[3, 5] = value
        return array

    source = copy_with(TINY, tmp_path / "source", transformer_layers_2_ffn_proj_1_weight=poison)
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": 4}):
        with pytest.raises(CheckpointError) as error:
            convert(source, tmp_path / "out", **options)
        assert "transformer.layers.2.ffn.proj_1.weight" in message_of(error)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_numbers_too_large_for_float16(tmp_path):
    source = copy_with(TINY, tmp_path / "source", transformer_norm_weight=lambda a: a * 1e6)
    with pytest.raises(ConversionError) as error:
        convert(source, tmp_path / "out", dtype="float16")
    assert "transformer.norm.weight" in message_of(error)
    assert "bfloat16" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantize": "7"}, SettingError),
        ({"quantize": 4, "group_size": 48}, SettingError),
        ({"group_size": 64}, SettingError),
        ({"dtype": "int8"}, SettingError),
        ({"private": True}, SettingError),
        ({"upload": "no name"}, HubError),
        ({"tokenizer": "nowhere"}, TokenizerError),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path, options, error):
    with pytest.raises(error) as caught:
        convert(TINY, tmp_path / "out", **options)
    message_of(caught)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be(tmp_path):
    for source in (tmp_path / "nowhere", LLAMA, "no/such/thing"):
        with pytest.raises(UserError):
            convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_ends_too_early(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((TINY / "config.json").read_bytes())
    (source / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_destination_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis").write_text("mine")
    for destination in (tmp_path / "out", tmp_path / "out/thesis", ""):
        with pytest.raises((DestinationError, SettingError)):
            convert(TINY, destination)
    assert files_of(tmp_path / "out") == {"thesis": b"mine"}


def test_folders_that_should_hold_the_destination_are_not_made(tmp_path, monkeypatch):
    with pytest.raises(DestinationError, match=r"there is no folder \S+typo/deep to hold it; make it first"):
        convert(TINY, tmp_path / "typo/deep/out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    convert(TINY, "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_destination_is_checked_before_the_source_is_looked_for():
    with pytest.raises(DestinationError):
        convert("somebody/a-model-that-would-be-downloaded", FIXTURES)


# --- interrupted, killed, taken up again


class Interrupted:
    """Progress that presses Ctrl-C after so many reports of the stage."""

    def __init__(self, count: int, stage: str = "convert") -> None:
        self.count, self.stage = count, stage

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.count -= stage == self.stage
        if not self.count:
            self.count = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 2, 20, 45])
@pytest.mark.parametrize("max_file_bytes", [10**9, "20kB"])
def test_interrupted_and_taken_up_is_uninterrupted(tmp_path, count, max_file_bytes):
    options = {"quantize": "mixed", "group_size": 32, "max_file_bytes": max_file_bytes}
    convert(TINY / "corenet", tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        convert(TINY / "corenet", tmp_path / "out", progress=Interrupted(count), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    report = convert(TINY / "corenet", tmp_path / "out", **options)
    assert report.num_resumed == count - 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_while_it_is_verified(tmp_path):
    convert(TINY, tmp_path / "whole", 4, group_size=32)
    with pytest.raises(KeyboardInterrupt):
        convert(TINY, tmp_path / "out", 4, group_size=32, verify=True, progress=Interrupted(2, "verify"))
    assert not (tmp_path / "out").exists()
    report = convert(TINY, tmp_path / "out", 4, group_size=32, verify=True)
    assert report.num_resumed == len(report.tensors)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["source", "options", "in place"])
def test_what_was_interrupted_with_other_input_is_not_taken_up(tmp_path, change):
    source = copy_with(TINY, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=Interrupted(10))
    if change == "source":
        os.utime(source / "model.safetensors", (1, 1))
    if change == "in place":  # as many bytes, and the time of modification set back
        change_in_place(source / "model.safetensors")
    report = convert(source, tmp_path / "out", dtype="bfloat16" if change == "options" else None)
    assert report.num_resumed == 0
    assert om.load(tmp_path / "out")
    if change == "in place":
        convert(source, tmp_path / "whole")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def change_in_place(file: Path) -> None:
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-2000, os.SEEK_END)
        stream.write(bytes(2000))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_source_that_changes_while_it_is_converted(tmp_path):
    source = copy_with(TINY, tmp_path / "source")
    changed = []

    def change(*_: object) -> None:
        if not changed:
            changed.append(change_in_place(source / "model.safetensors"))

    with pytest.raises(ConversionError, match="changed while"):
        convert(source, tmp_path / "out", progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


KILLED = """
import os, signal, sys
from openelm_mlx import hub
from openelm_mlx.checkpoint import writer
from openelm_mlx.conversion import convert

hub.cached_file = lambda *_: None
append, left = writer._append, int(sys.argv[3])

def killing_append(stream, data):
    global left
    left -= 1
    if left == 0:
        append(stream, bytes(data)[: len(data) // 2])
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(stream, data)

writer._append = killing_append
convert(sys.argv[1], sys.argv[2], 4, group_size=32, max_file_bytes="40kB")
"""


@pytest.mark.slow
def test_killed_at_any_point_leaves_nothing_that_loads(tmp_path, monkeypatch):
    from mlx_lm.utils import load_model

    options = {"quantize": 4, "group_size": 32, "max_file_bytes": "40kB"}
    count, append = 0, writer_module._append

    def counting_append(stream, data):
        nonlocal count
        count += 1
        append(stream, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_append", counting_append)
        convert(TINY / "corenet", tmp_path / "whole", **options)
    numbers = np.random.default_rng(0)
    # The first write, three in the middle, and the last one: half of config.json, with all weights at their places.
    for number in (1, *numbers.integers(2, count - 1, 3), count):
        out = tmp_path / f"out{number}"
        command = [sys.executable, "-c", KILLED, str(TINY / "corenet"), str(out), str(number)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FIXTURES.parent.parent)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        for folder in (Path(f"{out}.partial"), Path(f"{out}.partial/output")):
            with pytest.raises(UserError):
                om.load(folder)
            with pytest.raises((FileNotFoundError, ValueError)):
                load_model(folder)
        convert(TINY / "corenet", out, **options)
        assert files_of(out) == files_of(tmp_path / "whole")
        assert not Path(f"{out}.partial").exists()


def test_progress_goes_up_to_the_total(tmp_path, model_folder):
    reports: dict[str, list[tuple[int, int]]] = {}
    report = convert(
        model_folder,
        tmp_path / "out",
        4,
        verify=True,
        progress=lambda s, d, t: reports.setdefault(s, []).append((d, t)),
    )
    assert set(reports) == {"convert", "verify"}
    assert reports["convert"][-1] == (report.nbytes, report.nbytes)
    for entries in reports.values():
        assert entries == sorted(entries)
        assert entries[-1][0] == entries[-1][1]


# --- verification


def naive_divergence(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (logits.astype(np.float64), other.astype(np.float64)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("name", [*ORIGINALS, "with tokenizer"])
def test_verification_by_blocks_is_the_comparison_of_two_whole_models(tmp_path, model_folder, name):
    source = ORIGINALS.get(name, model_folder)
    report = convert(source, tmp_path / "out", 4, group_size=32, verify=True)
    found = report.verification
    config = read_config(source)
    before, tokenizer = om.load(source, dtype="float32")
    after, _ = om.load(tmp_path / "out", dtype="float32")
    tokens, sample = verify_module.sample_tokens(after.spec, tokenizer)
    assert sample == found.sample
    assert ("Alice" in sample) == (tokenizer is not None)
    assert (
        found.num_tokens
        == len(tokens)
        == config.get("max_context_length", config.get("base", {}).get("max_context_length"))
    )
    batch, vocab_size = mx.array([tokens]), after.spec.vocab_size
    logits, other = np.array(before(batch))[0, :, :vocab_size], np.array(after(batch))[0]
    divergence = naive_divergence(logits, other)
    assert found.kl_divergence == pytest.approx(divergence.mean(), rel=1e-3)
    assert found.max_kl_divergence == pytest.approx(divergence.max(), rel=1e-3)
    assert found.same_top_token == pytest.approx((logits.argmax(-1) == other.argmax(-1)).mean())
    h, h2 = before.embed(batch), after.embed(batch)
    for number, error in enumerate(found.layers[1:-1]):
        assert error.name == f"layer {number}"
        h, h2 = (m.run_layers(x, start=number, stop=number + 1) for m, x in ((before, h), (after, h2)))
        relative = mx.linalg.norm(h - h2) / mx.linalg.norm(h)
        assert error.stream == pytest.approx(relative.item(), rel=1e-3)
    assert found.layers[-1].stream == pytest.approx(np.linalg.norm(logits - other) / np.linalg.norm(logits), rel=1e-3)


def test_errors_of_the_weights_are_those_of_the_unpacked_ones(tmp_path):
    found = convert(TINY, tmp_path / "packed", 4, group_size=32, verify=True).verification
    convert(tmp_path / "packed", tmp_path / "plain", dtype="float32")
    before, after = arrays_of(TINY), arrays_of(tmp_path / "plain")
    for number, error in enumerate(found.layers[1:-1]):
        names = [name for name in before if f".layers.{number}." in name]
        difference = sum(mx.sum(mx.square(before[name] - after[name])).item() for name in names)
        whole = sum(mx.sum(mx.square(before[name])).item() for name in names)
        assert error.weights == pytest.approx((difference / whole) ** 0.5, rel=1e-3)


def test_a_copy_is_verified_as_exact(tmp_path):
    found = convert(TINY / "corenet", tmp_path / "out", verify=True).verification
    assert (found.kl_divergence, found.same_top_token) == (0.0, 1.0)
    assert all(error.weights == error.stream == 0.0 for error in found.layers)
    assert [error.name for error in found.layers] == ["embedding", *(f"layer {i}" for i in range(4)), "head"]


def test_fewer_bits_are_farther_away(tmp_path, model_folder):
    divergences = [
        convert(model_folder, tmp_path / str(bits), bits, verify=True).verification.kl_divergence for bits in (8, 4, 2)
    ]
    assert 0 < divergences[0] < divergences[1] < divergences[2]


def test_a_byte_that_changed_after_it_was_written_is_found(tmp_path, monkeypatch):
    assemble = writer_module.CheckpointWriter.assemble

    def corrupting_assemble(writer, others):
        folder = assemble(writer, others)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return folder

    monkeypatch.setattr(writer_module.CheckpointWriter, "assemble", corrupting_assemble)
    with pytest.raises(ConversionError) as error:
        convert(TINY, tmp_path / "out", verify=True)
    assert "model.safetensors" in message_of(error)
    assert list(tmp_path.iterdir()) == []


def test_activations_beyond_float16_are_found(tmp_path):
    """The weights fit, the residual stream does not: what happens to OpenELM-3B."""
    source = copy_with(TINY, tmp_path / "source", transformer_layers_1_ffn_proj_2_weight=lambda a: a * 1e5)
    assert mx.max(mx.abs(arrays_of(source)["transformer.layers.1.ffn.proj_2.weight"])).item() < 65504
    with pytest.raises(ConversionError) as error:
        convert(source, tmp_path / "out", dtype="float16", verify=True)
    assert "layer 1" in message_of(error)
    assert "bfloat16" in str(error.value)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", dtype="bfloat16", verify=True)


# --- repositories


def repository(folder: Path) -> dict[str, bytes | Path]:
    """As Apple's: weights, config, licence, card, code; and copies of the weights that nobody asked for."""
    files: dict[str, bytes | Path] = {
        path.name: path for path in folder.iterdir() if path.suffix != ".npz" and path.is_file()
    }
    return files | {
        "LICENSE": b"terms",
        "README.md": b"---\nlicense: apple-amlr\n---\n# OpenELM\n",
        "modeling_openelm.py": b"raise SystemExit",
        "pytorch_model.bin": b"a pickle",
        "original/model.safetensors": b"x" * 1000,
    }


def test_a_repository_only_what_is_needed_and_the_licence_along(tmp_path, hub):
    commit = hub.add_repo("apple/OpenELM-tiny", repository(TINY))
    planned = convert("apple/OpenELM-tiny", None, dry_run=True)
    size = (TINY / "model.safetensors").stat().st_size
    assert hub.sent("model.safetensors") < size / 2  # the header, and no tensor
    assert planned.tensors == convert(TINY, None, dry_run=True).tensors
    stages: dict[str, int] = {}
    report = convert(
        "apple/OpenELM-tiny", tmp_path / "out", verify=True, progress=lambda s, d, t: stages.update({s: d})
    )
    assert stages["download"] >= size
    for unneeded in ("pytorch_model.bin", "original/model.safetensors", "modeling_openelm.py"):
        assert hub.sent(unneeded) == 0
    assert report.verification.kl_divergence == 0.0
    assert files_of(tmp_path / "out")["LICENSE"] == b"terms"
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: apple/OpenELM-tiny" in card
    assert "license: apple-amlr" in card
    assert commit in card
    assert config_of(tmp_path / "out")["openelm_mlx"]["source"] == "apple/OpenELM-tiny"
    sent = hub.sent("model.safetensors")
    convert("apple/OpenELM-tiny", tmp_path / "again", dtype="bfloat16")
    assert hub.sent("model.safetensors") - sent < size / 2  # from the cache


def test_an_interrupted_download_goes_on(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("openelm_mlx.hub.requests._RETRY_SECONDS", ())
    hub.add_repo("apple/OpenELM-tiny", repository(TINY))
    hub.drop_after(300_000, times=None)
    with pytest.raises(HubError):
        convert("apple/OpenELM-tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    hub.drop_after(None)
    sent = hub.sent("model.safetensors")
    convert("apple/OpenELM-tiny", tmp_path / "out")
    header = 1 << 16
    assert hub.sent("model.safetensors") - sent <= (TINY / "model.safetensors").stat().st_size - 300_000 + header
    assert files_of(tmp_path / "out")["model.safetensors"]


def test_a_repository_in_shards(tmp_path, hub):
    convert(TINY, tmp_path / "shards", max_file_bytes="100kB")
    hub.add_repo(
        "apple/OpenELM-shards", repository(tmp_path / "shards") | {"stray.safetensors": b"not named by the index"}
    )
    planned = convert("apple/OpenELM-shards", None, dry_run=True)
    assert planned.tensors == convert(TINY, None, dry_run=True).tensors


def test_the_disk_is_checked_before_weights_travel(tmp_path, hub, monkeypatch):
    hub.add_repo("apple/OpenELM-tiny", repository(TINY))
    usage = type("usage", (), {"free": 200_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DestinationError) as error:
        convert("apple/OpenELM-tiny", tmp_path / "out")
    assert "200.0 kB are free" in message_of(error)
    # There is room for the download or for the result, and not for both on one disk.
    usage.free = 900_000
    with pytest.raises(DestinationError):
        convert("apple/OpenELM-tiny", tmp_path / "out")
    assert hub.sent("model.safetensors") < 200_000
    assert not (tmp_path / "out.partial").exists()


def test_upload_sends_everything(tmp_path, hub, monkeypatch, model_folder):
    hub_server.log_in(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    for path in model_folder.iterdir():
        (source / path.name).symlink_to(path)
    (source / "LICENSE").write_text("terms")
    report = convert(source, tmp_path / "out", 4, upload="me/OpenELM-4bit", private=True)
    assert hub.uploads["me/OpenELM-4bit"] == files_of(tmp_path / "out")
    assert {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.model"} <= set(
        files_of(tmp_path / "out")
    )
    assert report.upload_url == f"{hub.url}/me/OpenELM-4bit"


def test_a_refused_upload_keeps_what_was_converted(tmp_path, hub):
    with pytest.raises(HubError):
        convert(TINY, tmp_path / "out", upload="me/OpenELM-tiny")  # not logged in
    assert om.load(tmp_path / "out")


# --- memory

MEASURE = """
import pathlib, sys
import mlx.core as mx
from openelm_mlx import hub
from openelm_mlx.conversion import convert

def process_peak():
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)

hub.cached_file = lambda *_: None
mx.eval(mx.quantize(mx.zeros((64, 64), mx.bfloat16)), mx.zeros((64, 64)) @ mx.zeros((64, 64)))
limit = mx.set_cache_limit(12345678)
before = process_peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3] if sys.argv[3] != "none" else None, dtype="bfloat16", verify="verify" in sys.argv)
assert mx.set_cache_limit(0) == 12345678, "the cache limit was not restored"
print(mx.get_peak_memory(), process_peak() - before)
"""


@pytest.fixture(scope="module")
def large_source(tmp_path_factory) -> Path:
    """223 MB in float32, the largest tensor 41 MB, the largest layer 50 MB."""
    config = {
        "model_name": "OpenELM-x", "num_transformer_layers": 6, "model_dim": 1024, "head_dim": 64, "vocab_size": 10000,
        "max_context_length": 8, "ffn_multipliers": [0.5, 3.0],
    }  # fmt: skip
    return write_random_checkpoint(tmp_path_factory.mktemp("large") / "source", config)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "mode", "megabytes"), [("none", "", 80), ("4", "", 80), ("4", "verify", 130)])
def test_memory_is_that_of_a_tensor_not_of_the_model(large_source, tmp_path, recipe, mode, megabytes):
    """What MLX allocates at most; and the whole process's growth, where the system tells its peak (Linux)."""
    assert sum(entry.nbytes for entry in open_checkpoint(large_source).entries.values()) > 220e6
    command = [sys.executable, "-c", MEASURE, str(large_source), str(tmp_path / "out"), recipe, mode]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FIXTURES.parent.parent)
    arrays, process = (int(number) / 1e6 for number in measured.stdout.split())
    assert 41 < arrays < megabytes
    assert process < megabytes + 40


# --- random checkpoints


def test_random_checkpoints_are_the_same_for_a_seed_and_load(tmp_path, monkeypatch):
    config = openelm_config(random_model().spec)
    write_random_checkpoint(tmp_path / "a", config, seed=3)
    monkeypatch.setattr("openelm_mlx.bench.random_checkpoint.SLICE_ELEMENTS", 10**6)
    write_random_checkpoint(tmp_path / "b", config, seed=3)
    write_random_checkpoint(tmp_path / "c", config, "bfloat16", seed=4, max_file_bytes=50_000)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    for name in "ac":
        model, _ = om.load(tmp_path / name)
        logits = model(mx.array([[1, 2, 3]]))
        assert 0.1 < mx.std(logits.astype(mx.float32)).item() < 3
    assert not np.array_equal(logits_of(tmp_path / "a", mx.array([[1]])), logits_of(tmp_path / "c", mx.array([[1]])))
