"""OpenAI gpt-oss: attention with sinks, every other layer through a short window, and a mixture of experts.

Model card: arXiv 2508.10925. Code followed: gpt_oss/torch/model.py. Attribute names are those of the Hugging Face
files; q, k and v are one projection, gate and up another one with alternating rows, both as in OpenAI's own files.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from ..specs import LayerSpec, ModelSpec
from . import block
from .attention import merge_heads, split_heads
from .base import LanguageModel
from .moe import Experts, MoE, weighted_sum
from .norm import RMSNorm
from .precision import KernelChoices, add_rounded, linear
from .rope import Rotation


class GptOss(LanguageModel):
    """The language model: tokens (B, L) -> logits (B, L, vocab_size)."""

    def __init__(self, spec: ModelSpec, choices: KernelChoices | None = None) -> None:
        super().__init__(spec, choices)
        self.model = Transformer(spec, self.choices)
        if not (spec.tied_head or spec.only_layers):
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens if self.spec.only_layers else self.model.embed_tokens(tokens)

    def head(self, h: mx.array) -> mx.array:
        if self.spec.only_layers:
            return h
        h = self.model.norm(h, self.layers[0].self_attn.dtype if self.layers else None)
        return self.model.embed_tokens.as_linear(h) if self.spec.tied_head else self.lm_head(h)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers


class Transformer(nn.Module):
    """The parameters under Hugging Face's prefix `model.`; `GptOss.run_layers` is their forward pass."""

    def __init__(self, spec: ModelSpec, choices: KernelChoices) -> None:
        super().__init__()
        if not spec.only_layers:
            self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        rotation = Rotation(spec.rope_theta, spec.yarn)
        self.layers = [Block(spec, layer, rotation, choices) for layer in spec.layers]
        if not spec.only_layers:
            self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


class Routed(NamedTuple):
    """A layer before its experts: the residual stream, the experts' input, the router's top-k experts, and their weights.

    h, x (B, L, hidden_size); expert_indices, expert_weights (B, L, k). One token a row: without L.
    """

    h: mx.array
    x: mx.array
    expert_indices: mx.array
    expert_weights: mx.array


class Block(block.Block):
    """h = x + attention(norm(x)); h + moe(norm(h)), each rounded to the layer's type.

    From the first layer on the residual stream is float32, with numbers of the type that the layers compute in: a norm,
    which wants float32, needs no cast then.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, rotation: Rotation, choices: KernelChoices) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, layer, rotation, choices.bias_apart)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = MoE(spec, layer, choices.bias_apart, choices.expert_ways, choices.expert_kernel_rows)

    @property
    def attention(self) -> Attention:
        found: Attention = self["self_attn"]
        return found

    def before_attention(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        attention: Attention = self["self_attn"]
        return attention.project(self["input_layernorm"](x, attention.dtype), offset)

    def before_slots(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        attention: Attention = self["self_attn"]
        return attention.project_for_slots(self["input_layernorm"](x, attention.dtype), positions)

    def after_attention(self, x: mx.array, out: mx.array) -> mx.array:
        h, dtype = self._after_output(x, out), self["self_attn"].dtype
        return add_rounded(h, self["mlp"](self["post_attention_layernorm"].in_float32(h), dtype), dtype)

    def _after_output(self, x: mx.array, out: mx.array) -> mx.array:
        attention: Attention = self["self_attn"]
        output = linear(attention["o_proj"], merge_heads(out, x), attention.bias_apart)
        return add_rounded(x, output, attention.dtype)

    def to_experts(self, x: mx.array, out: mx.array) -> Routed:
        """`after_attention` up to the router's choice of experts."""
        h = self._after_output(x, out)
        normed = self.post_attention_layernorm.in_float32(h)
        return Routed(h, normed.astype(self.self_attn.dtype), *self.mlp.route(normed))

    def from_experts(self, routed: Routed, outputs: mx.array) -> mx.array:
        """The rest of `after_attention`: the layer's output from those of its experts, (B, L, k, hidden_size)."""
        dtype = self.self_attn.dtype
        return add_rounded(routed.h, weighted_sum(outputs, routed.expert_weights, dtype), dtype)

    def prepare_constants(self, for_slots: bool = False) -> list[mx.array]:
        rotation = self.self_attn.slot_constants() if for_slots else []
        experts = getattr(self.mlp.experts, "experts", self.mlp.experts)  # streamed experts wrap them
        if not (isinstance(experts, Experts) and experts.has_one_bias_type):
            return rotation
        return [experts.bias_table(), experts.gate_up_proj.bias, experts.down_proj.bias, *rotation]


class Attention(block.BlockAttention):
    """Grouped-query attention with a sink for each head: a logit that takes its share of the softmax and adds none."""

    sinks: mx.array

    def __init__(self, spec: ModelSpec, layer: LayerSpec, rotation: Rotation, bias_apart: bool = False) -> None:
        super().__init__()
        self.bias_apart = bias_apart
        self.num_heads, self.num_kv_heads, self.head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self.rotation = rotation
        # YaRN multiplies sine and cosine, so queries and keys, by its concentration; their product is scaled instead.
        concentration = 1.0 if spec.yarn is None else spec.yarn.concentration
        self.scale = concentration**2 * layer.head_dim**-0.5
        self.qkv_proj = nn.Linear(spec.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.sinks = mx.zeros((self.num_heads,))
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, spec.hidden_size)

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the layer computes in; its packed matrices do not tell."""
        return self["sinks"].dtype

    def project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, L, D), keys and values (B, K, L, D) of x (B, L, hidden_size), from position `offset` on."""
        # Queries and keys lie side by side and are rotated together.
        qkv = split_heads(linear(self["qkv_proj"], x, self.bias_apart), self.head_dim)
        rotated, values = mx.split(qkv, [self.num_heads + self.num_kv_heads], axis=1)
        queries, keys = mx.split(self.rotation(rotated, offset), [self.num_heads], axis=1)
        return queries, keys, values

    def project_for_slots(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """`project` of one token a row, x (S, hidden_size), for `Block.before_slots`."""
        heads = split_heads(linear(self["qkv_proj"], x, self.bias_apart), self.head_dim)
        return self.for_slots(heads, positions)
