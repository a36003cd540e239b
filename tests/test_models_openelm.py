"""OpenELM against Apple's and CoreNet's own code: float32 logits by every way to them, half precision by rms error.

The slow, obvious form beside the caches is the whole sequence at one go.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_fixture, max_difference, oracle, random_model

from openelm_mlx.decoding.sampling import Sampler, SamplingParams
from openelm_mlx.models import build_model
from openelm_mlx.models.attention import visible_keys
from openelm_mlx.specs import spec_from_config

TOLERANCE = 5e-5
MODELS = ["openelm_tiny", "openelm_untied"]


@pytest.fixture(params=MODELS)
def folder(request, fixtures):
    return fixtures / request.param


def test_whole_sequence(folder):
    known = oracle(folder)
    assert max_difference(load_fixture(folder)(mx.array(known["tokens"])), known["logits_fp32"]) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 7, 17, 23, 24])
def test_in_chunks_and_token_by_token(folder, chunk):
    known, model = oracle(folder), load_fixture(folder)
    cache, logits, tokens = model.make_cache(), [], mx.array(known["tokens"])
    for start in range(0, tokens.shape[1], chunk):
        logits.append(model(tokens[:, start : start + chunk], cache=cache))
    logits = mx.concatenate(logits, axis=1)
    assert max_difference(logits, known["logits_fp32"]) <= TOLERANCE
    assert max_difference(logits, known["logits_cached_fp32"]) <= TOLERANCE


def test_cache_that_grows_past_its_first_buffer(folder):
    model = load_fixture(folder)
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (1, 600)))
    cache = model.make_cache()
    parts = [model(tokens[:, :250], cache), model(tokens[:, 250:251], cache), model(tokens[:, 251:600], cache)]
    assert max_difference(mx.concatenate(parts, axis=1), np.array(model(tokens))) <= TOLERANCE
    assert all(layer.offset == 600 and layer.keys.shape[2] % 256 == 0 for layer in cache)


@pytest.mark.parametrize("cached", [False, True])
def test_left_padded_batch_equals_single_rows(folder, cached):
    """Rows of 24, 19, 10 and 1 tokens in one batch; what stands in the padding must not matter."""
    known, model = oracle(folder), load_fixture(folder)
    lengths = [24, 19, 10, 1]
    padding = [24 - length for length in lengths]
    row = known["tokens"][0]
    batch = np.full((4, 24), 7, dtype=np.int32)
    for i, length in enumerate(lengths):
        batch[i, 24 - length :] = row[:length]
    tokens = mx.array(batch)
    if cached:
        cache = model.make_cache(left_padding=padding)
        parts = [model(tokens[:, :9], cache), model(tokens[:, 9:23], cache), model(tokens[:, 23:], cache)]
        logits = mx.concatenate(parts, axis=1)
    else:
        logits = model(tokens, left_padding=mx.array(padding))
    for i, length in enumerate(lengths):
        assert max_difference(logits[i, 24 - length :], known["logits_fp32"][0, :length]) <= TOLERANCE


def test_each_step_of_each_layer(folder):
    """Where a wrong form would first show: inputs and outputs of every block."""
    known, model = oracle(folder), load_fixture(folder)
    h = model.embed(mx.array(known["tokens"]))
    for i, layer in enumerate(model.layers):
        normed = layer.attn_norm(h)
        assert max_difference(normed, known[f"layer{i}_attn_norm_fp32"]) <= TOLERANCE
        out = layer.attn.attend(*layer.attn.project(normed, 0), "causal", None)
        attended = layer.attn.out_proj(out.swapaxes(1, 2).reshape(*h.shape[:2], -1))
        assert max_difference(attended, known[f"layer{i}_attn_fp32"]) <= TOLERANCE
        assert max_difference(layer.ffn(layer.ffn_norm(h + attended)), known[f"layer{i}_ffn_fp32"]) <= TOLERANCE
        h = layer(h, "causal", None)
        assert max_difference(h, known[f"layer{i}_out_fp32"]) <= TOLERANCE
    assert max_difference(model.transformer.norm(h), known["final_norm_fp32"]) <= TOLERANCE


def test_layers_in_two_parts_equal_the_plain_call(folder):
    model, tokens = load_fixture(folder), mx.array(oracle(folder)["tokens"])
    cache = model.make_cache()
    h = model.run_layers(model.embed(tokens), cache, 0, 1)
    h = model.run_layers(h, cache, 1)
    assert mx.array_equal(model.head(h), model(tokens))


@pytest.mark.parametrize(("dtype", "theirs"), [(mx.bfloat16, "logits_bf16"), (mx.float16, "logits_fp16")])
def test_half_precision_is_as_close_as_pytorch(folder, dtype, theirs):
    known = oracle(folder)
    logits = np.array(load_fixture(folder, dtype)(mx.array(known["tokens"])).astype(mx.float32))
    rms = float(np.sqrt(np.mean((logits - known["logits_fp32"]) ** 2)))
    pytorch = float(np.sqrt(np.mean((known[theirs] - known["logits_fp32"]) ** 2)))
    assert rms <= 1.25 * pytorch


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_the_residual_stream_keeps_its_type(folder, dtype):
    model = load_fixture(folder, dtype)
    tokens = mx.array(oracle(folder)["tokens"])
    assert model.run_layers(model.embed(tokens), model.make_cache()).dtype == dtype
    assert model(tokens).dtype == dtype


def test_corenet_rows_of_vocabulary(folder):
    known = oracle(folder)
    logits = load_fixture(folder / "corenet")(mx.array(known["tokens"]))
    assert logits.shape[-1] == 320
    assert max_difference(logits, known["logits_corenet_fp32"]) <= TOLERANCE
    assert max_difference(logits[..., :300], known["logits_fp32"]) <= TOLERANCE


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_tokens(fixtures, penalty):
    """Prompt of 17 tokens, 16 greedy ones; with the repetition penalty of Apple's model card, over prompt and answer."""
    known, model = oracle(fixtures / "openelm_tiny"), load_fixture(fixtures / "openelm_tiny")
    expected = known["greedy_tokens" if penalty == 1.0 else "greedy_tokens_repetition_penalty_1_2"][0].tolist()
    tokens = expected[:17]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), 300, 300, tokens)
    cache = model.make_cache()
    logits = model(mx.array([tokens]), cache)[0, -1]
    for _ in range(16):
        tokens.append(sampler(logits).item())
        logits = model(mx.array([tokens[-1:]]), cache)[0, -1]
    assert tokens == expected


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_corenet_adapters(fixtures, kind):
    """The tied head goes on using the embedding without its adapter."""
    folder = fixtures / "openelm_lora" / kind
    known = oracle(folder)
    logits = load_fixture(folder)(mx.array(known["tokens"]))
    assert max_difference(logits, known["logits_fp32"]) <= TOLERANCE
    base = load_fixture(fixtures / "openelm_lora")(mx.array(known["tokens"]))
    assert max_difference(base, known["logits_without_adapter_fp32"][..., : base.shape[-1]]) <= TOLERANCE


