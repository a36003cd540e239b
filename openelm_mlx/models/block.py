"""The layer that both families share: a part before attention, the attention, and a part after it.

The two parts have the same shapes for every single token, whatever the cache holds, so that they can be compiled
(decoding/compiled_step.py); the attention between them is not compiled. The walk through the layers is in base.py.

In the forward pass submodules are accessed as items, `self["attn"]`: attribute access of an `nn.Module` runs a Python
function, and a token needs more than a hundred of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx import nn

from .attention import Mask, attend
from .cache import LayerCache
from .packed import Packed
from .rope import Rotation

# Called with arrays that have just been dispatched, and whether a layer is complete; it may wait (decoding/prefill.py).
LayerThrottle = Callable[[Sequence[mx.array], bool], None]

# A layer's input (the residual stream), and the queries, keys and values of its new tokens.
Projected = tuple[mx.array, mx.array, mx.array, mx.array]


class BlockAttention(nn.Module):
    """Attention without its projections. scale: None for 1 / sqrt(D). sinks: (H,), or None; see `attend`."""

    scale: float | None
    sinks: mx.array | None
    rotation: Rotation
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def full_scale(self) -> float:
        """The scale as a number."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def for_slots(
        self, heads: mx.array, positions: mx.array, normed: mx.array | None = None, gains: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """What `Block.before_slots` gives, from the projection's heads (M, H + 2 K, 1, D). Others: see `Rotation.of_slots`."""
        rotated = self.rotation.of_slots(heads, positions, self.num_heads + self.num_kv_heads, normed, gains)
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :].squeeze(2)

    def slot_constants(self) -> list[mx.array]:
        """The constants of `for_slots`."""
        num_rotated = self.num_heads + self.num_kv_heads
        return self.rotation.slot_constants(num_rotated + self.num_kv_heads, num_rotated, self.head_dim)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, cache: LayerCache | None
    ) -> mx.array:
        """Attention over the new keys and values and, with a cache, the earlier ones. -> (B, H, L, D)"""
        seen_keys, seen_values = (keys, values) if cache is None else cache.update_and_fetch(keys, values)
        return attend(queries, seen_keys, seen_values, mask, self.scale, self.get("sinks"))

    def attend_over(
        self, queries: mx.array, keys: mx.array | Packed, values: mx.array | Packed, mask: Mask
    ) -> mx.array:
        """Attention over all these keys and values. -> (B, H, L, D)"""
        return attend(queries, keys, values, mask, self.scale, self.sinks)


class Block(nn.Module):
    """One layer. x: its input, the residual stream, (B, L, hidden_size); (B, hidden_size) for one token a row."""

    @property
    def attention(self) -> BlockAttention:
        """The attention, which each family keeps under the name that its files have."""
        raise NotImplementedError

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None = None) -> mx.array:
        """The whole layer, x (B, L, hidden_size) -> the same shape; the walk of the layers calls its parts instead."""
        queries, keys, values = self.before_attention(x, 0 if cache is None else cache.offset)
        return self.after_attention(x, self.attention.attend(queries, keys, values, mask, cache))

    def before_attention(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The new tokens' queries (B, H, L, D), keys and values (B, K, L, D), rotated from position `offset` on."""
        raise NotImplementedError

    def before_slots(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """`before_attention` of one token a row, x (M, hidden_size), in fewer kernels.

        positions: (M,), in float32. Queries (M, H, 1, D); keys and values in one, (M, 2 K, D), for `SlotBank.write`.
        """
        raise NotImplementedError

    def after_attention(self, x: mx.array, out: mx.array) -> mx.array:
        """The layer's output from its input x and attention's output, (B, H, L, D)."""
        raise NotImplementedError

    def prepare_constants(self, for_slots: bool = False) -> list[mx.array]:
        """Compute constants that every token needs, if missing, and return them for evaluation.

        Called before tracing: a compiled piece would otherwise compute them again for every token. for_slots: those of
        `before_slots` are among them.
        """
        raise NotImplementedError
