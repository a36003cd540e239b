"""Apple OpenELM: a decoder whose every layer has its own number of heads and its own feed-forward width.

Paper: arXiv 2404.14619. Code followed: corenet/modeling/models/language_modeling/general_gpt.py and Apple's
modeling_openelm.py. Attribute names are those of Apple's Hugging Face files, so that parameters need no renaming.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..specs import LayerSpec, ModelSpec
from . import block
from .adapter_sites import AdaptedLinear
from .attention import merge_heads, split_heads
from .base import LanguageModel
from .precision import KernelChoices, one_kernel
from .rope import Rotation


class OpenELM(LanguageModel):
    """The language model: tokens (B, L) -> logits (B, L, vocab_size)."""

    def __init__(self, spec: ModelSpec, choices: KernelChoices | None = None) -> None:
        super().__init__(spec, choices)
        self.transformer = Transformer(spec, self.choices)
        if not (spec.tied_head or spec.only_layers):
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def embed(self, tokens: mx.array) -> mx.array:
        if self.spec.only_layers:
            return tokens
        embedded: mx.array = self["transformer"]["token_embeddings"](tokens)
        return embedded

    def head(self, h: mx.array) -> mx.array:
        if self.spec.only_layers:
            return h
        transformer: Transformer = self["transformer"]
        h = transformer["norm"](h)
        logits: mx.array = transformer["token_embeddings"].as_linear(h) if self.spec.tied_head else self["lm_head"](h)
        return logits

    @property
    def layers(self) -> list[Block]:
        found: list[Block] = self["transformer"]["layers"]
        return found


class Transformer(nn.Module):
    """The parameters under Apple's prefix `transformer.`; `OpenELM.run_layers` is their forward pass."""

    def __init__(self, spec: ModelSpec, choices: KernelChoices) -> None:
        super().__init__()
        if not spec.only_layers:
            self.token_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)
        rotation = Rotation(spec.rope_theta)
        self.layers = [Block(spec, layer, rotation, choices) for layer in spec.layers]
        if not spec.only_layers:
            self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)


