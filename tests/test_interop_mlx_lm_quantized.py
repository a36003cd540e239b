"""What mlx-lm's own converter and quantizers write, for both families: it loads, and computes what mlx-lm computes."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import config_of, random_model, save_folder
from late_imports import late

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands import main
from openelm_mlx.errors import CheckpointError

TOKENS = [1, 5, 9, 200, 31, 77, 150, 8]
# Without YaRN, whose bounds mlx-lm rounds and the release does not.
GPT_OSS = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 3, "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A dense OpenELM, gpt-oss as OpenAI packs it, and gpt-oss dense, all as mlx-lm loads them."""
    place = tmp_path_factory.mktemp("sources")
    openelm = random_model(256, model_dim=128, head_dim=32, ffn_dim_divisor=128)
    packed = write_random_gpt_oss(place / "gpt_oss", GPT_OSS, "openai-hf")
    model, config = late("mlx_lm.utils:load_model")(packed)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            experts = layer.mlp.experts[name]
            weight = mx.dequantize(experts.weight, experts.scales, group_size=32, bits=4, mode="mxfp4")
            layer.mlp.experts[name] = plain_experts(weight, experts.bias)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    return {
        "openelm": save_folder(place / "openelm", openelm),
        "gpt_oss": packed,
        "gpt_oss_dense": written(place / "dense", model, config),
    }


def plain_experts(weight, bias):
    from mlx_lm.models.switch_layers import SwitchLinear

    experts = SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0])
    experts.weight, experts.bias = weight, bias
    return experts


def written(folder, model, config) -> Path:
    late("mlx_lm.utils:save_model")(folder, model)
    late("mlx_lm.utils:save_config")(dict(config), folder / "config.json")
    return folder


def converted(source: Path, folder: Path, **options) -> Path:
    """As `mlx_lm.convert -q` does it, in float32 so that only the packing rounds."""
    model, config = late("mlx_lm.utils:load_model")(source)
    model.set_dtype(mx.float32)
    recipe = options.pop("recipe", None)
    group_size, bits = options.pop("group_size", None), options.pop("bits", None)
    if recipe is not None:
        made = late("mlx_lm.convert:mixed_quant_predicate_builder")
        options["quant_predicate"] = made(recipe, model, group_size or 64)
    model, config = late("mlx_lm.utils:quantize_model")(model, config, group_size, bits, **options)
    return written(folder, model, config)


def same_logits(folder: Path, tolerance: float = 2e-4) -> None:
    theirs, _ = late("mlx_lm.utils:load_model")(folder)
    theirs.set_dtype(mx.float32)
    ours, _ = om.load(folder, dtype="float32")
    known = np.array(theirs(mx.array([TOKENS])))
    assert np.abs(np.array(ours(mx.array([TOKENS]))) - known).max() <= tolerance * np.abs(known).max()


RECIPES = [
    *({"bits": bits, "group_size": size} for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    {}, {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"},
    *({"recipe": name} for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")),
    {"recipe": "mixed_3_6", "group_size": 32},
]  # fmt: skip


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("family", ["openelm", "gpt_oss", "gpt_oss_dense"])
def test_every_mode_and_recipe(sources, tmp_path, family, recipe):
    if "recipe" in recipe and family == "openelm":
        with pytest.raises(ValueError, match="expected keys"):  # mlx-lm has none for OpenELM's names
            converted(sources[family], tmp_path / "q", **recipe)
        return
    same_logits(converted(sources[family], tmp_path / "q", **recipe))


def test_the_config_of_mlx_lm_s_own_conversions(sources, tmp_path):
    folder = converted(sources["gpt_oss"], tmp_path / "q", mode="mxfp4")
    quantization = config_of(folder)["quantization"]
    assert quantization["mode"] == "mxfp4"
    assert quantization["model.layers.0.mlp.router"] == {"group_size": 64, "bits": 8}
    assert config_of(folder)["quantization_config"] == quantization


def each_its_own(path, module):
    """As the learned and searched quantizations write it: settings by module, and false for what stays."""
    number = sum(map(ord, path))
    if number % 7 == 0:
        return False
    settings = {"bits": (3, 4, 6, 8)[number % 4], "group_size": (32, 64)[number % 2]}
    return settings | ({"mode": "affine"} if number % 3 else {})


@pytest.mark.parametrize("family", ["openelm", "gpt_oss", "gpt_oss_dense"])
def test_settings_by_module(sources, tmp_path, family):
    folder = converted(sources[family], tmp_path / "q", quant_predicate=each_its_own)
    same_logits(folder)
    config = config_of(folder)
    config["quantization"] |= {"model.norm": False, "transformer.norm": False}  # false is said of what was never packed
    (folder / "config.json").write_text(json.dumps(config))
    same_logits(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    same_logits(folder)


def test_modules_that_the_config_does_not_name(sources, tmp_path):
    """mlx-lm goes by their tensors, and so do we: the settings for all are another mode's."""
    folder = converted(sources["gpt_oss"], tmp_path / "q", mode="mxfp8")
    config = config_of(folder)
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    same_logits(folder)


def test_experts_with_a_scale_each(sources, tmp_path):
    """nvfp4 with a second scale an expert: unpacked as it is read, to 16 bits."""
    folder = converted(sources["gpt_oss_dense"], tmp_path / "q", mode="nvfp4", global_scale=True)
    stored = mx.load(str(folder / "model.safetensors"))
    prefix = "model.layers.0.mlp.experts."
    ours = om.load(folder, dtype="float32")[0].layers[0].mlp.experts.gate_up_proj.weight
    for number, name in enumerate(("gate_proj", "up_proj")):
        weight, scales, largest = (stored[f"{prefix}{name}.{part}"] for part in ("weight", "scales", "global_scale"))
        for expert in range(4):
            known = mx.dequantize(weight[expert], scales[expert], global_scale=largest[expert], mode="nvfp4")
            assert mx.allclose(ours[expert, number::2], known, rtol=1e-2)


def test_settings_that_contradict_the_tensors_are_refused(sources, tmp_path):
    folder = converted(sources["openelm"], tmp_path / "q", bits=4)
    config = config_of(folder)
    config["quantization"]["transformer.layers.0.attn.qkv_proj"] = {"bits": 8, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight.*shape"):
        om.load(folder)


@pytest.mark.parametrize("recipe", [{"mode": "mxfp4"}, {"recipe": "mixed_3_6"}], ids=str)
def test_our_converter_reads_it_and_both_read_what_it_writes(sources, tmp_path, recipe):
    folder = converted(sources["gpt_oss"], tmp_path / "q", **recipe)
    om.convert(folder, tmp_path / "ours")
    first, second = om.load(folder, dtype="float32")[0], om.load(tmp_path / "ours", dtype="float32")[0]
    assert mx.allclose(first(mx.array([TOKENS])), second(mx.array([TOKENS])), atol=1e-4)
    assert main(["info", str(folder)]) == 0
