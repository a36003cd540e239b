"""gpt-oss against OpenAI's and transformers' own code: float32 logits by every way to them, and what must not be wrong.

The slow, obvious form is tests/reference/gpt_oss.py, float64 NumPy. Mistakes that others have made are made here on
purpose: each must move the logits by more than the tolerance, or the tolerance would prove nothing.
"""

import dataclasses
import functools
import json
import math
import threading
import time
import urllib.request
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import config_of, in_threads, max_difference, oracle
from mlx import nn
from mlx.utils import tree_flatten
from reference import gpt_oss as reference
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.checkpoint.gpt_oss_layouts import gpt_oss_contents
from openelm_mlx.checkpoint.reader import SafetensorsCheckpoint
from openelm_mlx.errors import ConfigError
from openelm_mlx.models import build_model, precision
from openelm_mlx.models.attention import attend, block_mask, causal_mask, visible_keys
from openelm_mlx.models.gpt_oss import GptOss
from openelm_mlx.models.moe import Experts, Routes, clamped_swiglu
from openelm_mlx.models.norm import RMSNorm
from openelm_mlx.models.precision import runs_on_cpu
from openelm_mlx.models.rope import Rotation, rotary_periods, rotate, yarn_inverse_frequencies
from openelm_mlx.models.routing_ways import SORT_FROM_ROUTES
from openelm_mlx.specs import ModelSpec, YarnSpec, gpt_oss_config, spec_from_config

TOLERANCE = 1e-4
MODELS = ["gpt_oss_tiny", "gpt_oss_odd"]


def load_gpt_oss(folder, dtype=mx.float32, spec: ModelSpec | None = None) -> GptOss:
    """The fixture's model, by the spec of its config or by another one of the same shapes."""
    config = config_of(folder)
    spec = spec_from_config(config) if spec is None else spec
    checkpoint = SafetensorsCheckpoint([folder / "model.safetensors"])
    contents = gpt_oss_contents(checkpoint.entries, config, spec)
    model = build_model(spec)
    nn.quantize(model, class_predicate=lambda path, _: packing(contents, path))
    weights = []
    for name, assembly in contents.assemblies.items():
        arrays = [stored(folder, source.name) for source in assembly.sources]
        array = arrays[0] if assembly.make is None else assembly.make(*arrays)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(mx.float32 if spec.keeps_float32(name) else dtype)
        weights.append((name, array))
    model.load_weights(weights)
    return model


@functools.cache
def stored(folder, name):
    """A tensor of a fixture: most tests load the same ones."""
    return SafetensorsCheckpoint([folder / "model.safetensors"]).read(name)


def packing(contents, path):
    found = contents.quantized.get(path)
    return False if found is None else found.as_config()


@pytest.fixture(params=MODELS)
def folder(request, fixtures):
    return fixtures / request.param


@pytest.fixture
def tiny(fixtures):
    return fixtures / "gpt_oss_tiny"


# --- the same logits by every way -------------------------------------------------------------------------------------


def test_the_slow_form_is_right(folder):
    weights = reference.read_safetensors(folder / "model.safetensors")
    known = oracle(folder)
    logits = reference.forward(known["tokens"][0], weights, config_of(folder))
    assert np.abs(logits - known["logits_fp64"][0]).max() < 1e-10
    layer0 = "model.layers.0.mlp.experts."
    for part in ("gate_up", "down"):
        unpacked = reference.unpack_mxfp4(
            weights[f"{layer0}{part}_proj_blocks"], weights[f"{layer0}{part}_proj_scales"]
        )
        assert (unpacked == known[f"layer0_{part}_dequantized"]).all()


@pytest.mark.parametrize("layout", ["", "original"])
def test_whole_sequence(folder, layout):
    known = oracle(folder)
    logits = load_gpt_oss(folder / layout)(mx.array(known["tokens"]))
    assert logits.dtype == mx.float32
    assert max_difference(logits, known["logits_fp32"]) <= TOLERANCE
    assert max_difference(logits, known["logits_fp64"]) <= TOLERANCE


def test_each_layer_and_each_router(folder):
    """Where a wrong form would first show: the residual stream after every block, and the routers' logits."""
    known, model = oracle(folder), load_gpt_oss(folder)
    h = model.embed(mx.array(known["tokens"]))
    assert max_difference(h, known["hidden_fp32"][:, 0]) == 0
    for i, layer in enumerate(model.layers):
        mask = causal_mask(h.shape[1], 0, model.spec.layers[i].window)
        out = layer.self_attn.attend(*layer.before_attention(h, 0), mask, None)
        attended = h + layer.self_attn.o_proj(out.swapaxes(1, 2).reshape(*h.shape[:2], -1))
        router_logits = layer.mlp.router(layer.post_attention_layernorm.in_float32(attended))
        assert max_difference(router_logits, known["router_logits_fp32"][i]) <= TOLERANCE
        h = model.run_layers(h, start=i, stop=i + 1)
        assert max_difference(h, known["hidden_fp32"][:, i + 1]) <= TOLERANCE
    assert max_difference(model.head(h), known["logits_fp32"]) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 15, 16, 17, 32, 33, 39])
def test_in_chunks_and_token_by_token_past_the_window(folder, chunk):
    known, model = oracle(folder), load_gpt_oss(folder)
    logits, cache = in_chunks(model, known["tokens"], chunk)
    assert max_difference(logits, known["logits_fp32"]) <= TOLERANCE
    T = known["tokens"].shape[1]
    assert [layer.offset for layer in cache] == [T] * len(model.layers)
    # A sliding layer keeps its window and no more.
    windows = [layer.window for layer in model.spec.layers]
    assert [None if w is None else layer.keys.shape[2] for w, layer in zip(windows, cache, strict=True)] == windows


