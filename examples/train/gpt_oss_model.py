"""gpt-oss in the form in which it is trained: the library's model, with two of its modules computed another way.

Attention is written out, because MLX's fused one has no derivative for masks and sinks on every device; and all experts
are computed for every token, those that were not chosen with weight 0, which at this size is faster than gathering
them. Parameters, their names and the function of them are the library's (tests/test_train_gpt_oss.py).

Weights are rounded in the forward pass as they are rounded when written, experts to MXFP4 and the rest to bfloat16, and
the gradient goes to the unrounded ones as if they were not (a straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map_with_path

from openelm_mlx.models.cache import KVCache, SlidingKVCache
from openelm_mlx.models.gpt_oss import Attention, GptOss
from openelm_mlx.models.moe import MoE
from openelm_mlx.specs import LayerSpec, ModelSpec

GROUP_SIZE, BITS = 32, 4  # MXFP4's


class TrainingGptOss(GptOss):
    """`GptOss` over rows that hold several conversations; `balance_loss` is of the last call."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        for layer, layer_spec in zip(self.layers, spec.layers, strict=True):
            layer.self_attn = WrittenOutAttention(spec, layer_spec, layer.self_attn.rotation)
            layer.mlp = DenseMoE(spec, layer_spec)

    def __call__(self, tokens: mx.array, turns: mx.array, positions: mx.array) -> mx.array:  # type: ignore[override]
        """Logits (B, L, V). tokens (B, L); turns (B, L): which turn of its row a token belongs to, 0 being the beginning
        that all turns of the row share; positions (B, L): how many tokens of its conversation stand before it.

        A token sees the shared beginning and its own turn, so it computes what it would if these two stood alone.
        """
        views = {window: view(turns, positions, window) for window in {layer.window for layer in self.spec.layers}}
        h = self.embed(tokens)
        for layer, spec in zip(self.layers, self.spec.layers, strict=True):
            h = layer(h, views[spec.window], None)
        return self.head(h)

    def balance_loss(self) -> mx.array:
        """The mean over layers of the router's loss, 1 where all experts have the same share of the tokens."""
        return sum(layer.mlp._balance for layer in self.layers) / len(self.layers)


class View(NamedTuple):
    """Which keys each query sees, (B, 1, L, L), and the position of each token, (B, L)."""

    visible: mx.array
    positions: mx.array


def view(turns: mx.array, positions: mx.array, window: int | None) -> View:
    """What the tokens see that `turns` and `positions` (B, L) tell of: nothing behind them, nor beyond the window."""
    order = mx.arange(turns.shape[1])
    visible = order <= order[:, None]
    visible = visible & ((turns[:, None] == turns[:, :, None]) | (turns[:, None] == 0))
    if window is not None:
        visible = visible & (positions[:, None] > positions[:, :, None] - window)
    return View(visible[:, None], positions)


class WrittenOutAttention(Attention):
    """`Attention` as matrix products and a softmax, each token at the position that is said."""

    def project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """As the library's, not yet rotated: only `attend` is told the positions."""
        H, K = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)
        queries, keys, values = mx.split(qkv, [H, H + K], axis=1)
        return queries, keys, values

    def attend(  # type: ignore[override]
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: View,
        cache: KVCache | SlidingKVCache | None,
    ) -> mx.array:
        assert cache is None, "training reads whole rows"
        B, H, L, _ = queries.shape
        K, periods = self.num_kv_heads, self.rotation.periods(self.head_dim)
        queries, keys = (rotated_at(each, mask.positions, periods) for each in (queries, keys))
        # (B, K, H / K * L, D) @ (B, K, D, L) -> (B, H, L, L): each kv head's queries one after the other.
        scores = queries.reshape(B, K, -1, self.head_dim) @ keys.swapaxes(-1, -2)
        scores = scores.reshape(B, H, L, L).astype(mx.float32) * self.scale
        scores = mx.where(mask.visible, scores, -1e9)
        sinks = self.sinks.astype(mx.float32)[:, None, None]
        total = mx.logaddexp(mx.logsumexp(scores, axis=-1, keepdims=True), sinks)
        probs = mx.exp(scores - total).astype(values.dtype)
        return (probs.reshape(B, K, -1, L) @ values).reshape(B, H, L, self.head_dim)


