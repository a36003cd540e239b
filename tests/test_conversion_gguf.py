"""GGUF out and in: the same numbers and the same tokens, resumed = uninterrupted, nothing half written, nothing overwritten."""

import errno
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import gguf
import hub_server
import jinja2
import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, config_of, random_model, save_folder
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx import hub as hub_module
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint import writer as writer_module
from openelm_mlx.checkpoint.released import released_gpt_oss_config, released_openelm_config
from openelm_mlx.checkpoint.safetensors_plan import OutputTensor, plan_files, write_sparse
from openelm_mlx.commands import main
from openelm_mlx.conversion import convert
from openelm_mlx.conversion import gguf_plan as gguf_plan_module
from openelm_mlx.conversion.gguf_plan import GGUF_TYPES
from openelm_mlx.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    SettingError,
    TokenizerError,
)
from openelm_mlx.sources import DEMOS
from openelm_mlx.specs import openelm_config, spec_from_config
from openelm_mlx.text import jinja
from openelm_mlx.text.chat import render_chat
from openelm_mlx.text.conversation import SystemContent
from openelm_mlx.text.gguf_vocabulary import tokenizer_files, vocabulary_of
from openelm_mlx.text.harmony import HarmonyFormat
from openelm_mlx.text.openai_chat import conversation
from openelm_mlx.text.tokenizer import load_tokenizer

hub = hub_server.hub

TOKENIZERS = FIXTURES / "tokenizers"
TINY, GPT_OSS = FIXTURES / "openelm_tiny", FIXTURES / "gpt_oss_tiny"