@pytest.mark.parametrize("prefill", [1, 7, 15, 16, 17, 19, 35])
def test_a_prompt_at_one_go_then_token_by_token(folder, prefill):
    known, model = oracle(folder), load_gpt_oss(folder)
    tokens, cache = mx.array(known["tokens"]), model.make_cache()
    logits = [model(tokens[:, :prefill], cache)]
    logits += [model(tokens[:, t : t + 1], cache) for t in range(prefill, tokens.shape[1])]
    assert max_difference(mx.concatenate(logits, axis=1), known["logits_fp32"]) <= TOLERANCE


@pytest.mark.parametrize("pieces", ["at one go", "in chunks", "token by token"])
def test_left_padded_batch_equals_single_rows(folder, pieces):
    """Rows of all lengths around the window in one batch; what stands in the padding must not matter."""
    known, model = oracle(folder), load_gpt_oss(folder)
    T = known["tokens"].shape[1]
    lengths = [T, T - 3, 17, 16, 9, 8, 1]
    padding = [T - length for length in lengths]
    batch = np.full((len(lengths), T), 3, dtype=np.int32)
    for i, length in enumerate(lengths):
        batch[i, T - length :] = known["tokens"][0, :length]
    if pieces == "at one go":
        logits = model(mx.array(batch), left_padding=mx.array(padding))
    else:
        logits, _ = in_chunks(model, batch, 7 if pieces == "in chunks" else 1, left_padding=padding)
    for i, length in enumerate(lengths):
        assert max_difference(logits[i, T - length :], known["logits_fp32"][0, :length]) <= TOLERANCE


@pytest.mark.slow
def test_the_long_prompt(fixtures):
    """3,000 tokens, in chunks through the cache and then one at a time: no argmax differs from PyTorch's."""
    folder = fixtures / "gpt_oss_long"
    known, model = oracle(folder), load_gpt_oss(folder)
    tokens, cache, best, logits_at = mx.array(known["tokens"]), model.make_cache(), [], {}
    start = 0
    for chunk in [250] * 11 + [240] + [1] * 10:
        logits = np.array(model(tokens[:, start : start + chunk], cache))[0]
        best.append(logits.argmax(-1))
        logits_at |= {start + i: row for i, row in enumerate(logits)}
        start += chunk
    assert start == 3000
    ours = np.stack([logits_at[p] for p in known["positions"]])
    assert np.abs(ours - known["logits_fp32"][0]).max() <= 1e-3
    assert (np.concatenate(best) == known["argmax"][0]).all()
    # Sliding layers have paid for their window only.
    assert [layer.keys.shape[2] for layer in cache] == [128, 3072, 128, 3072]


def in_chunks(model, tokens, chunk, **cache_options):
    tokens, cache = mx.array(tokens), model.make_cache(**cache_options)
    logits = [model(tokens[:, start : start + chunk], cache) for start in range(0, tokens.shape[1], chunk)]
    return mx.concatenate(logits, axis=1), cache


# --- mistakes that must show ------------------------------------------------------------------------------------------


def with_window(spec: ModelSpec, change: int) -> ModelSpec:
    layers = tuple(
        layer if layer.window is None else dataclasses.replace(layer, window=layer.window + change)
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers)


def with_yarn(spec: ModelSpec, **changes) -> ModelSpec:
    return dataclasses.replace(spec, yarn=dataclasses.replace(spec.yarn, **changes))


# What the mistake does to the logits of PyTorch's own code is at least this much on either model (measured there).
SPEC_MISTAKES = {
    "a window of one more": (lambda spec: with_window(spec, 1), 3.0),
    "a window of one less": (lambda spec: with_window(spec, -1), 3.0),
    "no window": (lambda spec: with_window(spec, 1000), 3.0),
    "no clamp": (lambda spec: dataclasses.replace(spec, swiglu_limit=math.inf), 0.2),
    "another alpha": (lambda spec: dataclasses.replace(spec, swiglu_alpha=1.0), 0.2),
    "rounded YaRN bounds": (lambda spec: with_yarn(spec, truncate=True), 0.01),
    "no concentration": (lambda spec: with_yarn(spec, concentration=1.0), 0.2),
    "no YaRN": (lambda spec: dataclasses.replace(spec, yarn=None), 0.2),
    "another epsilon": (lambda spec: dataclasses.replace(spec, norm_eps=1e-3), 1e-3),
}


@pytest.mark.parametrize("mistake", SPEC_MISTAKES)
def test_a_mistake_in_the_spec_shows(folder, mistake):
    make, least = SPEC_MISTAKES[mistake]
    known, spec = oracle(folder), make(spec_from_config(config_of(folder)))
    logits = load_gpt_oss(folder, spec=spec)(mx.array(known["tokens"]))
    assert max_difference(logits, known["logits_fp32"]) > least


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_wrong_window_shows_in_the_cache_where_it_begins(folder, change, chunk):
    """One more key is first seen by the query at position W, one less is missed by the one at W - 1."""
    known, spec = oracle(folder), spec_from_config(config_of(folder))
    logits, _ = in_chunks(load_gpt_oss(folder, spec=with_window(spec, change)), known["tokens"], chunk)
    wrong = np.abs(np.array(logits) - known["logits_fp32"])[0].max(axis=-1) > TOLERANCE
    assert int(wrong.argmax()) == spec.layers[0].window - (1 if change < 0 else 0)


