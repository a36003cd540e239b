"""Random gpt-oss checkpoints in OpenAI's layouts: the released sizes by their headers, small ones loaded and run."""

import math

import mlx.core as mx
import numpy as np
import pytest

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.layouts import understand
from openelm_mlx.checkpoint.reader import open_checkpoint, read_config
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.commands.info import gather
from openelm_mlx.errors import DestinationError, SettingError
from openelm_mlx.specs import spec_from_config

SMALL = {
    **released_gpt_oss_config("20b"), "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": 3,
}  # fmt: skip

# Model card, table 1 (arXiv 2508.10925), and the published index's total_size; the others by arithmetic.
RELEASED = {
    "20b": (20_914_757_184, 3_608_307_264, 13_761_264_768, {"openai-hf": 459, "openai-original": 363}),
    "120b": (116_829_156_672, 5_132_849_472, 65_248_815_744, {"openai-hf": 687, "openai-original": 543}),
}


@pytest.mark.parametrize("layout", ["openai-hf", "openai-original"])
@pytest.mark.parametrize("size", RELEASED)
def test_the_released_sizes_are_known_from_headers_to_the_byte(size, layout, tmp_path):
    parameters, active, nbytes, num_tensors = RELEASED[size]
    folder = write_random_gpt_oss(tmp_path / "sparse", released_gpt_oss_config(size), layout, sparse=True)
    facts = gather(str(folder))
    assert (facts["size"], facts["layout"]) == (size, layout)
    assert (facts["parameters"], facts["tensor_bytes"], facts["tensors"]) == (parameters, nbytes, num_tensors[layout])
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    contents = understand(checkpoint, config, spec_from_config(config))
    assert contents.spec.num_active_parameters() == active
    assert sum(file.stat().st_blocks * 512 for file in checkpoint.files) < 10**7  # holes
    first = checkpoint.files[0].name
    count = len(checkpoint.files) if layout == "openai-original" else len(checkpoint.files) - 1
    expected = f"model--00001-of-{count:05d}" if layout == "openai-original" else f"model-00000-of-{count:05d}"
    assert first == f"{expected}.safetensors"


@pytest.mark.parametrize("layout", ["openai-hf", "openai-original"])
def test_a_small_one_loads_and_gives_ordinary_numbers(layout, tmp_path):
    folder = write_random_gpt_oss(tmp_path / "small", SMALL, layout, max_file_bytes=100_000)
    model, _ = om.load(folder, dtype="float32")
    logits = model(mx.arange(40)[None])
    assert mx.all(mx.isfinite(logits)).item()
    assert 0.1 < mx.std(logits).item() < 10


def test_matrices_have_the_wanted_size(tmp_path):
    folder = write_random_gpt_oss(tmp_path / "small", SMALL)
    model, _ = om.load(folder, dtype="float32")
    experts = model.layers[0].mlp.experts.gate_up_proj
    weight = mx.dequantize(experts.weight, experts.scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    for matrix in (weight, model.layers[0].self_attn.qkv_proj.weight, model.lm_head.weight):
        # Scales are powers of two: within a factor of sqrt(2) of what was wanted.
        assert abs(math.log2(mx.std(matrix).item() * matrix.shape[-1] ** 0.5)) < 0.6


def test_both_layouts_of_a_seed_are_drawn_anew_and_a_seed_repeats(tmp_path):
    first = write_random_gpt_oss(tmp_path / "a", SMALL, seed=1) / "model.safetensors"
    second = write_random_gpt_oss(tmp_path / "b", SMALL, seed=1) / "model.safetensors"
    other = write_random_gpt_oss(tmp_path / "c", SMALL, seed=2) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert np.array(mx.load(str(first))["model.layers.0.mlp.experts.down_proj_scales"]).max() < 255


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(SettingError, match="20b and 120b"):
        released_gpt_oss_config("7b")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    for sparse in (False, True):
        with pytest.raises(DestinationError, match="there"):
            write_random_gpt_oss(tmp_path / "there", SMALL, sparse=sparse)
