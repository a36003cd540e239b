"""`convert --for swift`: the arithmetic of mlx-swift-lm replayed on the configs that are written, and mlx-lm's loader."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, config_of, max_difference, oracle
from short_demos import short_demo
from test_conversion import Headers

import openelm_mlx as om
from openelm_mlx import hub as hub_module
from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint
from openelm_mlx.checkpoint.released import released_gpt_oss_config, released_openelm_config
from openelm_mlx.conversion import convert, plan_conversion
from openelm_mlx.conversion.for_swift import check_swift
from openelm_mlx.errors import ConversionError, SettingError
from openelm_mlx.sources import DEMOS
from openelm_mlx.specs import openelm_config, spec_from_config

F = np.float32
GPT_OSS = FIXTURES / "gpt_oss_odd"


@pytest.fixture(autouse=True)
def _no_cached_tokenizers(monkeypatch):
    monkeypatch.setattr(hub_module, "cached_file", lambda *_: None)


# --- OpenELM.swift, in its own arithmetic (Float is float32) ----------------------------------------------------------


def swift_make_divisible(value, divisor: int) -> int:
    """`makeDivisible`: Float in, Int out."""
    rounded = max(F(divisor), F(int(F(value + F(divisor) / F(2)) / F(divisor)) * divisor))
    if float(rounded) < 0.9 * float(value):
        rounded = F(rounded + F(divisor))
    return int(rounded)


def swift_stride(first: float, last: float, count: int) -> list:
    """`stride(from:through:by:)` of Floats, each rounded to two decimals, halves away from zero."""
    step, values = F(F(F(last) - F(first)) / F(count - 1)), []
    for i in range(count + 1):
        value = F(float(first) + i * float(step))  # one rounding, as a fused multiply and add has
        if value > F(last):
            break
        values.append(F(np.floor(F(value * F(100)) + F(0.5)) / F(100)))
    return values


def swift_shapes(config: dict) -> list[tuple[int, int, int]]:
    """Query heads, kv heads and feed-forward width of each layer, as `OpenElmConfiguration` computes them."""
    dim, head_dim, count = config["model_dim"], config["head_dim"], config["num_transformer_layers"]
    heads = [swift_make_divisible(F(F(dim) * a), head_dim * 4) // head_dim for a in swift_stride(0.5, 1.0, count)]
    widths = [swift_make_divisible(F(m * F(dim)), config["ffn_dim_divisor"]) for m in swift_stride(0.5, 4.0, count)]
    assert len(heads) == len(widths) == count  # or Swift would read past the end of its arrays
    return [(h, h // 4, width) for h, width in zip(heads, widths, strict=True)]


def spec_shapes(config: dict) -> list[tuple[int, int, int]]:
    layers = spec_from_config(config).layers
    return [(layer.num_heads, layer.num_kv_heads, layer.intermediate_size) for layer in layers]


@pytest.mark.parametrize("target", [None, "swift"], ids=["plain", "for swift"])
@pytest.mark.parametrize("size", ["270M", "450M", "1.1B", "3B"])
def test_swift_computes_the_shapes_of_every_released_size(size, target):
    source = released_openelm_config(size)
    for config in (source, plan_of(source).config | {"ffn_dim_divisor": 1, "ffn_multipliers": exact(source)}):
        written = plan_of(config, target=target).config
        assert written["ffn_dim_divisor"] == 256
        assert swift_shapes(written) == spec_shapes(source)
        assert spec_shapes({k: v for k, v in written.items() if k != "num_query_heads"}) == spec_shapes(source)


@pytest.mark.parametrize("size", ["270M", "450M", "1.1B", "3B"])
def test_a_config_that_is_written_for_a_shape_alone_has_apple_s_fields(size):
    """As random checkpoints and exports have it."""
    spec = spec_from_config(released_openelm_config(size))
    written = openelm_config(spec)
    assert written["ffn_dim_divisor"] == 256
    assert spec_from_config(written) == spec
    assert swift_shapes(written) == spec_shapes(written)


def test_a_divisor_of_1_is_what_swift_misreads():
    source = released_openelm_config("270M")
    written = dict(plan_of(source).config) | {"ffn_dim_divisor": 1, "ffn_multipliers": exact(source)}
    assert spec_shapes(written) == spec_shapes(source)
    assert swift_shapes(written) != spec_shapes(source)


def exact(config: dict) -> list[float]:
    spec = spec_from_config(config)
    return [layer.intermediate_size / spec.hidden_size for layer in spec.layers]


def plan_of(config: dict, **options):
    checkpoint = Headers(config, "F16")
    return plan_conversion(understand(checkpoint, config, spec_from_config(config)), config, **options)


def test_a_model_that_swift_computes_otherwise_is_refused_and_converts_without(tmp_path):
    with pytest.raises(ConversionError, match=r"Apple's rule.*target"):
        convert("demo-openelm", tmp_path / "out", target="swift")
    assert not list(tmp_path.iterdir())
    convert("demo-openelm", tmp_path / "out")
    assert config_of(tmp_path / "out")["ffn_dim_divisor"] == 1  # no multiplier of Apple's gives these widths


def test_what_swift_has_as_constants():
    openelm = spec_from_config(released_openelm_config("270M"))
    gpt_oss = spec_from_config(released_gpt_oss_config("20b"))
    check_swift(openelm)
    check_swift(gpt_oss)
    full = tuple(replace(layer, window=None) for layer in gpt_oss.layers)
    for other, word in (
        (replace(openelm, rope_theta=500_000.0), "theta"),
        (replace(openelm, tied_head=False), "head"),
        (replace(openelm, layers=openelm.layers[:1]), "rule"),
        (replace(gpt_oss, yarn=None), "YaRN"),
        (replace(gpt_oss, yarn=replace(gpt_oss.yarn, concentration=1.0)), "YaRN"),
        (replace(gpt_oss, tied_head=True), "head"),
        (replace(gpt_oss, swiglu_limit=6.0), "limit"),
        (replace(gpt_oss, layers=full), "window"),
    ):
        with pytest.raises(ConversionError, match=word):
            check_swift(other)


def test_another_program_is_refused(tmp_path):
    with pytest.raises(SettingError, match="kotlin"):
        convert("demo-gpt-oss", tmp_path / "out", target="kotlin")


# --- gpt-oss ----------------------------------------------------------------------------------------------------------

# The keys of GPTOSSConfiguration that are decoded without a default, and the two that have another spelling elsewhere.
SWIFT_KEYS = (
    "model_type", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size", "rms_norm_eps",
    "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window",
    "rope_scaling", "rope_theta", "layer_types",
)  # fmt: skip


@pytest.mark.parametrize("target", [None, "swift"])
@pytest.mark.parametrize("drop", [("rope_scaling", "num_experts_per_tok"), ("rope_parameters", "experts_per_token")])
def test_both_spellings_are_written_whichever_the_source_has(tmp_path, drop, target):
    source = tmp_path / "source"
    source.mkdir()
    for file in DEMOS["demo-gpt-oss"].iterdir():
        (source / file.name).symlink_to(file)
    config = config_of(DEMOS["demo-gpt-oss"])
    config |= {"rope_parameters": config["rope_scaling"] | {"rope_theta": config["rope_theta"]}}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    written = plan_conversion_of(source, target=target).config
    assert written["num_experts_per_tok"] == written["experts_per_token"] == 4
    parameters = dict(written["rope_parameters"])
    assert parameters.pop("rope_theta") == written["rope_theta"] == 150_000
    assert parameters == written["rope_scaling"]
    # Swift decodes each value as a text, a number or a truth value.
    assert all(isinstance(value, (str, int, float, bool)) for value in written["rope_scaling"].values())
    assert all(written[name] is not None for name in SWIFT_KEYS)


def plan_conversion_of(folder, **options):
    config = config_of(folder)
    return plan_conversion(understand(open_checkpoint(folder), config, spec_from_config(config)), config, **options)


@pytest.mark.parametrize("source", ["demo-gpt-oss", GPT_OSS], ids=["demo", "odd"])
def test_gate_and_up_are_apart_and_all_three_loaders_agree(tmp_path, source):
    """mlx-lm's loader is Swift's model: GPTOSS.swift is a port of it, and takes the weights as they are."""
    import mlx_lm

    is_demo = source == "demo-gpt-oss"
    source = short_demo(source) if is_demo else source
    report = convert(source, tmp_path / "out", target="swift", verify=True)
    names = {tensor.name for tensor in report.tensors}
    assert {"model.layers.0.mlp.experts.gate_proj.weight", "model.layers.0.self_attn.q_proj.bias"} <= names
    assert not any("gate_up_proj" in name or "qkv_proj" in name or "_blocks" in name for name in names)
    assert all(layer.weights == layer.stream == 0 for layer in report.verification.layers)
    again, _ = om.load(tmp_path / "out", dtype="float32")
    model, _ = om.load(source, dtype="float32")
    tokens = mx.array(oracle(GPT_OSS)["tokens"] if source == GPT_OSS else [[5, 17, 300, 2, 44]])
    logits = model(tokens)
    assert mx.array_equal(again(tokens), logits)
    config = config_of(tmp_path / "out")
    if is_demo:
        assert config["quantization"] == {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "out", model_config={"rope_scaling": config["rope_scaling"]})
    theirs.set_dtype(mx.float32)
    assert max_difference(theirs(tokens)[:, :1], np.array(logits[:, :1])) < 0.02  # without rotation: bounds are rounded


def test_quantized_for_swift_is_quantized_and_then_apart(tmp_path):
    report = convert("demo-gpt-oss", tmp_path / "out", quantize=4, group_size=32, target="swift")
    assert report.quantization["model.layers.0.mlp.experts.up_proj"]["mode"] == "mxfp4"
    whole = om.convert("demo-gpt-oss", tmp_path / "whole", quantize=4, group_size=32)
    assert whole.nbytes == report.nbytes
    tokens = mx.array([[5, 17, 300, 2, 44]])
    a, b = (om.load(tmp_path / name, dtype="float32")[0](tokens) for name in ("out", "whole"))
    assert mx.array_equal(a, b)
