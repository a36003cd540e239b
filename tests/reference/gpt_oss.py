"""gpt-oss in float64 with loops, from the bytes of a Hugging Face file: slow, and short enough to be checked by eye.

Nothing here uses the library or MLX. Written from arXiv 2508.10925 and the equations of gpt_oss/torch/model.py.
"""

import json
import math
from pathlib import Path

import numpy as np

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file; bf16 comes back as float64, uint8 as it is."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], np.uint8 if entry["dtype"] == "U8" else np.uint16)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(..., groups, 16) bytes and (..., groups) exponents -> (..., groups * 32): the low nibble is the even element."""
    low, high = FP4_VALUES[blocks & 15], FP4_VALUES[blocks >> 4]
    values = np.stack([low, high], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = values * 2.0 ** (scales[..., None].astype(np.float64) - 127)
    return values.reshape(*blocks.shape[:-2], -1)


def yarn_inverse_frequencies(head_dim, theta, factor, original, beta_fast, beta_slow, truncate=False):
    def pair(turns):
        return head_dim / 2 * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    i = np.arange(head_dim // 2)
    plain = theta ** (-2 * i / head_dim)
    ramp = np.clip((i - low) / (high - low), 0, 1)
    return ramp * plain / factor + (1 - ramp) * plain


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rotate(x, positions, inverse_frequencies, concentration):
    """x (T, H, D): the pairs (i, i + D/2) turned by position * frequency, and stretched by the concentration."""
    angles = positions[:, None, None] * inverse_frequencies
    cos, sin = np.cos(angles) * concentration, np.sin(angles) * concentration
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(queries, keys, values, sinks, window):
    """One query and one head at a time. queries (T, H, D), keys and values (T, K, D), sinks (H,) -> (T, H, D)."""
    T, H, D = queries.shape
    out = np.zeros_like(queries)
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(H):
            kv = h * keys.shape[1] // H
            scores = keys[first : t + 1, kv] @ queries[t, h] / math.sqrt(D)
            top = max(scores.max(), sinks[h])
            weights = np.exp(scores - top)
            out[t, h] = weights @ values[first : t + 1, kv] / (weights.sum() + np.exp(sinks[h] - top))
    return out


def expert(x, gate_up, gate_up_bias, down, down_bias, limit, alpha=1.702):
    z = gate_up @ x + gate_up_bias
    gate, up = np.minimum(z[0::2], limit), np.clip(z[1::2], -limit, limit)
    return down @ (gate / (1 + np.exp(-alpha * gate)) * (up + 1)) + down_bias


def forward(tokens: np.ndarray, weights: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """Logits (T, V) of tokens (T,), the weights under Hugging Face's names."""
    D, eps = config["head_dim"], config["rms_norm_eps"]
    yarn = config["rope_scaling"]
    frequencies = yarn_inverse_frequencies(
        D, config["rope_theta"], yarn["factor"], yarn["original_max_position_embeddings"], yarn["beta_fast"],
        yarn["beta_slow"], yarn["truncate"],
    )  # fmt: skip
    concentration = 0.1 * math.log(yarn["factor"]) + 1
    positions = np.arange(len(tokens))
    h = weights["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(config["layer_types"]):
        w = {name.split(f"layers.{i}.")[1]: array for name, array in weights.items() if f"layers.{i}." in name}

        x = rms_norm(h, w["input_layernorm.weight"], eps)
        q, k, v = (
            (x @ w[f"self_attn.{p}_proj.weight"].T + w[f"self_attn.{p}_proj.bias"]).reshape(len(tokens), -1, D)
            for p in "qkv"
        )
        q, k = (rotate(each, positions, frequencies, concentration) for each in (q, k))
        window = config["sliding_window"] if kind == "sliding_attention" else None
        attended = attention(q, k, v, w["self_attn.sinks"], window).reshape(len(tokens), -1)
        h = h + attended @ w["self_attn.o_proj.weight"].T + w["self_attn.o_proj.bias"]

        gate_up, down = (
            unpack_mxfp4(w[f"mlp.experts.{p}_proj_blocks"], w[f"mlp.experts.{p}_proj_scales"])
            for p in ("gate_up", "down")
        )
        x = rms_norm(h, w["post_attention_layernorm.weight"], eps)
        logits = x @ w["mlp.router.weight"].T + w["mlp.router.bias"]
        update = np.zeros_like(h)
        for t in range(len(tokens)):
            chosen = np.argsort(-logits[t])[: config["num_experts_per_tok"]]
            share = np.exp(logits[t, chosen] - logits[t, chosen].max())
            for e, weight in zip(chosen, share / share.sum(), strict=True):
                update[t] += weight * expert(
                    x[t], gate_up[e], w["mlp.experts.gate_up_proj_bias"][e],
                    down[e], w["mlp.experts.down_proj_bias"][e], config["swiglu_limit"],
                )  # fmt: skip
        h = h + update
    return rms_norm(h, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