def no_sinks(model):
    for layer in model.layers:
        layer.self_attn.sinks = mx.full(layer.self_attn.sinks.shape, -1e9)


def sinks_in_full_layers_only(model):
    for layer, spec in zip(model.layers, model.spec.layers, strict=True):
        if spec.window is not None:
            layer.self_attn.sinks = mx.full(layer.self_attn.sinks.shape, -1e9)


def scaled_sinks(model):
    for layer in model.layers:
        layer.self_attn.sinks = layer.self_attn.sinks * layer.self_attn.scale


def gate_and_up_exchanged(model):
    for layer in model.layers:
        projection = layer.mlp.experts.gate_up_proj
        for part in ("weight", "scales", "bias"):
            array = projection[part]
            halves = array.reshape(array.shape[0], -1, 2, *array.shape[2:])
            projection[part] = halves[:, :, ::-1].reshape(array.shape)


def softmax_before_top_k(model):
    for layer in model.layers:
        moe, route = layer.mlp, layer.mlp.route

        def wrong(x, moe=moe, route=route):
            indices, _ = route(x)
            return indices, mx.take_along_axis(mx.softmax(moe.router(x), axis=-1), indices, axis=-1)

        moe.route = wrong


def no_down_bias(model):
    for layer in model.layers:
        layer.mlp.experts.down_proj.bias *= 0


@pytest.mark.parametrize(
    "mistake",
    [no_sinks, sinks_in_full_layers_only, scaled_sinks, gate_and_up_exchanged, softmax_before_top_k, no_down_bias],
)
def test_a_mistake_in_the_model_shows(folder, mistake):
    known, model = oracle(folder), load_gpt_oss(folder)
    mistake(model)
    assert max_difference(model(mx.array(known["tokens"])), known["logits_fp32"]) > 0.1


def test_rounded_yarn_bounds_change_words_in_a_long_prompt(fixtures):
    """Short prompts hide it: not one argmax moves there."""
    known = oracle(fixtures / "gpt_oss_long")
    spec = with_yarn(spec_from_config(config_of(fixtures / "gpt_oss_long")), truncate=True)
    model = load_gpt_oss(fixtures / "gpt_oss_long", spec=spec)
    best = np.array(mx.argmax(in_chunks(model, known["tokens"][:, :600], 200)[0], axis=-1))
    assert (best != known["argmax"][:, :600]).sum() > 20  # 376 in all 3,000: docs/export.md
    for name in MODELS:
        known = oracle(fixtures / name)
        model = load_gpt_oss(
            fixtures / name, spec=with_yarn(spec_from_config(config_of(fixtures / name)), truncate=True)
        )
        best = np.array(mx.argmax(model(mx.array(known["tokens"])), axis=-1))
        assert (best == known["logits_fp32"].argmax(-1)).all()


# --- half precision ---------------------------------------------------------------------------------------------------


def test_bf16_error_is_no_larger_than_pytorchs(folder):
    """The rms over all logits, at most 1.25 times that of transformers; a largest difference would prove nothing."""
    known = oracle(folder)
    logits = np.array(load_gpt_oss(folder, mx.bfloat16)(mx.array(known["tokens"])).astype(mx.float32))
    ours, theirs = (rms(each - known["logits_fp32"]) for each in (logits, known["logits_bf16"]))
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_nothing_drifts_to_float32(tiny, dtype):
    """What a matrix is multiplied with has its type, and the float32 residual stream no numbers that the type lacks."""
    model = load_gpt_oss(tiny, dtype)
    tokens, cache = mx.array(oracle(tiny)["tokens"]), model.make_cache()
    h = model.embed(tokens)
    for i, layer in enumerate(model.layers):
        assert {each.dtype for each in layer.before_attention(h, 0)} == {dtype}
        h = model.run_layers(h, cache, i, i + 1)
        assert h.dtype == mx.float32
        assert mx.array_equal(h, h.astype(dtype).astype(mx.float32))
        assert cache[i].keys.dtype == cache[i].values.dtype == dtype
    assert model.head(h).dtype == dtype
    assert model(tokens[:, -1:], cache).dtype == dtype


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_yarn_frequencies_are_the_published_ones(fixtures):
    """20b's and 120b's table, from the formula with exact bounds; the fixtures' tables, from transformers."""
    yarn = YarnSpec(32.0, 4096, 32.0, 1.0, truncate=False, concentration=0.1 * math.log(32) + 1)
    exact = yarn_inverse_frequencies(64, 150000.0, yarn)
    known = {0: 1.0, 8: 0.050813274815461475, 9: 0.03170569618466377, 12: 0.006794959489732219,
             17: 0.00012931870124506317, 18: 3.8308812373753384e-05, 31: 3.0235114281192144e-07}  # fmt: skip
    assert [exact[i] for i in known] == pytest.approx(list(known.values()), rel=1e-12)
    rounded = yarn_inverse_frequencies(64, 150000.0, dataclasses.replace(yarn, truncate=True))
    ratios = [r / e for r, e in zip(rounded, exact, strict=True)]
    assert ratios[9:18] == pytest.approx(
        [0.99732086, 1.00599775, 1.01726544, 1.03248797, 1.05419065, 1.08763025, 1.14585651, 1.27265710, 1.76268238]
    )
    assert ratios[:9] + ratios[18:] == pytest.approx([1.0] * 23)
    for name in [*MODELS, "gpt_oss_long"]:
        spec = spec_from_config(config_of(fixtures / name))
        ours = yarn_inverse_frequencies(spec.layers[0].head_dim, spec.rope_theta, spec.yarn)
        assert np.abs(ours / oracle(fixtures / name)["rope_inv_freq"] - 1).max() < 1e-6
    assert yarn.concentration == pytest.approx(float(oracle(fixtures / MODELS[0])["rope_attention_scaling"]), abs=1e-7)