def rotated_at(x: mx.array, positions: mx.array, periods: mx.array) -> mx.array:
    """The library's `rotate`, but each token at a position of its own. x (B, H, L, D), positions (B, L)"""
    angles = positions[:, None, :, None].astype(mx.float32) / periods
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class DenseMoE(MoE):
    """`MoE` with every expert computed for every token: four large matrix products."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        self._balance = mx.array(0.0)

    def __call__(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        expert_weights = self.all_weights(self.router(x)).astype(dtype)  # (B, L, E), 0 for those not chosen
        x = x.astype(dtype)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        E, _, width = gate_up.weight.shape
        # The rows alternate between gate and up; the weights are taken apart, which is less than to do it with results.
        rows, bias = gate_up.weight.reshape(E, -1, 2, width), gate_up.bias.reshape(E, -1, 2)
        gate = x @ rows[:, :, 0].reshape(-1, width).T + bias[:, :, 0].reshape(-1)
        up = x @ rows[:, :, 1].reshape(-1, width).T + bias[:, :, 1].reshape(-1)
        gate = mx.minimum(gate, self.experts.swiglu_limit)
        up = mx.clip(up, -self.experts.swiglu_limit, self.experts.swiglu_limit)
        hidden = gate * mx.sigmoid(self.experts.swiglu_alpha * gate) * (up + 1)
        hidden = hidden.reshape(*x.shape[:2], E, -1) * expert_weights[..., None]
        # sum_e w_e (W_e a_e + b_e) is one product over all experts' inner rows, and one of the weights with the biases.
        columns = down.weight.swapaxes(1, 2).reshape(-1, width)
        return hidden.flatten(2) @ columns + expert_weights @ down.bias

    def all_weights(self, logits: mx.array) -> mx.array:
        """The softmax over the k largest of `logits` (B, L, E), 0 for the others; also notes how even they are."""
        k, num_experts = self.experts_per_token, logits.shape[-1]
        least = mx.stop_gradient(mx.sort(logits, axis=-1)[..., -k, None])
        chosen = logits >= least
        # Switch Transformer's loss (arXiv 2101.03961, eq. 4): share of the tokens times mean probability.
        share = mx.stop_gradient(chosen.astype(mx.float32).mean(axis=(0, 1)) / k)
        self._balance = num_experts * (share * mx.softmax(logits, axis=-1).mean(axis=(0, 1))).sum()
        return mx.softmax(mx.where(chosen, logits, -1e9), axis=-1)


# --- Rounding ---------------------------------------------------------------------------------------------------------


def is_packed(name: str) -> bool:
    """Whether a parameter of this name is stored as MXFP4."""
    return name.endswith(("experts.gate_up_proj.weight", "experts.down_proj.weight"))


def rounded(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters' values as they will be stored, in float32; their derivative is that of the unrounded ones."""
    return tree_map_with_path(lambda name, p: p + mx.stop_gradient(stored_value(name, p) - p), parameters)


def stored_value(name: str, parameter: mx.array) -> mx.array:
    """What reading the stored parameter gives, in float32."""
    if not is_packed(name):
        return parameter.astype(mx.bfloat16).astype(mx.float32)
    return unpacked(*packed(parameter))


def packed(weight: mx.array) -> tuple[mx.array, mx.array]:
    """An expert matrix (..., rows, columns) in MXFP4: words (..., rows, columns / 8) and scales (..., columns / 32)."""
    words, scales = mx.quantize(weight, GROUP_SIZE, BITS, mode="mxfp4")
    return words, scales


def unpacked(words: mx.array, scales: mx.array) -> mx.array:
    """The inverse of `packed`, float32; four bits and a power of two are exact in bfloat16 as well."""
    return mx.dequantize(words, scales, group_size=GROUP_SIZE, bits=BITS, mode="mxfp4").astype(mx.float32)