class Block(block.Block):
    """h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, rotation: Rotation, choices: KernelChoices) -> None:
        super().__init__()
        self.fuse_residual_add = choices.fuse_residual_add
        self.fuse_many_residual_adds = choices.fuse_many_residual_adds
        self.attn = Attention(spec, layer, rotation)
        self.ffn = FeedForward(spec.hidden_size, layer.intermediate_size)
        # mx.fast.rms_norm rounds before the gain, as CoreNet's RMSNorm does (normalization/rms_norm.py).
        self.attn_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.ffn_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)

    @property
    def attention(self) -> Attention:
        found: Attention = self["attn"]
        return found

    def before_attention(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        attention: Attention = self["attn"]
        return attention.project(self["attn_norm"](x), offset)

    def before_slots(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        attention: Attention = self["attn"]
        return attention.project_for_slots(self["attn_norm"](x), positions)

    def after_attention(self, x: mx.array, out: mx.array) -> mx.array:
        h = self._plus(x, self["attn"]["out_proj"], merge_heads(out, x))
        feed_forward: FeedForward = self["ffn"]
        return self._plus(h, feed_forward["proj_2"], feed_forward.hidden(self["ffn_norm"](h)))

    def _plus(self, residual: mx.array, module: nn.Module, x: mx.array) -> mx.array:
        """residual + module(x): one kernel, which rounds once, where the matrix is not packed.

        That is for Metal, and for several rows on CUDA, which would leave its fast kernel for one row (docs/LOG.md). The
        CPU's BLAS would add each product to the residual itself, which is larger: less exact, and no faster.
        """
        are_many = residual.size != residual.shape[-1]
        if not (self.fuse_residual_add or (are_many and self.fuse_many_residual_adds)):
            return residual + module(x)
        if isinstance(module, AdaptedLinear):
            return module.beside(self._plus(residual, module.base, x), x, residual)
        if type(module) is nn.Linear and "bias" not in module:
            return mx.addmm(residual, x, module["weight"].T)
        return residual + module(x)

    def prepare_constants(self, for_slots: bool = False) -> list[mx.array]:
        found = [self.attn.gains()] if self.attn.qk_norm else []
        if not for_slots:
            return found
        return [*found, *self.attn.slot_constants(), *([self.attn.wide_gains()] if self.attn.qk_norm else [])]


class Attention(block.BlockAttention):
    """Grouped-query attention with one fused projection and, when the spec says so, a norm on queries and keys."""

    scale, sinks = None, None

    def __init__(self, spec: ModelSpec, layer: LayerSpec, rotation: Rotation) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self.rotation = rotation
        self.qk_norm, self.norm_eps = spec.qk_norm, spec.norm_eps
        self.qkv_proj = nn.Linear(
            spec.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False
        )
        if spec.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=spec.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=spec.norm_eps)
            self._gains: tuple[mx.array, mx.array, mx.array] | None = None
            self._wide_gains: tuple[mx.array, mx.array] | None = None
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, spec.hidden_size, bias=False)

    def project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, L, D), keys and values (B, K, L, D) of x (B, L, hidden_size), from position `offset` on."""
        qkv = split_heads(self["qkv_proj"](x), self.head_dim)  # heads are queries, keys, values
        # Slices, since MLX's norm copies what comes from a split.
        num_rotated = self.num_heads + self.num_kv_heads
        queries_and_keys, values = qkv[:, :num_rotated], qkv[:, num_rotated:]
        # Norm and rotation are the same for every head, so queries and keys are computed together: half the dispatches.
        if self.qk_norm:
            queries_and_keys = mx.fast.rms_norm(queries_and_keys, None, self.norm_eps) * self.gains()
        queries, keys = mx.split(self.rotation(queries_and_keys, offset), [self.num_heads], axis=1)
        return queries, keys, values

    def project_for_slots(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """`project` of one token a row, x (S, hidden_size), for `Block.before_slots`."""
        heads = split_heads(self["qkv_proj"](x), self.head_dim)
        # Of all heads, values' too, which are taken as they were: the norm would copy a slice of them first.
        normed = mx.fast.rms_norm(heads, None, self.norm_eps) if self.qk_norm else None
        gains = self.wide_gains() if self.qk_norm else None
        return self.for_slots(heads, positions, normed, gains)

    def wide_gains(self) -> mx.array:
        """The gains of all heads, values' included, which have none, (H + 2 K, 1, D)."""
        gains = self.gains()
        if self._wide_gains is None or self._wide_gains[0] is not gains:
            self._wide_gains = gains, mx.pad(gains, [(0, self.num_kv_heads), (0, 0), (0, 0)])
        return self._wide_gains[1]

    def gains(self) -> mx.array:
        """The gains of the queries' and the keys' norm, a row a head, (H + K, 1, D); made again when one is replaced."""
        q, k, made = self["q_norm"]["weight"], self["k_norm"]["weight"], self.get("_gains")
        if made is None or made[0] is not q or made[1] is not k:
            of_queries = mx.broadcast_to(q, (self.num_heads, 1, self.head_dim))
            of_keys = mx.broadcast_to(k, (self.num_kv_heads, 1, self.head_dim))
            self._gains = made = q, k, mx.concatenate([of_queries, of_keys])
        return made[2]


class FeedForward(nn.Module):
    """proj_2(silu(gate) * up), gate and up being the two halves of proj_1's output."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.proj_2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_2(self.hidden(x))

    def hidden(self, x: mx.array) -> mx.array:
        """The input of the second projection. (..., hidden_size) -> (..., intermediate_size)"""
        gate, up = mx.split(self["proj_1"](x), 2, axis=-1)
        return swiglu(gate, up)


@one_kernel
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up (arXiv 2002.05202)."""
    return nn.silu(gate) * up
