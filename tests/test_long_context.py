"""131,072 tokens through gpt-oss's prefill and decode, within the plan, and logits equal to a reference row by row.

The reference is float64 NumPy and computes only what the wanted rows need: a sliding layer the windows before them, a full
layer their own queries over all keys. With layers sliding, full the prefill itself needs no attention of the last layer,
so rows and whole chunks of it are asked for on purpose; with one more layer behind, every pair of tokens is multiplied:
at 131,072 tokens that takes minutes, and runs when OPENELM_MLX_LONG is set, as .ci/run does.
"""

import dataclasses
import os

import mlx.core as mx
import numpy as np
import pytest
from reference import gpt_oss as reference

import openelm_mlx as om
from openelm_mlx.bench.random_gpt_oss import write_random_gpt_oss
from openelm_mlx.checkpoint.released import released_gpt_oss_config
from openelm_mlx.decoding.budget import keeping_to_plan
from openelm_mlx.decoding.prefill import prefill
from openelm_mlx.memory.scratch import pass_bytes
from openelm_mlx.runtime import runtime_of
from openelm_mlx.specs import spec_from_config

WINDOW, CONTEXT = 16, 131_072
CONFIG = {
    **released_gpt_oss_config("20b"), "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 320,
    "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1, "sliding_window": WINDOW,
    "eos_token_id": 3, "max_position_embeddings": CONTEXT,
}  # fmt: skip
TOLERANCE = 5e-4


def make(folder, kinds: str, num_heads: int):
    """A random model whose layers are sliding (s) or full (f); its folder."""
    types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    config = {**CONFIG, "num_hidden_layers": len(kinds), "layer_types": types, "num_attention_heads": num_heads}
    return write_random_gpt_oss(folder, config), config


def rows_of(tokens, wanted, folder, config):
    """Logits (len(wanted), V) of the positions `wanted`, each layer only where it is needed."""
    weights = reference.read_safetensors(folder / "model.safetensors")
    windows = [WINDOW if kind == "sliding_attention" else None for kind in config["layer_types"]]
    needed = [np.unique(wanted)]
    for window in reversed(windows):
        last = needed[0]
        seen = (
            np.arange(last[-1] + 1)
            if window is None
            else np.unique(np.clip(last[:, None] - np.arange(window), 0, None))
        )
        needed.insert(0, seen)
    h = weights["model.embed_tokens.weight"][tokens[needed[0]]]
    for i, window in enumerate(windows):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        h = layer_rows(h, needed[i], needed[i + 1], w, window, config)
    h = h[np.searchsorted(needed[-1], wanted)]
    return reference.rms_norm(h, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T


def layer_rows(h, positions, wanted, w, window, config):
    """The stream after a layer at `wanted`, of the stream before it at `positions`, which has all that they see."""
    D, eps, yarn = config["head_dim"], config["rms_norm_eps"], config["rope_scaling"]
    frequencies = reference.yarn_inverse_frequencies(
        D, config["rope_theta"], yarn["factor"], yarn["original_max_position_embeddings"], yarn["beta_fast"],
        yarn["beta_slow"], yarn["truncate"],
    )  # fmt: skip
    concentration = 0.1 * np.log(yarn["factor"]) + 1
    x = reference.rms_norm(h, w["input_layernorm.weight"], eps)
    rows = np.searchsorted(positions, wanted)

    def project(x, name, at=None):
        y = (x @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]).reshape(len(x), -1, D)
        return y if at is None else rotate(y, at, frequencies, concentration)

    queries, keys, values = project(x[rows], "q", wanted), project(x, "k", positions)[:, 0], project(x, "v")[:, 0]
    out = np.zeros(queries.shape)
    for block in np.array_split(np.arange(len(wanted)), -(-len(wanted) // (8192 if window else 8))):
        if window is None:
            seen = np.broadcast_to(np.arange(len(positions)), (len(block), len(positions)))
            visible = positions[seen] <= wanted[block, None]
        else:
            at = wanted[block, None] - np.arange(window)
            seen, visible = np.searchsorted(positions, np.clip(at, 0, None)), at >= 0
        scores = np.einsum("rhd,rtd->rht", queries[block], keys[seen]) / np.sqrt(D)
        scores = np.where(visible[:, None], scores, -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), w["self_attn.sinks"][:, None])
        probs = np.exp(scores - top)
        total = probs.sum(-1, keepdims=True) + np.exp(w["self_attn.sinks"][:, None] - top)
        out[block] = np.einsum("rht,rtd->rhd", probs / total, values[seen])
    h = h[rows] + out.reshape(len(wanted), -1) @ w["self_attn.o_proj.weight"].T + w["self_attn.o_proj.bias"]
    return h + experts_of(reference.rms_norm(h, w["post_attention_layernorm.weight"], eps), w, config)


def rotate(x, positions, frequencies, concentration):
    """`reference.rotate` with angles in float32, as gpt-oss has them: at position 131,072 that is 0.004 radians."""
    inverse = np.float32(1) / (1 / frequencies).astype(np.float32)
    angles = (positions[:, None, None].astype(np.float32) * inverse).astype(np.float64)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles) * concentration, np.sin(angles) * concentration
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def experts_of(x, w, config):
    """The mixture of experts of x (T, hidden_size): every expert over all rows, then each row's own shares."""
    gate_up, down = (
        reference.unpack_mxfp4(w[f"mlp.experts.{p}_proj_blocks"], w[f"mlp.experts.{p}_proj_scales"])
        for p in ("gate_up", "down")
    )
    logits = x @ w["mlp.router.weight"].T + w["mlp.router.bias"]
    last = np.sort(logits, axis=1)[:, [-config["num_experts_per_tok"]]]
    shares = np.where(logits >= last, np.exp(logits - logits.max(1, keepdims=True)), 0)
    shares /= shares.sum(1, keepdims=True)
    out = np.zeros_like(x)
    for e in range(len(gate_up)):
        z = x @ gate_up[e].T + w["mlp.experts.gate_up_proj_bias"][e]
        gate = np.minimum(z[:, 0::2], config["swiglu_limit"])
        up = np.clip(z[:, 1::2], -config["swiglu_limit"], config["swiglu_limit"])
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        out += shares[:, [e]] * (hidden @ down[e].T + w["mlp.experts.down_proj_bias"][e])
    return out


