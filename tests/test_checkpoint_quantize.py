"""Formats and recipes: shapes as MLX packs them, and what each recipe does to which weight."""

from pathlib import Path

import mlx.core as mx
import pytest

from openelm_mlx.checkpoint.quantize import (
    RECIPES,
    Quantization,
    parse_recipe,
    quantization_of,
    stored_quantization,
    wider,
)
from openelm_mlx.checkpoint.reader import TensorEntry
from openelm_mlx.errors import ConfigError, SettingError
from openelm_mlx.specs import spec_from_config

SPEC = spec_from_config({"model_name": "OpenELM-270M", "vocab_size": 32000, "max_context_length": 2048})
TYPES = {mx.uint32: "U32", mx.uint8: "U8", mx.float32: "F32"}

AFFINE = [Quantization(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
OTHERS = [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")]


@pytest.mark.parametrize("quantization", AFFINE + OTHERS, ids=str)
def test_parts_are_what_mlx_packs(quantization):
    weight = mx.random.normal((6, 256), key=mx.random.key(0))
    packed = quantization.quantize(weight)
    assert {n: (TYPES[a.dtype], a.shape) for n, a in packed.items()} == quantization.parts((6, 256), "F32")
    error = mx.abs(quantization.dequantize(packed, mx.float32) - weight).max().item()
    # A step of the affine grid is at most the weights' range over 2^bits - 1; floating formats have an eighth at worst.
    worst = mx.abs(weight).max().item()
    assert error <= (2 * worst / (2**quantization.bits - 1) if quantization.mode == "affine" else worst / 4)


def test_every_recipe_parses_in_both_spellings():
    for recipe in RECIPES:
        assert parse_recipe(recipe)[0] == recipe
    assert parse_recipe("4bit") == parse_recipe(4) == ("4", Quantization(4, 64))
    assert parse_recipe("8", 128)[1] == Quantization(8, 128)
    assert parse_recipe("nvfp4")[1] == Quantization(4, 16, "nvfp4")


@pytest.mark.parametrize(
    ("recipe", "group"), [("7", None), ("q4", None), ("", None), (4, 48), ("mxfp4", 64), ("nvfp4", 32)]
)
def test_unknown_recipes(recipe, group):
    with pytest.raises(SettingError):
        parse_recipe(recipe, group)


def test_norms_stay_and_every_matrix_is_packed():
    recipe = parse_recipe(4)
    packed = {name for name, shape in SPEC.parameter_shapes().items() if quantization_of(recipe, SPEC, name, shape)}
    assert packed == {name for name in SPEC.parameter_shapes() if "norm" not in name}


def test_mixed_keeps_embedding_and_outer_layers_at_8_bits():
    recipe = parse_recipe("mixed")
    bits = {
        name: q.bits
        for name, shape in SPEC.parameter_shapes().items()
        if (q := quantization_of(recipe, SPEC, name, shape))
    }
    assert bits["transformer.token_embeddings.weight"] == 8
    by_layer = [bits[f"transformer.layers.{i}.ffn.proj_1.weight"] for i in range(16)]
    assert by_layer == [8, 8] + [4] * 12 + [8, 8]


def test_columns_that_are_no_whole_groups_stay():
    assert quantization_of(parse_recipe(4, 128), SPEC, "x.weight", (8, 192)) is None
    assert quantization_of(parse_recipe(4, 64), SPEC, "x.weight", (8, 192)) is not None


def test_stored_settings_and_exceptions():
    config = {"quantization": {"bits": 4, "group_size": 64, "a.b": {"bits": 8, "group_size": 32}, "c": False}}
    assert stored_quantization(config, "x", (8, 64), {}) == Quantization(4, 64)
    assert stored_quantization(config, "a.b", (8, 64), {}) == Quantization(8, 32)
    mxfp4 = {"mode": "mxfp4", "bits": 4, "group_size": 32, "r": {"group_size": 64, "bits": 8}, "s": {"bits": 3}}
    assert stored_quantization({"quantization": mxfp4}, "x", (8, 64), {}).mode == "mxfp4"
    # As MLX reads it: an entry without a mode is affine, whatever the model's is.
    assert stored_quantization({"quantization": mxfp4}, "r", (8, 64), {}) == Quantization(8, 64)
    assert stored_quantization({"quantization": mxfp4}, "s", (8, 64), {}) == Quantization(3, 64)


@pytest.mark.parametrize(
    "packing",
    [Quantization(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
    + [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")],
)
def test_what_is_not_named_is_read_from_the_tensors(packing):
    parts = packing.parts((3, 8, 384), "F16")
    entries = {f"a.{part}": TensorEntry(f"a.{part}", *each, Path("x"), 0, 0) for part, each in parts.items()}
    config = {"quantization": {"bits": 4, "group_size": 64, "a": False}}
    assert stored_quantization(config, "a", (3, 8, 384), entries) == packing


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_more_bits_and_smaller_groups_have_the_same_numbers(bits, group_size):
    weight = mx.random.normal((2, 6, 256), key=mx.random.key(0))
    packing = Quantization(bits, group_size)
    parts = packing.quantize(weight)
    for wide_bits in (each for each in (2, 3, 4, 5, 6, 8) if each >= bits):
        wide = Quantization(wide_bits, 32)
        others = {name: wider(packing, wide_bits, 32, name, part) for name, part in parts.items()}
        assert {name: part.shape for name, part in others.items()} == {
            name: shape for name, (_, shape) in wide.parts(weight.shape, "F32").items()
        }
        known = packing.dequantize(parts, mx.float32)
        assert mx.array_equal(wide.dequantize(others, mx.float32), known)


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        5,
        [],
        "x",
        {"bits": 9, "group_size": 64},
        {"bits": 4, "group_size": 63},
        {"mode": "int4"},
        {"mode": []},
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"bits": float("nan")},
        {"bits": [4]},
        {"group_size": {}},
        {"x": {"mode": 5}},
        {"x": {"bits": 10**30}},
        {"bits": 1, "mode": "mxfp4"},
    ],
)
def test_stored_settings_that_mlx_does_not_have(quantization):
    with pytest.raises(ConfigError):
        stored_quantization({"quantization": quantization}, "x", (8, 64), {})