def test_rotation_by_periods():
    yarn = YarnSpec(32.0, 4096, truncate=False)
    x = np.random.default_rng(0).normal(size=(1, 3, 7, 32))
    ours = rotate(mx.array(x, mx.float32), 150000.0, 1000, rotary_periods(32, 150000.0, yarn))
    frequencies = reference.yarn_inverse_frequencies(32, 150000.0, 32.0, 4096, 32.0, 1.0)
    theirs = reference.rotate(x[0].swapaxes(0, 1), np.arange(1000, 1007), frequencies, 1.0).swapaxes(0, 1)
    assert np.abs(np.array(ours[0]) - theirs).max() < 1e-3  # float32 angles of 1000 radians
    assert rotary_periods(32, 150000.0, None) is None


@pytest.mark.parametrize("yarn", [None, YarnSpec(32.0, 4096, truncate=False)])
def test_a_model_s_rotation_is_the_plain_one_to_the_bit(yarn):
    rotation, periods = Rotation(150000.0, yarn), rotary_periods(32, 150000.0, yarn)
    x = mx.random.normal((2, 3, 7, 32), key=mx.random.key(0))
    # One offset after the other, also as arrays: a table made for another place would show.
    for offset in (0, 5, 5, mx.array(5), 6, mx.array(7), 2900, mx.array([3, 9])):
        for y in (x, x[:, :, :1], x.astype(mx.bfloat16)):
            assert mx.array_equal(rotation(y, offset), rotate(y, 150000.0, offset, periods)), offset


@pytest.mark.parametrize("yarn", [None, YarnSpec(32.0, 4096, truncate=False)])
def test_rows_at_positions_of_their_own_share_a_table(yarn, monkeypatch):
    """As the layers of a flat pass have them: one array of positions, one token a row, queries and fewer keys."""
    rotation, periods = Rotation(150000.0, yarn), rotary_periods(32, 150000.0, yarn)
    positions = mx.array([0, 131071, 7, 7, 2900])
    dtypes = mx.float32, mx.bfloat16
    queries, keys = (mx.random.normal((5, heads, 1, 32), key=mx.random.key(heads)) for heads in (4, 2))
    expected = [rotate(x.astype(t), 150000.0, positions, periods) for x in (queries, keys) for t in dtypes]
    if runs_on_cpu():
        monkeypatch.setattr("openelm_mlx.models.rope.rotate", None)  # all of it comes from the table
    found = [rotation(x.astype(t), positions) for x in (queries, keys) for t in dtypes]
    for ours, theirs in zip(found, expected, strict=True):
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_with_sinks(window, dtype):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, heads, 13, 16)) for heads in (6, 2, 2))
    sinks = rng.normal(size=6) * 2
    q, k, v, sinks = (np.array(mx.array(x).astype(dtype).astype(mx.float32), np.float64) for x in (q, k, v, sinks))
    ours = attend(
        *(mx.array(x).astype(dtype) for x in (q, k, v)), causal_mask(13, 0, window), None, mx.array(sinks).astype(dtype)
    )
    theirs = reference.attention(*(x[0].swapaxes(0, 1) for x in (q, k, v)), sinks, window).swapaxes(0, 1)
    assert ours.dtype == dtype
    assert max_difference(ours[0], theirs) < {mx.float32: 1e-6, mx.bfloat16: 1e-2, mx.float16: 1e-3}[dtype]