@pytest.mark.parametrize("kinds", ["sf", "sfs", "fs"])
def test_the_rows_are_those_of_the_slow_form(tmp_path, kinds):
    folder, config = make(tmp_path / "m", kinds, 2)
    tokens = np.random.default_rng(0).integers(0, 320, 70)
    whole = reference.forward(tokens, reference.read_safetensors(folder / "model.safetensors"), config)
    wanted = np.array([0, 5, 15, 16, 17, 40, 69])
    assert np.abs(rows_of(tokens, wanted, folder, config) - whole[wanted]).max() < 1e-5


def run(folder, config, num_tokens, chunk, num_decoded, chunks_at):
    """Prefill to some positions, whole chunks here and there, decode to the end; {position: logits} and the peak."""
    memory = mx.get_active_memory()
    model, _ = om.load(folder, dtype="float32", context_length=num_tokens)
    plan = om.plan(folder, dtype="float32", context_length=num_tokens, prefill_chunk=chunk)
    runtime_of(model).plan = dataclasses.replace(
        plan, budget_bytes=memory + plan.total_bytes
    )  # no more than was predicted
    tokens = np.random.default_rng(1).integers(0, 320, num_tokens)
    rows, start = {}, 0
    cache = model.make_cache()
    with keeping_to_plan(model, cache) as (budget, held):
        for stop in sorted({*chunks_at, num_tokens - num_decoded}):
            logits = prefill(model, tokens[start:stop].tolist(), cache, chunk, budget)
            rows[stop - 1] = np.array(logits)
            start = stop
            if stop in chunks_at:  # all logits of a chunk, the full layer's attention with them
                logits = model(mx.array(tokens[stop : stop + 48])[None], cache)[0]
                rows |= {stop + i: np.array(logits[i]) for i in (0, 20, 47)}
                start = stop + 48
        for position in range(start, num_tokens):
            budget.before_tokens(64, 64 + num_tokens - position)
            logits = model(mx.array(tokens[position : position + 1])[None], cache)[0, -1]
            rows[position] = np.array(logits)
        peak = held.peak_memory_bytes() - memory
    assert {layer.offset for layer in cache} == {num_tokens}
    return tokens, rows, plan, peak, cache


def check(folder, config, num_tokens, chunk, num_decoded, chunks_at):
    tokens, rows, plan, peak, cache = run(folder, config, num_tokens, chunk, num_decoded, chunks_at)
    wanted = np.array(sorted(rows))
    expected = rows_of(tokens, wanted, folder, config)
    ours = np.stack([rows[position] for position in wanted])
    assert wanted[-1] == num_tokens - 1
    assert np.abs(ours - expected).max() < TOLERANCE < expected.std() / 200
    assert sum(layer.nbytes for layer in cache) == plan.kv_cache_bytes
    print(f"peak {peak:,} of {plan.total_bytes:,}, error {np.abs(ours - expected).max():.1e}")
    # The chunks that were asked for whole take more than a prompt's, which has no attention in the last layer.
    whole = pass_bytes(spec_from_config(config), 48, max(chunks_at), 4, "cpu")
    assert peak <= plan.total_bytes + max(0, int(1.02 * whole) - plan.scratch_bytes), (
        f"{peak:,} of {plan.total_bytes:,}"
    )


@pytest.mark.slow
def test_131072_tokens(tmp_path):
    folder, config = make(tmp_path / "m", "sf", 2)
    check(folder, config, CONTEXT, 256, 12, [4_000, 40_000, CONTEXT - 100])


def test_every_pair_of_a_shorter_context(tmp_path):
    folder, config = make(tmp_path / "m", "sfs", 2)
    check(folder, config, 4_096, 128, 20, [300, 4_000])


@pytest.mark.skipif(not os.environ.get("OPENELM_MLX_LONG"), reason="takes minutes: set OPENELM_MLX_LONG=1")
def test_every_pair_of_131072_tokens(tmp_path):
    folder, config = make(tmp_path / "m", "sfs", 1)
    check(folder, config, CONTEXT, 128, 12, [4_000, 40_000, CONTEXT - 100])
