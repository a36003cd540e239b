"""How keys and values are allocated: steps of capacity, and the groups in which they are quantized."""

from __future__ import annotations

from ..errors import SettingError

# Keys and values are allocated for at least this many tokens at a time: an allocation and a copy for each token would
# cost more than the attention over them.
KV_STEP = 256

# The scores of a few queries over quantized keys are kept in memory, at most this many bytes of them at a time.
KV_SCORES_BYTES = 64 * 2**20
# From so many queries at once on, quantized keys and values are unpacked first: that is then less work than reading them
# packed for each, and MLX's own attention keeps no scores in memory on a GPU.
KV_UNPACK_FROM = 16


def kv_capacity(num_tokens: int, context_length: int | None = None) -> int:
    """How many tokens a cache without a window has room for when it holds `num_tokens`.

    Multiples of 256 up to 2,048, then of a quarter of the power of two below, up to the context: at most a quarter is
    empty, and all the copies while growing to n tokens together move fewer than 6 n (steps of 256 would move n^2 / 512).
    """
    step = max(KV_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    places = -(-num_tokens // step) * step
    if context_length is None or num_tokens > context_length + KV_STEP:
        return places
    # Drafts that are checked at the very end of the context may lie a few tokens past it.
    return min(places, -(-max(context_length, num_tokens) // KV_STEP) * KV_STEP)


def kv_group_size(head_dim: int) -> int:
    """How many numbers of a quantized key or value share a scale: the larger of MLX's groups that divides a head.

    Raises SettingError when none does.
    """
    for group_size in (64, 32):
        if head_dim % group_size == 0:
            return group_size
    raise SettingError(
        f"The keys and values of this model cannot be quantized: a head has {head_dim} numbers, and MLX packs them by 32 "
        "or 64. Leave out kv_bits (--kv-bits)."
    )