@pytest.mark.parametrize(
    ("window", "L", "offset"), [(1, 5, 0), (3, 6, 0), (3, 7, 2), (4, 8, 3), (4, 17, 40), (5, 12, 1)]
)
@pytest.mark.parametrize("keep", ["window", "all"])
@pytest.mark.parametrize("padding", [None, [0, 2, 9]])
def test_attention_in_blocks_equals_the_full_mask(window, L, offset, keep, padding):
    """With a cache that has kept only the window, or everything; rows padded on the left, even beyond the offset."""
    rng = np.random.default_rng(L)
    first = max(0, offset - window + 1) if keep == "window" else 0
    B = 1 if padding is None else len(padding)
    q, k, v = (mx.array(rng.normal(size=(B, heads, T, 8)), mx.float32)
               for heads, T in ((4, L), (2, offset + L - first), (2, offset + L - first)))  # fmt: skip
    sinks = mx.array(rng.normal(size=4), mx.float32)
    padding = None if padding is None else mx.array(padding)
    full = visible_keys(mx.arange(offset, offset + L), mx.arange(first, offset + L), window, padding)
    blocks = block_mask(L, offset, window, padding, first)
    assert blocks.visible.shape[-3:] == (-(-L // window), window, 2 * window)
    ours, theirs = attend(q, k, v, blocks, None, sinks), attend(q, k, v, full, None, sinks)
    assert max_difference(ours, np.array(theirs)) < 1e-6


def test_masks_take_the_cheapest_form():
    assert causal_mask(1, 9) is None
    assert causal_mask(5, 3) == "causal"
    assert causal_mask(5, 3, window=8) == "causal"
    assert causal_mask(2, 3, window=4).shape == (2, 5)
    assert causal_mask(2, 3, window=4, first=1) == "causal"
    assert causal_mask(9, 3, window=4).window == 4
    assert causal_mask(1, 9, window=4).shape == (1, 10)


def test_norm_rounds_once():
    """Gain included, in float32: in bf16 every element is the nearest one to the exact result."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(8, 512)) * 3).astype(mx.bfloat16)
    gain = mx.array(rng.uniform(0.5, 2.5, 512)).astype(mx.bfloat16)
    norm = RMSNorm(512, 1e-5)
    exact = reference.rms_norm(*(np.array(a.astype(mx.float32), np.float64) for a in (x, gain)), 1e-5)
    once = mx.array(exact).astype(mx.float32).astype(mx.bfloat16)
    for stored in (gain, gain.astype(mx.float32)):  # a loader may keep the gain in either type
        norm.weight = stored
        assert norm(x).dtype == mx.bfloat16
        assert norm.in_float32(x).dtype == mx.float32
        assert (norm(x) == once).mean() > 0.999
    assert (mx.fast.rms_norm(x, gain, 1e-5) == once).mean() < 0.9  # so the difference is there to be seen


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_swiglu(dtype):
    rng = np.random.default_rng(2)
    gate, up, gate_bias, up_bias = (mx.array(rng.normal(size=500) * 6).astype(dtype) for _ in range(4))
    g, u, gb, ub = (np.array(a.astype(mx.float32), np.float64) for a in (gate, up, gate_bias, up_bias))
    g, u = np.minimum(g + gb, 7.0), np.clip(u + ub, -7.0, 7.0)
    exact = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    ours = np.array(clamped_swiglu(gate, up, gate_bias, up_bias, 7.0, 1.702).astype(mx.float32))
    assert (g == 7.0).any()
    assert (u == -7.0).any()
    assert (g < -7.0).any()  # no lower clamp on the gate
    assert np.abs(ours - exact).max() <= (1e-5 if dtype == mx.float32 else 56 * 2**-8)
    assert np.abs(ours / exact - 1).max() <= (1e-4 if dtype == mx.float32 else 2**-8)


# --- experts ----------------------------------------------------------------------------------------------------------


def some_experts(folder, dtype=mx.float32):
    model = load_gpt_oss(folder, dtype)
    return model.layers[1].mlp, model.spec


def every_expert_one_by_one(moe, spec, x):
    """(N, hidden) through each row's chosen experts, in NumPy float64, by the router's own choice."""
    experts = moe.experts
    gate_up, down = (
        np.array(mx.dequantize(p.weight, p.scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32), np.float64)
        for p in (experts.gate_up_proj, experts.down_proj)
    )
    gate_up_bias, down_bias = (np.array(p.bias, np.float64) for p in (experts.gate_up_proj, experts.down_proj))
    logits = np.array(moe.router(x), np.float64)
    out = np.zeros(x.shape)
    for n, row in enumerate(np.array(x, np.float64)):
        chosen = np.argsort(-logits[n])[: spec.layers[0].experts_per_token]
        share = np.exp(logits[n, chosen])
        for e, weight in zip(chosen, share / share.sum(), strict=True):
            out[n] += weight * reference.expert(row, gate_up[e], gate_up_bias[e], down[e], down_bias[e], 7.0)
    return out


@pytest.mark.parametrize("tokens", [1, 2, SORT_FROM_ROUTES // 4 - 1, SORT_FROM_ROUTES // 4, 50])
def test_moe_sorted_or_not(tiny, tokens):
    moe, spec = some_experts(tiny)
    x = mx.array(np.random.default_rng(tokens).normal(size=(tokens, 64)), mx.float32)
    known = every_expert_one_by_one(moe, spec, x)
    for shape in ((1, tokens, 64), (tokens, 1, 64)):  # a prompt, and a batch of one token each
        assert max_difference(moe(x.reshape(shape), mx.float32).reshape(tokens, 64), known) < 1e-4


def test_sorting_starts_where_it_says(tiny, monkeypatch):
    moe, _spec = some_experts(tiny)
    promised = []
    feed_forward = Experts.feed_forward

    def spy(self, x, routes):
        promised.append(routes.is_sorted)
        assert not routes.is_sorted or np.all(np.diff(np.array(routes.experts)) >= 0)
        return feed_forward(self, x, routes)

    monkeypatch.setattr(Experts, "feed_forward", spy)
    for tokens in (1, 15, 16, 17):
        moe(mx.zeros((1, tokens, 64)), mx.float32)
    assert promised == [False, False, True, True]


@pytest.mark.parametrize("tokens", [3, 40])
def test_down_projection_with_more_rows_than_needed(tiny, tokens):
    """Rows up to a whole number of tiles hold anything and change nothing."""
    moe, _ = some_experts(tiny)
    x = mx.array(np.random.default_rng(0).normal(size=(1, tokens, 64)), mx.float32)
    plain = moe(x, mx.float32)
    down = moe.experts.down_proj
    for part in ("weight", "scales"):
        filler = mx.full((down[part].shape[0], 128 - 64, down[part].shape[2]), 77, down[part].dtype)
        down[part] = mx.concatenate([down[part], filler], axis=1)
    assert moe(x, mx.float32).shape == plain.shape
    assert mx.array_equal(moe(x, mx.float32), plain)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("tokens", [3, 40, 130])
def test_dense_experts_equal_packed_ones(tiny, dtype, tokens):
    """MXFP4 values are exact in bf16, so dequantized experts compute the same."""
    moe, spec = some_experts(tiny, dtype)
    x = mx.array(np.random.default_rng(0).normal(size=(1, tokens, 64)), mx.float32)
    packed = moe(x, dtype)
    dense = Experts(spec, spec.layers[1])
    for name in ("gate_up_proj", "down_proj"):
        projection, target = moe.experts[name], dense[name]
        target.bias = projection.bias
        target.weight = mx.dequantize(
            projection.weight, projection.scales, group_size=32, bits=4, mode="mxfp4", dtype=dtype
        )
    moe.experts = dense
    assert moe(x, dtype).dtype == (mx.float32 if tokens <= 128 else dtype)
    assert max_difference(moe(x, dtype), np.array(packed.astype(mx.float32))) <= (1e-5 if dtype == mx.float32 else 0.05)


def test_dense_experts_can_be_packed(tiny):
    """`nn.quantize` packs them in any of MLX's formats; affine with eight bits stays close."""
    _, spec = some_experts(tiny)
    dense = Experts(spec, spec.layers[1])
    rng = np.random.default_rng(0)
    dense.load_weights(
        [(n, mx.array(rng.normal(size=w.shape) / 8, mx.float32)) for n, w in tree_flatten(dense.parameters())]
    )
    x, indices = mx.array(rng.normal(size=(2, 3, 64)), mx.float32), mx.array([[[0, 1], [5, 2], [7, 7]]] * 2)
    known = np.array(dense(x, indices))
    holder = nn.Sequential(dense)
    nn.quantize(holder, group_size=32, bits=8)
    packed = holder.layers[0]
    assert packed.gate_up_proj.weight.dtype == mx.uint32
    assert 0 < max_difference(packed(x, indices), known) < 0.05


class TwoSlots:
    """Experts in as many slots as a call needs, in an order of their own: what a streamed model hands in."""

    def __init__(self, experts, num_slots):
        self.all, self.banks, self.num_slots = experts, None, num_slots

    def __call__(self, x, expert_indices):
        wanted = sorted(set(expert_indices.flatten().tolist()), reverse=True)
        assert len(wanted) <= self.num_slots
        self.banks = Experts.__new__(Experts)
        nn.Module.__init__(self.banks)
        self.banks.swiglu_limit, self.banks.swiglu_alpha = self.all.swiglu_limit, self.all.swiglu_alpha
        for name in ("gate_up_proj", "down_proj"):
            whole = self.all[name]
            weight, scales = whole.weight[mx.array(wanted)], whole.scales[mx.array(wanted)]
            self.banks[name] = type(whole)(weight, scales, None, whole.bias, 32, 4, "mxfp4")
        slot_of = mx.zeros(100, mx.int32)
        slot_of[mx.array(wanted)] = mx.arange(len(wanted))
        return self.banks.feed_forward(x[..., None, :], Routes(expert_indices, slot_of[expert_indices]))


def test_experts_can_be_replaced(folder):
    """An object that is not a module takes the experts' weights out of the tree, and gives the same logits bit for bit."""
    known, model = oracle(folder), load_gpt_oss(folder)
    tokens = mx.array(known["tokens"][:, :5])
    expected = model(tokens)
    before = len(tree_flatten(model.parameters()))
    for layer in model.layers:
        layer.mlp.experts = TwoSlots(layer.mlp.experts, 8)
    assert mx.array_equal(model(tokens), expected)
    assert len(tree_flatten(model.parameters())) == before - 6 * len(model.layers)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradients_flow_past_the_choice_of_experts(tiny, tokens, dtype):
    """What a tuner needs: finite gradients for attention, router and embedding, none for packed experts."""
    model, ids = load_gpt_oss(tiny, dtype), mx.array(oracle(tiny)["tokens"][:, :tokens])

    def loss(model):
        logits = model(ids[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")

    _, gradients = nn.value_and_grad(model, loss)(model)
    gradients = dict(tree_flatten(gradients))
    assert all(bool(mx.isfinite(g).all()) for g in gradients.values())
    for name in (
        "self_attn.qkv_proj.weight",
        "self_attn.sinks",
        "mlp.router.weight",
        "post_attention_layernorm.weight",
    ):
        assert float(mx.abs(gradients[f"model.layers.0.{name}"]).max()) > 0
    assert not any(".experts." in name and not name.endswith(".bias") for name in gradients)


def test_router_gradient_is_right(tiny):
    """Against a difference quotient, for the weights of the chosen experts."""
    moe, _ = some_experts(tiny)
    x = mx.array(np.random.default_rng(3).normal(size=(1, 4, 64)), mx.float32)

    def total(bias):
        moe.router.bias = bias
        return (moe(x, mx.float32) ** 2).sum()

    bias = moe.router.bias
    gradient = np.array(mx.grad(total)(bias))
    step = 1e-2
    for e in range(8):
        direction = mx.array(np.eye(8)[e] * step, mx.float32)
        slope = float(total(bias + direction) - total(bias - direction)) / (2 * step)
        assert slope == pytest.approx(gradient[e], rel=0.05, abs=0.5)


# --- configs and shapes -----------------------------------------------------------------------------------------------


def release_config(size: str) -> dict:
    """The config.json of openai/gpt-oss-20b or -120b, as far as it describes the model."""
    num_layers, num_experts = {"20b": (24, 32), "120b": (36, 128)}[size]
    return {
        "model_type": "gpt_oss", "num_hidden_layers": num_layers, "num_local_experts": num_experts,
        "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2), "max_position_embeddings": 131072,
        "initial_context_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 150000, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "attention_bias": True, "eos_token_id": 200002,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
    }  # fmt: skip


# arXiv 2508.10925, table 1, to its digits; bytes: metadata.total_size of the release's index (20b).
PUBLISHED = {
    "20b": {"total": 20_914_757_184, "active": 3_608_307_264, "bytes": 13_761_264_768, "float32": 2_353_728},
    "120b": {"total": 116_829_156_672, "active": 5_132_849_472, "bytes": 65_248_815_744, "float32": 13_485_888},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_of_the_releases(size):
    spec, published = spec_from_config(release_config(size)), PUBLISHED[size]
    assert spec.size == size
    assert spec.num_parameters() == published["total"]
    assert spec.num_active_parameters() == published["active"]
    shapes = spec.parameter_shapes()
    packed = sum(math.prod(s) for name, s in shapes.items() if ".experts." in name and name.endswith(".weight"))
    assert packed * 17 // 32 + 2 * (published["total"] - packed) == published["bytes"]
    assert sum(math.prod(s) for name, s in shapes.items() if spec.keeps_float32(name)) == published["float32"]
    assert spec.kv_cache_bytes(131_072) == {"20b": 3_221_225_472 + 3_145_728, "120b": 4_831_838_208 + 4_718_592}[size]
    assert (spec.context_length, spec.eos_tokens) == (131_072, (200002, 199999, 200012))
    assert [layer.window for layer in spec.layers[:3]] == [128, None, 128]


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_model_of_full_size_costs_nothing_before_it_is_loaded(size):
    """Every array is lazy, so building 120b takes no memory; its tree is what the spec says."""
    spec = spec_from_config(release_config(size))
    before = mx.get_active_memory()
    model = build_model(spec)
    tree = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert tree == spec.parameter_shapes()
    assert mx.get_active_memory() - before < 2**20


def test_spellings_of_a_config_give_one_spec(folder):
    config = config_of(folder)
    spec = spec_from_config(config)
    new = spec_from_config(config_of_file(folder / "config_transformers5.json"))
    original = spec_from_config(config_of_file(folder / "original" / "config.json"))
    without_types = spec_from_config({k: v for k, v in config.items() if k != "layer_types"})
    assert new == spec == without_types
    assert dataclasses.replace(original, eos_tokens=spec.eos_tokens) == spec  # it names no end
    assert spec_from_config(gpt_oss_config(spec)) == spec
    assert len(spec.layers) == config["num_hidden_layers"] == len(build_model(spec).layers)


def test_rotary_settings_in_every_spelling():
    config = release_config("20b")
    yarn = spec_from_config(config).yarn
    assert yarn == YarnSpec(32.0, 4096, 32.0, 1.0, truncate=False, concentration=1.3465735902799727)
    settings = config.pop("rope_scaling")
    assert spec_from_config(config).yarn == yarn  # transformers' class has these numbers as its default
    assert spec_from_config({**config, "rope_scaling": None}).yarn is None
    assert spec_from_config({**config, "rope_scaling": {"rope_type": "default"}}).yarn is None
    parameters = {**settings, "rope_theta": 1000}
    only_new = spec_from_config(
        {k: v for k, v in config.items() if k != "rope_theta"} | {"rope_parameters": parameters}
    )
    assert (only_new.yarn, only_new.rope_theta) == (yarn, 1000.0)
    # transformers rounds where the key is missing, and calls the type "type" in old files.
    silent = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert spec_from_config({**config, "rope_scaling": silent}).yarn == dataclasses.replace(yarn, truncate=True)
    told = spec_from_config({**config, "rope_scaling": {**settings, "attention_factor": 1.5}}).yarn
    assert told == dataclasses.replace(yarn, concentration=1.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"head_dim": None}, "head_dim"),
        ({"hidden_size": -1}, "-1"),
        ({"layer_types": ["sliding_attention"]}, "24 times"),
        ({"layer_types": ["linear_attention"] * 24}, "linear_attention"),
        ({"num_experts_per_tok": 33}, "33 experts"),
        ({"num_key_value_heads": 7}, "64 query heads for 7"),
        ({"attention_bias": False}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3"),
        ({"rope_scaling": {"full_attention": {"rope_type": "yarn"}}}, "one set"),
        ({"head_dim": 63}, "even"),
        ({"model_type": "mistral"}, "mistral"),
    ],
)
def test_configs_that_describe_no_model(changes, words):
    with pytest.raises(ConfigError, match=words):
        spec_from_config({**release_config("20b"), **changes})


def config_of_file(file) -> dict:
    return json.loads(file.read_text())


# --- mlx-lm -----------------------------------------------------------------------------------------------------------


def digits(vocab_size: int):
    """A tokenizer in mlx-lm's wrapper whose words are the ids themselves."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer), eos_token_ids=[vocab_size])


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The next `count` tokens, each from the whole sequence anew."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("step", [5, 2048])
def test_runs_inside_mlx_lms_loop(tiny, step):
    """Greedy tokens of mlx-lm's stream_generate, past the window, equal those of a loop without any cache."""
    from mlx_lm.generate import stream_generate

    model, prompt = load_gpt_oss(tiny), oracle(tiny)["tokens"][0, :30].tolist()
    chunks = stream_generate(model, digits(512), prompt, max_tokens=25, prefill_step_size=step)
    assert [chunk.token for chunk in chunks] == greedy(model, prompt, 25)


def test_takes_mlx_lms_caches(folder):
    """Those of its own gpt-oss: one that keeps everything, and a rotating one for the window."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    model, known = load_gpt_oss(folder), oracle(folder)
    windows = [layer.window for layer in model.spec.layers]
    cache = [KVCache() if window is None else RotatingKVCache(window) for window in windows]
    tokens = mx.array(known["tokens"])
    logits = [model(tokens[:, start:stop], cache) for start, stop in ((0, 20), (20, 27), (27, 28), (28, 29), (29, 40))]
    assert max_difference(mx.concatenate(logits, axis=1), known["logits_fp32"][:, :40]) <= TOLERANCE


def test_runs_inside_mlx_lms_server(tiny, monkeypatch):
    """Three completions over HTTP: a prompt, its continuation (mlx-lm's prompt store), and another prompt."""
    from mlx_lm import server

    model, tokenizer = load_gpt_oss(tiny), digits(512)
    monkeypatch.setattr(server, "load", lambda *_, **__: (model, tokenizer, config_of(tiny)))
    monkeypatch.setattr("sys.argv", ["mlx_lm.server", "--model", str(tiny), "--temp", "0", "--host", "127.0.0.1"])
    started: dict = {}

    class Server(server.ThreadingHTTPServer):
        def serve_forever(self, *args):
            started["server"] = self
            super().serve_forever(0.01)

    def run(host, port, response_generator):
        started["generator"] = response_generator
        started["run"](host, 0, response_generator, server_class=Server)

    started["run"] = server._run_http_server
    monkeypatch.setattr(server, "_run_http_server", run)
    thread = threading.Thread(target=server.main, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        while "server" not in started:
            time.sleep(0.01)
    known = oracle(tiny)["tokens"][0].tolist()
    first = known[:20]
    try:
        answer = greedy(model, first, 12)
        assert complete(started["server"].server_port, first, 12) == answer
        longer = [*first, *answer, *known[20:24]]
        assert complete(started["server"].server_port, longer, 6) == greedy(model, longer, 6)
        assert complete(started["server"].server_port, known[30:40], 6) == greedy(model, known[30:40], 6)
    finally:
        started["server"].shutdown()
        started["server"].server_close()
        started["generator"].stop_and_join()
        thread.join()


def complete(port: int, prompt: list[int], max_tokens: int) -> list[int]:
    body = {"prompt": " ".join(map(str, prompt)), "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return [int(word) for word in json.load(reply)["choices"][0]["text"].split()]


def test_the_form_of_cuda_is_the_same_sum(tiny, monkeypatch):
    """A bias added apart, and buffers with places to spare."""
    tokens = oracle(tiny)["tokens"][0].tolist()
    expected = load_gpt_oss(tiny)(mx.array([tokens]))[0]
    chosen = precision.KernelChoices(spare_places=8, bias_apart=True)
    monkeypatch.setattr("openelm_mlx.models.base.default_choices", lambda: chosen)
    model = load_gpt_oss(tiny)
    cache = model.make_cache()
    for token, logits in zip(tokens, expected, strict=True):
        assert mx.abs(model(mx.array([token]), cache=cache)[0] - logits).max().item() < 1e-4
    assert any(layer.keys.shape[2] % 256 == 8 for layer in cache)


def test_biases_of_a_few_experts_looked_up_together_are_those_looked_up_apart(tiny):
    """One table for both, of which the parameters are views; a bias that is replaced is seen."""
    moe, _ = some_experts(tiny)
    x = mx.array(np.random.default_rng(0).normal(size=(1, 3, 64)), mx.float32)
    apart = moe(x, mx.float32)
    biases = [np.array(each.bias) for each in (moe.experts.gate_up_proj, moe.experts.down_proj)]
    moe.eval()
    assert mx.array_equal(moe(x, mx.float32), apart)
    for module, bias in zip((moe.experts.gate_up_proj, moe.experts.down_proj), biases, strict=True):
        assert (np.array(module.bias) == bias).all()
    moe.experts.down_proj.bias = moe.experts.down_proj.bias + 1
    assert mx.allclose(moe(x, mx.float32), apart + 1, atol=1e-4)


def test_threads_have_tables_of_their_own():
    """What one thread has built and not evaluated another one cannot, and two may be in the model at once."""
    rotation = Rotation(10000.0)
    x = mx.random.normal((1, 2, 5, 8), key=mx.random.key(0))
    mx.eval(x)
    rotation(x, 3)
    found = in_threads(lambda _: np.array(rotation(x, 3)), count=1)
    assert np.array_equal(found[0], np.array(rotation(x, 3)))
    assert np.allclose(found[0], np.array(rotate(x, 10000.0, 3)), atol=1e-6)


@pytest.mark.parametrize("source", ["demo-gpt-oss", "demo-openelm"])
def test_two_threads_call_one_model(source):
    source = short_demo(source)
    model, _ = om.load(source)
    prompts = [[[7, 8, 9]], [[11, 12, 13]]]
    expected = [np.array(model(mx.array(each))) for each in prompts]
    model, _ = om.load(source)  # nothing of it has been used
    seen = in_threads(lambda i: [np.array(model(mx.array(prompts[i]))) for _ in range(20)])
    for rows, known in zip(seen, expected, strict=True):
        assert len(rows) == 20
        assert all(np.array_equal(each, known) for each in rows)
