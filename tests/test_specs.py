"""Configs in every spelling give the published shapes."""

import json
import sys

import pytest

from openelm_mlx.errors import ConfigError
from openelm_mlx.specs import layer_multipliers, make_divisible, openelm_config, spec_from_config

# apple/OpenELM model cards and corenet's table of sizes: parameters at vocabulary 32,000 (Hugging Face) and 32,128 (CoreNet).
PARAMETERS = {
    "270M": (271_527_168, 271_691_008),
    "450M": (457_179_136, 457_375_744),
    "1_1B": (1_079_891_456, 1_080_153_600),
    "3B": (3_036_647_424, 3_037_040_640),
}
KV_BYTES_PER_TOKEN = {"270M": 16_128, "450M": 23_296, "1_1B": 43_264, "3B": 83_968}
QUERY_HEADS = {
    "270M": [12] * 5 + [16] * 7 + [20] * 4,
    "450M": [12] * 3 + [16] * 7 + [20] * 6 + [24] * 4,
    "1_1B": [16] * 3 + [20] * 7 + [24] * 8 + [28] * 6 + [32] * 4,
    "3B": [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6,
}
FFN_270M = [768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120]


def mlx_config(size: str, vocab_size: int = 32128, instruct: bool = False) -> dict:
    """A config as Apple's MLX converter writes it."""
    name = f"OpenELM-{size}" + ("-Instruct" if instruct else "")
    return {"model_name": name, "vocab_size": vocab_size, "max_context_length": 2048}


def hf_config(size: str, vocab_size: int = 32000) -> dict:
    """A config as Apple's Hugging Face repositories have it: multiplier pairs as well as the computed lists."""
    spec = spec_from_config(mlx_config(size, vocab_size))
    return {
        "model_type": "openelm",
        "vocab_size": vocab_size,
        "max_context_length": 2048,
        "num_transformer_layers": len(spec.layers),
        "model_dim": spec.hidden_size,
        "head_dim": spec.layers[0].head_dim,
        "qkv_multipliers": [0.5, 1.0],
        "num_query_heads": QUERY_HEADS[size],
        "num_kv_heads": [heads // 4 for heads in QUERY_HEADS[size]],
        "num_gqa_groups": 4,
        "ffn_multipliers": layer_multipliers([0.5, 4.0], len(spec.layers), "ffn_multipliers"),
        "ffn_dim_divisor": 256,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rope_freq_constant": 10000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_at_both_vocabularies(size):
    for vocab_size, expected in zip((32000, 32128), PARAMETERS[size], strict=True):
        assert spec_from_config(mlx_config(size, vocab_size)).num_parameters() == expected
        assert spec_from_config(hf_config(size, vocab_size)).num_parameters() == expected


def test_counting_parameters_needs_no_arrays():
    assert "numpy" not in spec_from_config.__globals__
    assert "mx" not in sys.modules[spec_from_config.__module__].__dict__


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("size", PARAMETERS)
def test_layer_lists_of_all_eight_variants(size, instruct):
    layers = spec_from_config(mlx_config(size, instruct=instruct)).layers
    assert [layer.num_heads for layer in layers] == QUERY_HEADS[size]
    assert [layer.num_kv_heads for layer in layers] == [heads // 4 for heads in QUERY_HEADS[size]]
    assert spec_from_config(mlx_config(size)).size == size.replace("_", ".")
    if size == "270M":
        assert [layer.intermediate_size for layer in layers] == FFN_270M


@pytest.mark.parametrize("size", PARAMETERS)
def test_lists_and_multiplier_pairs_say_the_same(size):
    lists = hf_config(size)
    pairs = {key: value for key, value in lists.items() if key not in ("num_query_heads", "num_kv_heads")}
    pairs["ffn_multipliers"] = [0.5, 4.0]
    assert spec_from_config(lists).layers == spec_from_config(pairs).layers


@pytest.mark.parametrize("size", PARAMETERS)
def test_kv_cache_bytes(size):
    spec = spec_from_config(mlx_config(size))
    assert spec.kv_cache_bytes(1) == KV_BYTES_PER_TOKEN[size]
    assert spec.kv_cache_bytes(2048, itemsize=4, batch_size=3) == 2048 * 2 * 3 * KV_BYTES_PER_TOKEN[size]


def test_corenet_yaml_nests_the_model_and_pads_the_vocabulary():
    nested = {"model": {"language_modeling": {"general_gpt": {**mlx_config("270M"), "padding_index": 32000}}}}
    spec = spec_from_config(nested)
    assert (spec.vocab_size, spec.usable_vocab_size) == (32128, 32000)
    assert spec.layers == spec_from_config(mlx_config("270M")).layers


def test_fixture_configs_agree_with_their_corenet_twins(fixtures):
    for name in ("openelm_tiny", "openelm_untied"):
        apple = spec_from_config(json.loads((fixtures / name / "config.json").read_text()))
        corenet = spec_from_config(json.loads((fixtures / name / "corenet" / "corenet.json").read_text()))
        assert apple.layers == corenet.layers
        assert (corenet.vocab_size, corenet.usable_vocab_size) == (320, 300)
        assert apple.usable_vocab_size == apple.vocab_size == 300


@pytest.mark.parametrize("size", PARAMETERS)
def test_written_config_reads_back_and_mlx_lm_sees_the_same_widths(size):
    from mlx_lm.models.openelm import ModelArgs
    from mlx_lm.models.openelm import make_divisible as mlx_lm_make_divisible

    spec = spec_from_config(mlx_config(size, 32000))
    written = openelm_config(spec)
    again = spec_from_config(json.loads(json.dumps(written)))
    assert again.layers == spec.layers
    assert again.num_parameters() == spec.num_parameters()
    args = ModelArgs.from_dict(written)
    widths = [int(mlx_lm_make_divisible(m * args.model_dim, args.ffn_dim_divisor)) for m in args.ffn_multipliers]
    assert widths == [layer.intermediate_size for layer in spec.layers]


def test_one_number_makes_every_layer_equal_and_missing_groups_mean_pairs_of_heads():
    config = hf_config("270M") | {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0, "num_gqa_groups": None}
    for key in ("num_query_heads", "num_kv_heads"):
        del config[key]
    layers = spec_from_config(config).layers
    assert len(set(layers)) == 1
    assert layers[0].num_heads == layers[0].num_kv_heads == 20


def test_make_divisible_never_loses_more_than_a_tenth():
    assert make_divisible(640, 256) == 768
    assert make_divisible(100, 256) == 256
    assert make_divisible(378, 256) == 512  # 256 would be less than 90 % of 378


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_dim": None}, '"model_dim"'),
        ({"vocab_size": -3}, "-3"),
        ({"vocab_size": "many"}, "'many'"),
        ({"head_dim": 64.5}, "64.5"),
        ({"num_query_heads": [12, 16]}, "16 whole numbers"),
        ({"num_query_heads": [13] * 16}, "multiple"),
        ({"ffn_multipliers": [1, 2, 3]}, "3 values for 16 layers"),
        ({"ffn_multipliers": [0.5, -1]}, "above 0"),
        ({"ffn_multipliers": "wide"}, "'wide'"),
        ({"share_input_output_layers": None}, '"share_input_output_layers"'),
        ({"model_type": "llama"}, "'llama'"),
        ({"bos_token_id": 10**9}, "1000000000"),
        ({"eos_token_id": "x"}, "'x'"),
        ({"eos_token_id": [2, -1]}, "[2, -1]"),
        ({"activation_fn_name": "gelu"}, "'gelu'"),
        ({"normalization_layer_name": "layer_norm"}, "'layer_norm'"),
        ({"ffn_with_glu": False}, "False"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'"),
        ({"share_input_output_layers": "no"}, "'no'"),
        ({"rope_freq_constant": 0}, "rope_freq_constant"),
        ({"num_gqa_groups": "four", "num_query_heads": None}, "'four'"),
    ],
)
def test_wrong_configs_are_refused_with_the_field_and_value(change, said):
    config = {key: value for key, value in (hf_config("270M") | change).items() if value is not None}
    with pytest.raises(ConfigError) as error:
        spec_from_config(config)
    assert said in str(error.value)


def test_an_unknown_corenet_size_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"OpenELM-7B.*OpenELM-1_1B"):
        spec_from_config(mlx_config("7B"))


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match="list"):
        spec_from_config([])  # type: ignore[arg-type]