def test_adapters_with_ranks_and_factors_of_their_own(fixtures, tmp_path):
    """rsLoRA, whose factor is alpha / sqrt(r): PEFT's adapter of one layer, spelled as CoreNet stores one."""
    folder = fixtures / "openelm_lora" / "patterns"
    weights = mx.load(str(fixtures / "openelm_untied" / "model.safetensors"))
    weights = {name.removeprefix("transformer."): weights[name] for name in weights if name != "lm_head.weight"}
    for name, value in mx.load(str(folder / "adapter_model.safetensors")).items():
        module, which = name.removeprefix("base_model.model.transformer.").removesuffix(".weight").rsplit(".", 1)
        weights[f"{module}.{which}.lora.weight"] = value
        if f"{module}.weight" in weights:
            weights[f"{module}.base_layer.weight"] = weights.pop(f"{module}.weight")
    mx.save_safetensors(str(tmp_path / "corenet.safetensors"), weights)
    base = json.loads((fixtures / "openelm_untied" / "config.json").read_text())
    settings = [(".*proj_1.*", 2, 16), (".*out_proj.*", 8, 4), (".*qkv_proj.*", 8, 16), (".*proj_2.*", 8, 16)]
    lora = [{"regex": regex, "params": {"r": r, "lora_alpha": a, "use_rslora": True}} for regex, r, a in settings]
    config = {"base": {**base, "model_name": "OpenELM-untied"}, "lora": {"config": lora}}
    (tmp_path / "corenet.json").write_text(json.dumps(config))
    known = oracle(folder)
    logits = load_fixture(tmp_path)(mx.array(known["tokens"]))
    assert max_difference(logits, known["logits_final"]) <= 1e-4