@pytest.fixture(autouse=True)
def _no_cached_tokenizers(monkeypatch):
    monkeypatch.setattr(hub_module, "cached_file", lambda *_: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small float32 OpenELM with a tokenizer, a licence and a chat template."""
    folder = save_folder(tmp_path_factory.mktemp("source") / "OpenELM-small-Instruct", random_model(), "llama")
    (folder / "LICENSE").write_text("Do as you like, ä.\n")
    return folder


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory) -> Path:
    """A short demo-gpt-oss as it is, experts in MXFP4."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(short_demo("demo-gpt-oss"), path)
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (type, bytes), by gguf's own reader."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def same(one: dict[str, tuple[str, np.ndarray]], other: dict[str, tuple[str, np.ndarray]]) -> bool:
    return one.keys() == other.keys() and all(
        one[name][0] == other[name][0] and np.array_equal(one[name][1], other[name][1]) for name in one
    )


def logits_of(folder: Path | str, tokens=((5, 17, 300, 2, 44),)) -> mx.array:
    return om.load(folder, dtype="float32")[0](mx.array(tokens))


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [TINY, GPT_OSS, GPT_OSS / "original"], ids=["openelm", "gpt-oss", "original"])
def test_every_tensor_is_the_source_s(tmp_path, folder):
    report = convert(folder, tmp_path / "m.gguf", verify=True)
    assert report.verification.num_exact == report.verification.num_tensors == len(report.tensors)
    assert report.files == {"m.gguf": (tmp_path / "m.gguf").stat().st_size}
    found = tensors_of(tmp_path / "m.gguf")
    assert found.keys() == {tensor.name for tensor in report.tensors}
    model, _ = om.load(folder, dtype="float32")
    if folder == TINY:
        spec = model.spec.layers[0]
        proj_1 = np.array(model.transformer.layers[0].ffn.proj_1.weight)
        assert np.array_equal(found["blk.0.ffn_up.weight"][1], proj_1[spec.intermediate_size :])
        assert np.array_equal(
            found["blk.0.attn_qkv.weight"][1], np.array(model.transformer.layers[0].attn.qkv_proj.weight)
        )
        assert {kind for kind, _ in found.values()} == {"F32"}
        return
    layer = model.layers[1]
    assert found["blk.1.ffn_gate_exps.weight"][0] == "MXFP4"
    experts = layer.mlp.experts.gate_up_proj
    parts = {name: experts[name] for name in ("weight", "scales")}
    plain = mx.dequantize(parts["weight"], parts["scales"], None, 32, 4, mode="mxfp4", dtype=mx.float32)
    gate = gguf.quants.dequantize(found["blk.1.ffn_gate_exps.weight"][1], gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(gate, np.array(plain[:, ::2]))
    assert np.array_equal(found["blk.1.ffn_up_exps.bias"][1], np.array(experts.bias[:, 1::2]))
    assert np.array_equal(found["blk.1.attn_sinks.weight"][1], np.array(layer.self_attn.sinks))
    heads = model.spec.layers[1].num_heads * model.spec.layers[1].head_dim
    kind, keys = found["blk.1.attn_k.weight"]
    keys = gguf.quants.dequantize(keys, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(keys, np.array(layer.self_attn.qkv_proj.weight)[heads : heads + len(keys)])


@pytest.mark.slow
def test_the_fields_that_llama_cpp_wants(tmp_path, demo_gguf):
    convert("demo-openelm", tmp_path / "o.gguf")
    openelm, gpt_oss = fields_of(tmp_path / "o.gguf"), fields_of(demo_gguf)
    model, tokenizer = om.load("demo-openelm")
    assert openelm["general.architecture"] == "openelm"
    assert openelm["openelm.attention.head_count"] == [layer.num_heads for layer in model.spec.layers]
    assert openelm["openelm.feed_forward_length"] == [layer.intermediate_size for layer in model.spec.layers]
    assert openelm["openelm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert openelm["tokenizer.ggml.model"] == "llama"
    assert len(openelm["tokenizer.ggml.tokens"]) == model.spec.vocab_size == tokenizer.vocab_size
    assert (openelm["tokenizer.ggml.bos_token_id"], openelm["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert openelm["tokenizer.ggml.add_bos_token"] is True
    assert openelm["tokenizer.chat_template"] == jinja.OPENELM_INSTRUCT
    # The template has the space that llama.cpp would put behind every control token too.
    assert openelm["tokenizer.ggml.add_space_prefix"] is False
    convert("demo-openelm", tmp_path / "plain.gguf", chat_template="plain")
    plain = fields_of(tmp_path / "plain.gguf")
    assert "tokenizer.chat_template" not in plain
    assert plain["tokenizer.ggml.add_space_prefix"] is True
    assert openelm["openelm_mlx.licences"][0] == "NOTICE"
    spec = om.load(short_demo("demo-gpt-oss"))[0].spec
    assert gpt_oss["general.architecture"] == "gpt-oss"
    assert gpt_oss["gpt-oss.rope.scaling.type"] == "yarn"
    assert gpt_oss["gpt-oss.rope.scaling.original_context_length"] == spec.yarn.original_context_length
    assert gpt_oss["gpt-oss.attention.sliding_window"] == 128
    assert gpt_oss["gpt-oss.expert_used_count"] == 4
    assert (gpt_oss["tokenizer.ggml.model"], gpt_oss["tokenizer.ggml.pre"]) == ("gpt2", "gpt-4o")
    assert gpt_oss["tokenizer.ggml.eos_token_id"] == 4079


def test_padding_rows_stay_behind(tmp_path):
    """CoreNet's vocabulary has more rows than tokens; a matrix that happens to have as many rows keeps them all."""
    folder = FIXTURES / "openelm_tiny" / "corenet"
    spec = om.load(folder)[0].spec
    report = convert(folder, tmp_path / "m.gguf")
    shapes = {tensor.name: tensor.shape for tensor in report.tensors}
    assert shapes["token_embd.weight"][0] == spec.usable_vocab_size < spec.vocab_size
    square = save_folder(tmp_path / "m", random_model(vocab_size=64), config={"padding_index": 60})
    shapes = {tensor.name: tensor.shape for tensor in convert(square, tmp_path / "n.gguf").tensors}
    assert shapes["token_embd.weight"] == (60, 64)
    assert shapes["blk.0.attn_output.weight"][0] == 64


def test_what_llama_cpp_does_to_gpt_oss_is_said(demo_gguf, tmp_path):
    notes = " ".join(convert("demo-gpt-oss", None, gguf_type=None, dry_run=True).notes)
    assert not notes  # a folder
    report = convert("demo-gpt-oss", tmp_path / "m.gguf", dry_run=True)
    assert "YaRN" in report.notes[0]
    assert "MXFP4" in report.notes[1]
    assert len(convert("demo-gpt-oss", tmp_path / "m.gguf", gguf_experts="f32", dry_run=True).notes) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_written_verified_and_read_back(tmp_path, source, kind):
    report = convert(source, tmp_path / "m.gguf", gguf_type=kind, verify=True)
    types = {name: found for name, (found, _) in tensors_of(tmp_path / "m.gguf").items()}
    assert types["blk.0.attn_qkv.weight"] == types["token_embd.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert (report.verification.errors == {}) == (kind == "f32")
    back = convert(tmp_path / "m.gguf", tmp_path / "back", verify=True)
    assert all(layer.weights == layer.stream == 0 for layer in back.verification.layers)
    stored, data = tensors_of(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[stored])
    model, _ = om.load(tmp_path / "back", dtype="float32")
    assert np.array_equal(np.array(model.transformer.layers[1].ffn.proj_2.weight), wanted)
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert same(tensors_of(tmp_path / "again.gguf"), tensors_of(tmp_path / "m.gguf"))


def test_gguf_s_own_rounding_is_what_is_written(tmp_path, source):
    convert(source, tmp_path / "m.gguf", gguf_type="q8_0")
    whole = np.array(om.load(source)[0].transformer.layers[0].attn.out_proj.weight)
    wanted = gguf.quants.quantize(whole, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(tensors_of(tmp_path / "m.gguf")["blk.0.attn_output.weight"][1], wanted)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("4", "Q4_1"),
        ("2", "Q4_1"),
        ("5", "Q5_1"),
        ("mxfp4", "MXFP4"),
        ("8", "F32"),
        ("mxfp8", "BF16"),
        ("nvfp4", "BF16"),
    ],
)
def test_packed_weights_keep_their_numbers(tmp_path, source, recipe, kind):
    size = {"group_size": 32} if recipe.isdigit() else {}
    packed = convert(source, tmp_path / "packed", quantize=recipe, **size)
    report = convert(tmp_path / "packed", tmp_path / "m.gguf", verify=True)
    assert report.gguf_types[kind] > 10
    assert report.verification.num_exact == len(report.tensors)
    assert bool(report.notes) == (recipe == "8")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert mx.array_equal(logits_of(tmp_path / "back"), logits_of(tmp_path / "packed"))
    assert packed.nbytes > 0


def test_scales_that_float16_lacks_are_looked_at_one_matrix_at_a_time(tmp_path, source):
    convert(source, tmp_path / "packed", quantize=4, group_size=32, dtype="float32")
    arrays = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    assert arrays["transformer.layers.0.attn.qkv_proj.scales"].dtype == mx.float32
    # One matrix of all gets scales that float16 has.
    for part in ("scales", "biases"):
        name = f"transformer.layers.0.attn.qkv_proj.{part}"
        arrays[name] = arrays[name].astype(mx.float16).astype(mx.float32)
    mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), arrays)
    report = convert(tmp_path / "packed", tmp_path / "m.gguf", verify=True)
    kinds = {tensor.name: tensor.dtype for tensor in report.tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "Q4_1"
    assert kinds["blk.1.attn_qkv.weight"] == "F32"
    assert report.verification.num_exact == len(report.tensors)


def test_experts_and_the_rest_have_types_of_their_own(tmp_path):
    report = convert(short_demo("demo-gpt-oss"), tmp_path / "a.gguf", gguf_type="q8_0", verify=True)
    kinds = {tensor.name: tensor.dtype for tensor in report.tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "MXFP4"
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == "Q8_0"
    assert (
        kinds["blk.0.ffn_gate_inp.weight"]
        == kinds["blk.0.ffn_up_exps.bias"]
        == kinds["blk.0.attn_sinks.weight"]
        == "F32"
    )
    plan = convert("demo-gpt-oss", tmp_path / "b.gguf", gguf_experts="f16", dry_run=True)
    kinds = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert (kinds["blk.0.ffn_up_exps.weight"], kinds["blk.0.attn_q.weight"]) == ("F16", "BF16")


def test_in_slices_is_whole(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "whole.gguf", gguf_type="q4_1")
    monkeypatch.setattr("openelm_mlx.conversion.planned_weight.SLICE_ELEMENTS", 700)
    convert(source, tmp_path / "slices.gguf", gguf_type="q4_1", verify=True)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slices.gguf").read_bytes()
    monkeypatch.setattr("openelm_mlx.checkpoint.gguf_checkpoint._SLICE_ELEMENTS", 700)
    convert(tmp_path / "whole.gguf", tmp_path / "a", verify=True)
    convert(tmp_path / "a", tmp_path / "again.gguf")
    assert same(tensors_of(tmp_path / "again.gguf"), tensors_of(tmp_path / "whole.gguf"))


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("experts", [None, "f32", "q8_0"])
def test_gpt_oss_there_and_back_is_exact(tmp_path, demo_gguf, experts):
    path = tmp_path / "m.gguf"
    if experts is None:
        path.symlink_to(demo_gguf)
    else:
        convert(short_demo("demo-gpt-oss"), path, gguf_experts=experts)
    report = convert(path, tmp_path / "back", verify=True)
    assert all(layer.weights == layer.stream == 0 for layer in report.verification.layers)
    assert report.dtype == ("float32" if experts == "f32" else "bfloat16")
    if experts != "q8_0":  # float32 experts go through another product
        assert mx.max(mx.abs(logits_of(tmp_path / "back") - logits_of(short_demo("demo-gpt-oss")))).item() <= (
            1e-3 if experts else 0
        )
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert same(tensors_of(tmp_path / "again.gguf"), tensors_of(path))


def test_the_folder_says_what_the_source_s_did(tmp_path, source):
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").read_text() == "Do as you like, ä.\n"
    model, tokenizer = om.load(tmp_path / "back")
    original, theirs = om.load(source)
    assert model.spec == original.spec
    assert tokenizer.chat_template == theirs.chat_template == "openelm-instruct"
    assert config_of(tmp_path / "back")["openelm_mlx"]["chat_template"] == "openelm-instruct"
    assert mx.array_equal(logits_of(tmp_path / "back"), logits_of(source))


def test_from_one_gguf_file_to_another(tmp_path, source):
    convert(source, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", gguf_type="q8_0", verify=True)
    convert(source, tmp_path / "c.gguf", gguf_type="q8_0")
    assert same(tensors_of(tmp_path / "b.gguf"), tensors_of(tmp_path / "c.gguf"))


def test_gate_and_up_of_two_types_become_one_matrix(tmp_path, source):
    convert(source, tmp_path / "m.gguf", gguf_type="q8_0")
    kinds = gguf_plan_module._chosen

    def mixed(name, *rest):
        return gguf_plan_module.TYPES["Q5_1"] if name.endswith("0.ffn.up.weight") else kinds(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_plan_module, "_chosen", mixed)
        convert(source, tmp_path / "mixed.gguf", gguf_type="q8_0")
    report = convert(tmp_path / "mixed.gguf", tmp_path / "back")
    assert next(t.dtype for t in report.tensors if t.name == "transformer.layers.0.ffn.proj_1.weight") == "F32"
    _, up = tensors_of(tmp_path / "mixed.gguf")["blk.0.ffn_up.weight"]
    wanted = gguf.quants.dequantize(up, gguf.GGMLQuantizationType.Q5_1)
    found = np.array(mx.load(str(tmp_path / "back" / "model.safetensors"))["transformer.layers.0.ffn.proj_1.weight"])
    assert np.array_equal(found[len(found) // 2 :], wanted)


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = (
    "What is a banjo?", " two  spaces ", "Hello, wörld! 漢字 🎻", "line\nbreak\ttab", "1234 5 678", "<s> </s> <|end|>",
    "'s I'll",
    "", "a", "   ", "\n\n", "ABC abc Abc",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["llama", "llama_json", "llama_metaspace", "byte_level", "demo-openelm", "demo-gpt-oss"]
)
@pytest.mark.parametrize("for_chat", [False, True])
def test_a_tokenizer_comes_back_with_the_same_tokens(tmp_path, name, for_chat):
    before = load_tokenizer(DEMOS.get(name) or TOKENIZERS / name)
    vocabulary = vocabulary_of(before).padded(before.vocab_size + 5)
    assert len(vocabulary.tokens) == before.vocab_size + 5
    metadata = {
        key: [each.decode("utf-8", "surrogateescape") if isinstance(each, bytes) else each for each in value]
        if isinstance(value, list)
        else value
        for key, value in vocabulary.fields(for_chat).items()
    }
    for file, content in tokenizer_files(metadata, "m.gguf").items():
        (tmp_path / file).write_bytes(content)
    after = load_tokenizer(tmp_path)
    assert after.vocab_size == before.vocab_size
    assert (after.bos_token, after.eos_tokens[:1]) == (before.bos_token, before.eos_tokens[:1])
    assert after.special_tokens.items() >= {k: v for k, v in before.special_tokens.items() if k != "<unk>"}.items()
    for text in TEXTS:
        if name == "llama_metaspace" and text.startswith(" "):
            continue  # this form alone puts no space before a text that begins with one; SentencePiece and llama.cpp do
        assert after.encode(text) == before.encode(text), text
        assert after.encode(text, continuation=True) == before.encode(text, continuation=True), text
        assert after.encode_prompt(text) == before.encode_prompt(text)
        assert after.decode(before.encode(text)) == before.decode(before.encode(text))


def test_as_many_tokens_as_rows():
    """llama.cpp takes their number for the embedding's, whether the tokenizer has fewer or more."""
    vocabulary = vocabulary_of(load_tokenizer(TOKENIZERS / "llama"))
    for num_rows in (590, 600, 640):
        padded = vocabulary.padded(num_rows)
        assert len(padded.tokens) == len(padded.types) == len(padded.scores) == num_rows
        assert len(set(padded.tokens)) == num_rows


def test_what_is_packed_in_a_file_can_be_unpacked_and_not_packed_again(tmp_path, source):
    convert(source, tmp_path / "m.gguf", gguf_type="q8_0")
    report = convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float16")
    assert (report.quantization, report.dtype) == (None, "float16")
    with pytest.raises(ConversionError, match="quantized already"):
        convert(tmp_path / "m.gguf", tmp_path / "again", quantize=4)
    with pytest.raises(ConversionError, match="mlx-swift-lm"):
        convert(tmp_path / "m.gguf", tmp_path / "again", target="swift")
    assert not (tmp_path / "again").exists()


def test_a_tokenizer_of_the_user_s_own_takes_the_place_of_the_file_s(tmp_path, source, demo_gguf):
    report = convert(demo_gguf, tmp_path / "out", tokenizer=DEMOS["demo-gpt-oss"])
    before = (DEMOS["demo-gpt-oss"] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert "tokenizer.json" in report.tokenizer
    with pytest.raises(TokenizerError, match="belongs to another model"):
        convert(demo_gguf, tmp_path / "again", tokenizer=TOKENIZERS / "llama")
    assert convert(demo_gguf, tmp_path / "swift", target="swift", verify=True).verification.layers[0].stream == 0


def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="would split text differently"):
        vocabulary_of(load_tokenizer(TOKENIZERS / "folding"))
    content = json.loads((TOKENIZERS / "byte_level" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="pre-tokenizer of its own"):
        vocabulary_of(load_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.model": "gpt2"}, "'qwen2'"),
        ({"tokenizer.ggml.scores": [0.0]}, "scores"),
        ({"tokenizer.ggml.token_type": ["x"]}, "token_type"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "tokens"),
        ({"tokenizer.ggml.tokens": "x"}, "tokens"),
    ],
)
def test_metadata_that_contradicts_itself(change, match):
    fields = vocabulary_of(load_tokenizer(TOKENIZERS / "llama")).fields()
    fields["tokenizer.ggml.tokens"] = [
        each.decode("utf-8", "surrogateescape") for each in fields["tokenizer.ggml.tokens"]
    ]
    with pytest.raises(TokenizerError, match=match):
        tokenizer_files(fields | change, "m.gguf")


CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
    ],
    [{"role": "system", "content": "Only this."}],
)  # fmt: skip


@pytest.mark.parametrize("chat", CHATS)
def test_harmony_s_template_is_our_own_rendering(chat):
    """Jinja's text, its markup read as control tokens, is what this library sends to gpt-oss."""
    harmony = HarmonyFormat(load_tokenizer(DEMOS["demo-gpt-oss"]))
    template = jinja2.Template(jinja.HARMONY)
    options = {"messages": chat, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    today = f"{date.today():%Y-%m-%d}"
    dated = template.render(**options, strftime_now=lambda form: date.today().strftime(form))
    wanted = harmony.render_for_completion(conversation(chat, system=SystemContent(current_date=today)))
    assert dated == harmony.decode_markup(wanted)
    undated = harmony.render_for_completion(conversation(chat, system=SystemContent()))
    assert template.render(**options) == harmony.decode_markup(undated)


@pytest.mark.parametrize("chat", CHATS)
def test_openelm_s_template_is_our_own_rendering(chat):
    tokenizer = load_tokenizer(TOKENIZERS / "llama")
    text = jinja2.Template(jinja.OPENELM_INSTRUCT).render(
        messages=chat, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    ours = render_chat(chat, tokenizer, "openelm-instruct")
    pieces = [["</s>" if token == 2 else "" for token in ours], text.split("</s>")]
    assert pieces[0].count("</s>") == len(pieces[1]) - 1
    ends = [i for i, token in enumerate(ours) if token == 2]
    starts = [1, *(i + 1 for i in ends)]
    spoken = [tokenizer.decode(ours[a:b], continuation=a != 1) for a, b in zip(starts, [*ends, None], strict=True)]
    # The space before the first text is the tokenizer's own here, and the template's there.
    assert "<s> " + "</s>".join(spoken) == text


# --- resuming, and what is never left behind --------------------------------------------------------------------------


class Stop:
    """Presses Ctrl-C at the given call."""

    def __init__(self, count: int, stage: str = "convert") -> None:
        self.count, self.stage = count, stage

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.count -= stage == self.stage
        if self.count == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_interrupted_and_taken_up_is_uninterrupted(tmp_path, source, count):
    whole = convert(source, tmp_path / "whole.gguf", gguf_type="q8_0")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "m.gguf", gguf_type="q8_0", progress=Stop(count))
    assert not (tmp_path / "m.gguf").exists()
    assert (tmp_path / "m.gguf.partial").is_dir()
    report = convert(source, tmp_path / "m.gguf", gguf_type="q8_0")
    assert (report.num_resumed > 0) == (count > 2)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [*report.checksums.values()] == [*whole.checksums.values()]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_interrupted_while_it_is_verified(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "m.gguf", verify=True, progress=Stop(3, "verify"))
    report = convert(source, tmp_path / "m.gguf", verify=True)
    assert report.num_resumed == len(report.tensors)


def test_another_type_is_not_taken_up(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "m.gguf", gguf_type="q8_0", progress=Stop(20))
    assert convert(source, tmp_path / "m.gguf", gguf_type="f16").num_resumed == 0


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, source):
    def appear(stage: str, done: int, total: int) -> None:
        (tmp_path / "m.gguf").write_text("mine")

    with pytest.raises(DestinationError, match="appeared"):
        convert(source, tmp_path / "m.gguf", progress=appear)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_without_second_names(tmp_path, source, monkeypatch, exists):
    def no_link(*_: object) -> None:
        if exists:
            (tmp_path / "m.gguf").write_text("mine")
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    if exists:
        with pytest.raises(DestinationError, match="appeared"):
            convert(source, tmp_path / "m.gguf")
        assert (tmp_path / "m.gguf").read_text() == "mine"
    else:
        convert(source, tmp_path / "m.gguf")
        assert tensors_of(tmp_path / "m.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_a_byte_that_changed_after_it_was_written_is_found(tmp_path, source, monkeypatch):
    def corrupt(self):
        path = finish(self)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        return path

    from openelm_mlx.checkpoint.gguf_writer import GgufWriter

    finish = GgufWriter.finish
    monkeypatch.setattr(GgufWriter, "finish", corrupt)
    with pytest.raises(ConversionError, match="does not read back"):
        convert(source, tmp_path / "m.gguf", verify=True)
    assert not list(tmp_path.iterdir())


def test_blocks_that_are_wrong_are_found_by_verification(tmp_path, source, monkeypatch):
    """Not the checksum's business: numbers that were packed wrongly."""
    convert(source, tmp_path / "packed", quantize=4, group_size=32)
    wrong = gguf_plan_module.to_blocks
    monkeypatch.setattr(gguf_plan_module, "to_blocks", lambda *each: np.roll(wrong(*each), 20, axis=-1))
    with pytest.raises(ConversionError, match="differs from the source"):
        convert(tmp_path / "packed", tmp_path / "m.gguf", verify=True)
    assert [each.name for each in tmp_path.iterdir()] == ["packed"]


def test_one_code_of_a_carried_matrix_that_is_wrong_is_found(tmp_path, source, monkeypatch):
    """Far less than rounding would move it: what is exact has to be exact."""
    convert(source, tmp_path / "packed", quantize=4, group_size=32)
    pack = gguf_plan_module.to_blocks

    def one_wrong(*arguments):
        blocks = pack(*arguments)
        blocks.reshape(-1)[10] ^= 1  # a low bit of a code, behind scale and bias
        return blocks

    monkeypatch.setattr(gguf_plan_module, "to_blocks", one_wrong)
    with pytest.raises(ConversionError, match="differs from the source"):
        convert(tmp_path / "packed", tmp_path / "m.gguf", verify=True)
    assert [each.name for each in tmp_path.iterdir()] == ["packed"]


def test_a_full_disk(tmp_path, source, monkeypatch):
    def full(stream, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "_append", full)
    with pytest.raises(DestinationError, match="is full"):
        convert(source, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.gguf", "m"])
def test_a_disk_that_holds_no_file_so_large(tmp_path, source, monkeypatch, name):
    """FAT32 ends a file at 4 GB: the folder can be written to, and the disk is not full."""

    def too_large(stream, data):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(writer_module, "_append", too_large)
    with pytest.raises(DestinationError, match=r'larger than a file may be .*max_file_bytes="4GB"'):
        convert(source, tmp_path / name)
    assert not list(tmp_path.iterdir())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gguf_type": "q9"}, "gguf_type is 'q9'"),
        ({"gguf_type": 8}, "gguf_type is 8"),
        ({"gguf_experts": "q8_0"}, "no experts"),
        ({"quantize": 4}, "quantize is for a folder.*use gguf_type"),
        ({"preset": "smallest"}, "quantize is for a folder"),
        ({"dtype": "float16"}, "dtype is for a folder"),
        ({"target": "swift"}, "target is for a folder.*leave it out"),
        ({"upload": "me/it"}, "upload is for a folder"),
        ({"max_file_bytes": "2MB"}, "max_file_bytes is for a folder"),
    ],
)
def test_options_that_cannot_be(tmp_path, source, options, match):
    with pytest.raises(SettingError, match=match):
        convert(source, tmp_path / "m.gguf", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["gguf_type", "gguf_experts"])
def test_a_folder_has_no_gguf_type(tmp_path, source, option):
    with pytest.raises(SettingError, match=rf"{option} is for a GGUF file.*\.gguf"):
        convert(source, tmp_path / "out", **{option: "f16"})


def test_a_type_that_a_matrix_cannot_have(tmp_path):
    narrow = save_folder(tmp_path / "m", random_model(model_dim=48, head_dim=16))
    with pytest.raises(ConversionError, match=r"48 columns, which Q8_0 cannot hold.*32"):
        convert(narrow, tmp_path / "m.gguf", gguf_type="q8_0")
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
    convert(narrow, tmp_path / "m.gguf", gguf_type="f16")


def test_numbers_too_large_for_float16(tmp_path):
    model = random_model()
    model.transformer.layers[1].attn.out_proj.weight *= 1e7
    folder = save_folder(tmp_path / "m", model)
    with pytest.raises(ConversionError, match="use bfloat16"):
        convert(folder, tmp_path / "m.gguf", gguf_type="f16")
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


def test_models_that_llama_cpp_computes_otherwise(tmp_path):
    others = [
        (FIXTURES / "openelm_untied", "an untied head"),
        (changed(tmp_path / "s", {"swiglu_limit": 5.0}), "activation"),
        (changed(tmp_path / "l", {"layer_types": ["full_attention"] * 4}), "sliding window in every other layer"),
    ]
    for number, (folder, match) in enumerate(others):
        with pytest.raises(ConversionError, match=match):
            convert(folder, tmp_path / f"{number}.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def changed(folder: Path, fields: dict) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(GPT_OSS / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(GPT_OSS) | fields))
    return folder


def test_an_output_that_exists_and_places_that_cannot_be(tmp_path, source):
    (tmp_path / "file.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    for name, match in (("file.gguf", "is there already"), ("folder.gguf", "folder"), ("no/m.gguf", "no folder")):
        with pytest.raises(DestinationError, match=match):
            convert(source, tmp_path / name)
    assert (tmp_path / "file.gguf").read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file.gguf", "folder.gguf"]


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, source):
    convert(source, tmp_path / "m.gguf")

    def cut(stage: str, done: int, total: int) -> None:
        os.truncate(tmp_path / "m.gguf", 30_000)

    with pytest.raises((CheckpointError, ConversionError)):
        convert(tmp_path / "m.gguf", tmp_path / "out", progress=cut)
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]


def test_without_the_package(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'openelm_mlx\[gguf\]'"):
        convert(source, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_a_file_is_still_read(tmp_path, demo_gguf):
    script = "import sys; sys.modules['gguf'] = None\nimport openelm_mlx as om; om.convert(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, demo_gguf, tmp_path / "out"], check=True, cwd=FIXTURES.parent.parent)
    assert (tmp_path / "out" / "tokenizer.json").exists()


# --- from the Hub -----------------------------------------------------------------------------------------------------


def test_a_repository_is_planned_by_its_headers_and_fetched_for_the_file(tmp_path, hub, source):
    convert(source, tmp_path / "packed", quantize=4, group_size=32, dtype="bfloat16")
    files = {path.name: path for path in (tmp_path / "packed").iterdir()}
    hub.add_repo("me/OpenELM-x-Instruct", {**files, "original/model.safetensors": b"x" * 1000})
    size = files["model.safetensors"].stat().st_size
    planned = convert("me/OpenELM-x-Instruct", tmp_path / "m.gguf", dry_run=True)
    assert hub.sent("model.safetensors") < size  # a piece with the header in it
    assert planned.gguf_types["Q4_1"] > 10  # taken to fit, since no scale was looked at
    stages: dict[str, int] = {}
    report = convert(
        "me/OpenELM-x-Instruct", tmp_path / "m.gguf", verify=True, progress=lambda s, d, t: stages.update({s: d})
    )
    assert stages["download"] >= size
    assert stages["convert"] == sum(-(-tensor.nbytes // 32) * 32 for tensor in report.tensors)
    assert stages["verify"] == report.verification.num_exact == len(report.tensors)
    assert fields_of(tmp_path / "m.gguf")["general.source.url"] == "https://huggingface.co/me/OpenELM-x-Instruct"
    convert(tmp_path / "packed", tmp_path / "here.gguf")
    assert same(tensors_of(tmp_path / "m.gguf"), tensors_of(tmp_path / "here.gguf"))


def test_scales_of_a_repository_are_looked_at_when_they_are_here(tmp_path, hub, source):
    convert(source, tmp_path / "packed", quantize=4, group_size=32, dtype="float32")
    hub.add_repo("me/x", {path.name: path for path in (tmp_path / "packed").iterdir()})
    assert convert("me/x", tmp_path / "m.gguf", dry_run=True).gguf_types["Q4_1"] > 10
    report = convert("me/x", tmp_path / "m.gguf", verify=True)
    assert set(report.gguf_types) == {"F32"}  # float16 has not one of these scales
    assert report.verification.num_exact == len(report.tensors)


def test_a_repository_with_nothing_but_gguf(tmp_path, hub):
    hub.add_repo("me/it-GGUF", {"it-q8_0.gguf": b"GGUF", "it-f16.gguf": b"GGUF", "README.md": b"# It"})
    for call in (lambda: convert("me/it-GGUF", tmp_path / "out"), lambda: om.load("me/it-GGUF")):
        with pytest.raises(CheckpointError, match=r"GGUF only \(it.*hf download OWNER/NAME it"):
            call()
    assert hub.sent("it-q8_0.gguf") == 0


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, sys
from openelm_mlx import hub
from openelm_mlx.conversion import convert
hub.cached_file = lambda *_: None
convert(sys.argv[1], sys.argv[2])
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.environ.get("OPENELM_MLX_LARGE"), reason="writes 14 GB: set OPENELM_MLX_LARGE=1")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak there")
@pytest.mark.parametrize(("size", "gigabytes"), [("3B", 1.5), ("20b", 2.0)])
def test_the_process_s_peak_in_the_real_size(tmp_path, size, gigabytes):
    """From files whose tensors are holes: as many bytes go through memory as of real ones."""
    folder = tmp_path / "m"
    if size == "20b":
        write_random_gpt_oss(folder, released_gpt_oss_config(size), "openai-hf", sparse=True)
    else:
        spec = spec_from_config(released_openelm_config(size))
        tensors = [OutputTensor(name, "F32", shape) for name, shape in spec.parameter_shapes().items()]
        write_sparse(folder, plan_files(tensors), {"config.json": json.dumps(openelm_config(spec)).encode()})
    command = [sys.executable, "-c", MEASURE, folder, tmp_path / "m.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FIXTURES.parent.parent)
    (tmp_path / "m.gguf").unlink()
    assert int(done.stdout) < gigabytes * 1e9


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    assert (
        main(["convert", str(short_demo("demo-gpt-oss")), str(tmp_path / "m.gguf"), "--gguf-type", "q8_0", "--verify"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "MXFP4" in out
    assert "tensors hold the source's own numbers" in out
    assert "rounded to Q8_0" in out
    assert "--gguf-experts f32" in err
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "mlx-lm"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["demo-openelm", "m.gguf", "--gguf-type", "q4_k"], "--gguf-type is 'q4_k'"),
        (["demo-openelm", "m.gguf", "--dtype", "float16"], "--dtype is for a folder"),
        (["demo-openelm", "m.gguf", "--quantize", "4"], "--quantize is for a folder.*: use --gguf-type\\.\n"),
        (["demo-openelm", "m.gguf", "--max-file-size", "1MB"], "--max-file-size is for a folder"),
        (["demo-openelm", "old.gguf"], "is there already"),
        (["other.gguf", "m"], "'llama', which is not supported: only openelm and gpt-oss are"),
        (["cut.gguf", "m"], "damaged"),
        (["nothing.gguf", "m"], "no file or folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, words, match):
    from test_checkpoint_gguf import field, header, text

    monkeypatch.chdir(tmp_path)
    Path("old.gguf").write_text("mine")
    Path("other.gguf").write_bytes(header([field("general.architecture", 8, text("llama"))]))
    Path("cut.gguf").write_bytes(header()[:20])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["convert", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(match, captured.err), captured.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("size", ["1MB", "1000kB", "1000000B"])
def test_the_smallest_file_size_is_taken(tmp_path, size):
    assert main(["convert", "demo-openelm", str(tmp_path / "out"), "--max-file-size", size, "--dry-run"]) == 0
