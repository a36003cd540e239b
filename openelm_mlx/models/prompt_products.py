"""When a chunk of a prompt beside other requests attends by two products, and in which blocks. Without arrays.

Models/rows.py does it, and a plan counts the scores (memory/layer_scratch.py).
"""

from __future__ import annotations

# `KernelChoices.prompt_products_to` on MLX's CUDA backend.
PRODUCTS_TO_ON_CUDA = 2**25
# A chunk of a prompt attends by products in so many blocks at most (`KernelChoices.prompt_products_to` is for one).
MOST_BLOCKS = 8


def num_padding(num_rows: int) -> int:
    """How many rows are missing up to one of few numbers: of each power of two, and three between it and the next one."""
    step = max(1, (1 << num_rows.bit_length() - 1) // 4)
    return -num_rows % step


def uses_products(num_heads: int, length: int, num_keys: int, products_to: int) -> bool:
    """Whether so many queries over so many keys go by products."""
    return length > 1 and num_heads * length * num_keys <= MOST_BLOCKS * products_to


def queries_in_a_block(num_heads: int, num_keys: int, products_to: int) -> int:
    """How many queries are multiplied together."""
    return max(1, products_to // (num_heads * num_keys))