@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("chunk", [1, 2, 5, 24])
def test_sliding_window_equals_a_masked_whole_sequence(folder, window, chunk):
    known, model = oracle(folder), load_fixture(folder)
    tokens = mx.array(known["tokens"])
    positions = mx.arange(24)
    h = model.embed(tokens)
    for layer in model.layers:
        h = layer(h, visible_keys(positions, positions, window), None)
    cache = model.make_cache(window=window)
    logits = [model(tokens[:, start : start + chunk], cache) for start in range(0, 24, chunk)]
    assert max_difference(mx.concatenate(logits, axis=1), np.array(model.head(h))) <= TOLERANCE
    assert all(
        layer.nbytes == 2 * 2 * s.num_kv_heads * s.head_dim * window * 4
        for layer, s in zip(cache, model.spec.layers, strict=True)
    )


@pytest.mark.parametrize("size", ["270M", "450M", "1_1B", "3B"])
def test_the_module_has_exactly_the_spec_s_parameters(size):
    """MLX is lazy: a 3B module is built without allocating its weights."""
    before = mx.get_active_memory()
    spec = spec_from_config({"model_name": f"OpenELM-{size}", "vocab_size": 32000, "max_context_length": 2048})
    model = build_model(spec)
    from mlx.utils import tree_flatten

    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert shapes == spec.parameter_shapes()
    assert mx.get_active_memory() - before < 1e6


def test_cache_bytes_are_the_spec_s(folder):
    model = load_fixture(folder)
    cache = model.make_cache()
    model(mx.zeros((2, 256), mx.int32), cache)
    assert sum(layer.nbytes for layer in cache) == model.spec.kv_cache_bytes(256, itemsize=4, batch_size=2)


def test_gains_of_queries_and_keys_may_be_replaced():
    tokens = mx.array([[1, 2, 3, 4]])
    model = random_model()
    before = model(tokens)
    for name in ("q_norm", "k_norm"):
        norm = getattr(model.layers[0].attn, name)
        norm.weight = 2 * norm.weight
        fresh = random_model()
        fresh.update(model.parameters())
        after = model(tokens)
        assert mx.array_equal(after, fresh(tokens))
        assert not mx.array_equal(after, before)
        before = after


def test_a_residual_added_inside_the_product_is_the_same_sum(monkeypatch):
    """The form of Metal, which the CPU can compute too."""
    model = random_model()
    tokens = mx.array([[5, 6, 7, 8]])
    plain = model(tokens)
    for layer in model.layers:
        layer.fuse_residual_add = True
    assert max_difference(model(tokens), np.array(plain)) <= 2e-5
    counted = []
    real = mx.addmm
    monkeypatch.setattr(mx, "addmm", lambda *a, **k: counted.append(1) or real(*a, **k))
    model(tokens)
    assert len(counted) == 2 * len(model.layers)
