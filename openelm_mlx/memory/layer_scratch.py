"""The scratch memory of one layer: every array that its parts make for so many tokens, counted from the shapes.

The sums follow from the code in `models/`; a test measures each part on the CPU. GPUs have kernels where the CPU needs
several steps; their internal memory was measured on CUDA and is assumed for Metal (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models.prompt_products import PRODUCTS_TO_ON_CUDA, num_padding, queries_in_a_block, uses_products
from ..models.routing_ways import (
    BY_SORTING,
    IN_BLOCKS,
    MOST_ROUTES_OF_A_TABLE,
    UNSORTED,
    fewest_rows,
    most_blocks,
    most_places,
    most_places_by_blocks,
    rows_at_once,
    uses_tiles,
    way_for,
)
from ..specs import KV_SCORES_BYTES, KV_UNPACK_FROM, LayerSpec, ModelSpec

FLOAT32 = 4
# How a GPU's rows go through their experts unless `selfcheck` found another way faster (models/precision.py).
_EXPERT_WAYS = {"metal": BY_SORTING, "cuda": IN_BLOCKS}
# Sizes of heads that all of MLX's versions have Metal kernels of attention for (metal/scaled_dot_product_attention.cpp): of
# more queries than these few, and of these few, where those that share a key head are no more than so many.
_METAL_HEADS, _METAL_HEADS_OF_FEW = (64, 80, 128), (64, 96, 128)
_FEW_QUERIES, _FEW_BESIDE_A_KEY = 8, 32


@dataclass(frozen=True)
class LayerScratch:
    """Bytes of the arrays that the parts of one layer make, with their results: before, in and after attention.

    projected: the part of `before` that stays until attention is done: queries, keys and values; attended: attention's result.
    """

    before: int
    attention: int
    after: int
    projected: int
    attended: int

    @property
    def all(self) -> int:
        """Everything that the layer makes."""
        return self.before + self.attention + self.after


def layer_scratch(
    spec: ModelSpec,
    layer: LayerSpec,
    L: int,
    offset: int,
    itemsize: int,
    backend: str,
    kv_bits: int | None = None,
    slots: int | None = None,
) -> LayerScratch:
    """The scratch memory of one layer for `L` tokens after `offset` cached ones, with numbers of `itemsize` bytes.

    slots: how many of the layer's experts are in memory, None: all of them.
    """
    return counting(spec, layer, L, offset, itemsize, backend, kv_bits, slots).layer()


def counting(
    spec: ModelSpec,
    layer: LayerSpec,
    L: int,
    offset: int,
    itemsize: int,
    backend: str,
    kv_bits: int | None,
    slots: int | None = None,
    is_beside: bool = False,
) -> Counting:
    """The sums of one layer for `L` tokens, as this backend computes it. is_beside: in a pass over several requests."""
    if backend == "cpu":
        return _OnCpu(spec, layer, L, offset, itemsize, kv_bits, slots)
    products_to = PRODUCTS_TO_ON_CUDA if is_beside and backend == "cuda" else 0
    return _OnGpu(spec, layer, L, offset, itemsize, kv_bits, slots, backend, products_to)


class Counting:
    """The shapes, and the sums that both backends share."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        L: int,
        offset: int,
        itemsize: int,
        kv_bits: int | None,
        slots: int | None = None,
    ) -> None:
        self.slots = slots if layer.num_experts else None
        self.spec, self.layer_spec, self.L, self.offset, self.itemsize = spec, layer, L, offset, itemsize
        self.is_packed = kv_bits is not None and layer.window is None
        self.hidden = L * spec.hidden_size
        self.queries = L * layer.num_heads * layer.head_dim
        self.new_keys = L * layer.num_kv_heads * layer.head_dim
        self.qkv = self.queries + 2 * self.new_keys
        self.rotated = self.queries + self.new_keys
        self.routes = L * layer.experts_per_token

    def layer(self) -> LayerScratch:
        kept = self.itemsize * (self.qkv + self.rotated)
        return LayerScratch(self.before(), self.attention(), self.after(), kept, self.itemsize * self.queries)

    def before(self) -> int:
        raise NotImplementedError

    def attention(self) -> int:
        raise NotImplementedError

    def after(self) -> int:
        raise NotImplementedError

    @property
    def in_blocks(self) -> bool:
        """Whether a short window is attended to in blocks (models/attention.py, `causal_mask`)."""
        window = self.layer_spec.window
        return window is not None and window < self.num_keys and 2 * window <= self.L

    @property
    def joins(self) -> bool:
        """Whether a ring's tokens and the new ones are laid side by side; one token is attended to in the ring itself."""
        return self.layer_spec.window is not None and self.L > 1

    @property
    def num_keys(self) -> int:
        """How many keys attention reads: all, or in a sliding layer the new ones and up to a window before them."""
        window = self.layer_spec.window
        return self.L + (self.offset if window is None else min(self.offset, window - 1))

    @property
    def stays_packed(self) -> bool:
        """Whether so few queries go over packed keys as they are (models/packed.py)."""
        return self.is_packed and self.L < KV_UNPACK_FROM

    def over_packed(self) -> int:
        """Of an attention over packed keys: the new ones before they are packed, queries and results, scores, a mask."""
        heads, keys = self.layer_spec.num_heads, self.num_keys
        scores = FLOAT32 * heads * keys
        at_once = min(self.L, max(1, KV_SCORES_BYTES // scores))
        mask = self.L * keys if self.L > 1 else 0
        return 2 * FLOAT32 * self.keys_and_values(self.L) + 3 * FLOAT32 * self.queries + 2 * at_once * scores + mask

    def keys_and_values(self, num_keys: int) -> int:
        """How many numbers the keys and values of `num_keys` tokens have."""
        return 2 * num_keys * self.layer_spec.num_kv_heads * self.layer_spec.head_dim


class _OnCpu(Counting):
    """MLX's CPU backend: norms, rotations, attention and experts are computed in float32, in many steps."""

    def cast(self, count: int) -> int:
        """A copy in float32, which float32 does not need."""
        return FLOAT32 * count if self.itemsize < FLOAT32 else 0

    def rounded(self, count: int) -> int:
        """A copy in the model's type."""
        return self.itemsize * count if self.itemsize < FLOAT32 else 0

    def norm(self, count: int) -> int:
        """The square and the product, and the casts there and back."""
        return self.cast(count) + 2 * FLOAT32 * count + self.rounded(count)

    def before(self) -> int:
        if self.layer_spec.num_experts:
            norm, heads_norm = 2 * FLOAT32 * self.hidden + self.rounded(self.hidden), 0
        else:
            norm, heads_norm = self.norm(self.hidden), self.norm(self.rotated) if self.spec.qk_norm else 0
        rotation = self.cast(self.rotated) + 2 * FLOAT32 * self.rotated + self.rounded(self.rotated)
        return norm + self.itemsize * self.qkv + heads_norm + rotation

    def attention(self) -> int:
        keys = self.num_keys
        total = 0
        if self.joins:
            total += self.itemsize * self.keys_and_values(keys)
        if self.in_blocks:
            total += self.blocks()
        else:
            if self.is_packed:  # a copy without gaps between heads
                total += keys * self.layer_spec.kv_bytes_per_token(self.itemsize, 8)
            if self.stays_packed:
                return total + self.over_packed()
            total += self.scores(self.L, keys) + self.L * keys
            total += self.cast(self.keys_and_values(keys))
            if self.is_packed:  # the new ones packed, and all of them unpacked
                total += 2 * FLOAT32 * self.keys_and_values(self.L) + self.itemsize * self.keys_and_values(keys)
        return total

    def scores(self, L: int, keys: int) -> int:
        """Scaled queries, scores, the sinks, and the result."""
        heads, queries = self.layer_spec.num_heads, L * self.layer_spec.num_heads * self.layer_spec.head_dim
        scores = FLOAT32 * heads * L * keys
        if self.layer_spec.num_experts:
            scores = 3 * scores + FLOAT32 * heads * L
        # In float32 MLX copies the queries too where nothing is cached yet, and for blocks.
        copies = 3 if self.itemsize == FLOAT32 and (self.offset == 0 or self.in_blocks) else 2
        return copies * FLOAT32 * queries + scores + self.rounded(queries)

    def blocks(self) -> int:
        window = self.layer_spec.window or 1
        n = -(-self.L // window)
        paired = self.itemsize * self.keys_and_values(2 * n * window)
        padded = self.itemsize * self.keys_and_values((n + 1) * window)
        L = n * window
        scores = self.scores(L, 2 * window)
        return padded + paired + self.cast(self.keys_and_values(2 * n * window)) + scores

    def after(self) -> int:
        e = self.itemsize
        merged = e * self.queries
        if not self.layer_spec.num_experts:
            inner = self.L * self.layer_spec.intermediate_size
            return merged + 2 * e * self.hidden + self.norm(self.hidden) + 3 * e * inner
        square = normed = FLOAT32 * self.hidden
        # The attention's product, and its sum with the residual stream, which is another array where it is rounded.
        product = e * self.hidden + self.cast(self.hidden) + self.rounded(self.hidden) if e < FLOAT32 else 0
        kept = FLOAT32 * self.hidden + normed + self.rounded(self.hidden) + self.routing()
        if self.slots is not None:
            return kept + max(merged + product + square, self.by_blocks(self.slots))
        layer = self.layer_spec
        is_sorted = way_for(self.L, layer.experts_per_token, layer.num_experts, BY_SORTING) != UNSORTED
        rows = self.through_experts(self.routes, self.routes if is_sorted else self.L)
        rows += e * self.routes * self.spec.hidden_size * (2 if is_sorted else 0)  # gathered, and back in their order
        # MLX dispatches a hundred steps and no more before it waits. With casts the layer has more than that: until its last
        # arrays are there, the first ones have been given back.
        first = product + square + merged
        gone = 0 if e == FLOAT32 else first if is_sorted else product + merged
        return kept + first - gone + rows + self.summed()

    def routing(self) -> int:
        """The router's logits and which of them are the largest; and of each route some numbers."""
        return FLOAT32 * (2 * self.L * self.layer_spec.num_experts + 8 * self.routes)

    def through_experts(self, rows: int, inputs: int) -> int:
        """So many rows through their experts, once the `inputs` are gathered; their outputs are the last array."""
        e, inner, hidden = self.itemsize, rows * self.layer_spec.intermediate_size, rows * self.spec.hidden_size
        down = self.cast(inner) + FLOAT32 * inner + FLOAT32 * hidden + self.rounded(hidden) + e * hidden
        return self.gate_up(rows, inputs) + self.swiglu(rows) + down

    def gate_up(self, rows: int, inputs: int) -> int:
        """The first product of the experts and its bias; it takes a copy of its input, though that is contiguous."""
        inner, gathered = rows * self.layer_spec.intermediate_size, inputs * self.spec.hidden_size
        return self.cast(gathered) + FLOAT32 * gathered + (FLOAT32 + self.itemsize) * 2 * inner

    def swiglu(self, rows: int) -> int:
        inner = rows * self.layer_spec.intermediate_size
        return self.rounded(2 * inner) + 3 * FLOAT32 * inner + 2 * self.cast(inner) + self.rounded(inner)

    def summed(self) -> int:
        """The experts' outputs summed (models/moe.py, `weighted_sum`), and added to the residual stream."""
        is_few = self.routes <= MOST_ROUTES_OF_A_TABLE
        copied = self.cast(self.routes * self.spec.hidden_size) if is_few else 0
        product = FLOAT32 * self.hidden + (0 if is_few else self.rounded(self.hidden))
        return copied + product + self.rounded(self.hidden) + self.cast(self.hidden)

    def by_blocks(self, slots: int) -> int:
        """The experts' part where they are on disk: a few rows at a time (experts/modules.py, `_by_blocks`), the outputs of
        all of them, and at the end their sum.

        As far as MLX dispatches, there are two parts and the first product of a third one in float32; casts make the way of
        a part longer, so that the first is given back when the second one is past its swiglu.
        """
        e, routes, num_experts = self.itemsize, self.routes, self.layer_spec.num_experts
        blocks = most_blocks(routes, num_experts, slots)
        fewest = fewest_rows(slots) if uses_tiles(routes, num_experts) else 1
        most = rows_at_once(routes, num_experts, slots)

        def rows_of(part: int) -> int:
            left = routes - part * most
            return max(fewest if part < blocks else 0, min(most, left)) if left > 0 or fewest > 1 else 0

        first, second, third = map(rows_of, range(3))
        outputs = e * (routes + blocks * (fewest - 1)) * self.spec.hidden_size
        # What is gathered in place of the outputs, which are counted apart.
        computing = whole = self.through_experts(first, first)
        if e < FLOAT32:
            computing += self.gate_up(second, second) + self.swiglu(second)
        else:
            computing += self.through_experts(second, second)
            computing += self.gate_up(third, third) + e * third * self.spec.hidden_size
        at_end = whole + 2 * e * routes * self.spec.hidden_size + self.summed()
        return outputs + max(computing, at_end)


class _OnGpu(Counting):
    """A kernel each for a norm, a rotation, an attention and what is elementwise between them. Measured on CUDA."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        L: int,
        offset: int,
        itemsize: int,
        kv_bits: int | None,
        slots: int | None,
        backend: str,
        products_to: int = 0,
    ) -> None:
        super().__init__(spec, layer, L, offset, itemsize, kv_bits, slots)
        self.backend, self.products_to = backend, products_to
        # With what they are padded with; a few tokens that are left over may take more than a whole chunk.
        k, num_experts, ways = layer.experts_per_token, layer.num_experts, _EXPERT_WAYS[backend]
        self.places = most_places(L, k, num_experts, ways) if k else 0
        if self.slots is not None:
            self.places = most_places_by_blocks(L, k, num_experts, self.slots, ways)

    def before(self) -> int:
        e, is_moe = self.itemsize, self.layer_spec.num_experts > 0
        norm = (FLOAT32 + e) * self.hidden + e * self.new_keys if is_moe else e * self.hidden
        return norm + e * self.qkv + e * self.rotated

    def attention(self) -> int:
        e, window = self.itemsize, self.layer_spec.window
        total = e * self.queries
        if window is None:
            if self.stays_packed:
                return total + self.over_packed()
            if self.is_packed:
                total += e * self.keys_and_values(self.num_keys)
            return total + (self.by_products() if self.goes_by_products else self.without_a_kernel())
        if self.joins:
            total += e * self.keys_and_values(self.num_keys)
        if self.goes_by_products:
            return total + self.by_products()
        if not self.in_blocks:
            return total + self.without_a_kernel()
        n = -(-self.L // window)
        total += e * self.keys_and_values((n + 1) * window) + e * self.keys_and_values(2 * n * window)
        # With a mask there is no fused kernel: the scores, and copies of queries and results around them.
        scores = self.layer_spec.num_heads * n * window * 2 * window
        return total + e * scores + (3 if self.L % window == 0 else 4) * e * self.queries

    @property
    def goes_by_products(self) -> bool:
        """Whether a chunk beside other requests attends by products (models/rows.py)."""
        if self.is_packed or not self.products_to or self.L <= 1:
            return False
        return uses_products(self.layer_spec.num_heads, *self.rounded(), self.products_to)

    def rounded(self) -> tuple[int, int]:
        """Queries and keys with those that are nobody's."""
        length, keys = self.L, self.offset + self.L
        return length + num_padding(length), keys + num_padding(keys)

    def by_products(self) -> int:
        """A block's scores, with what is not seen far below, and weights, each an array; with sinks the second in float32.

        Beside them scaled queries and results, block by block and together. Earlier blocks are counted as given back.
        """
        heads, (length, keys) = self.layer_spec.num_heads, self.rounded()
        if self.layer_spec.window is not None:  # of a ring no places are read that nobody has written into
            length, keys = self.L, self.num_keys
        block = min(length, queries_in_a_block(heads, keys, self.products_to))
        masked = FLOAT32 + self.itemsize if self.layer_spec.num_experts else self.itemsize
        return heads * block * keys * (self.itemsize + masked) + 3 * self.itemsize * self.queries

    def without_a_kernel(self) -> int:
        """The scores where MLX has no kernel for such an attention and takes products, and copies as with a mask."""
        if self.L == 1 or self.has_kernel:
            return 0
        return self.itemsize * (self.layer_spec.num_heads * self.L * self.num_keys + 3 * self.queries)

    @property
    def has_kernel(self) -> bool:
        """Whether MLX has one for several queries: cuDNN's is for 16 bits and no mask, Metal's for some sizes of heads."""
        layer = self.layer_spec
        if self.backend == "cuda":
            return self.itemsize < FLOAT32 and (layer.window is None or layer.window >= self.num_keys)
        if self.L > _FEW_QUERIES:
            return layer.head_dim in _METAL_HEADS
        is_few = self.L * layer.num_heads // layer.num_kv_heads <= _FEW_BESIDE_A_KEY
        return layer.head_dim in _METAL_HEADS_OF_FEW and is_few

    def after(self) -> int:
        e = self.itemsize
        if not self.layer_spec.num_experts:
            return e * (self.queries + 3 * self.hidden + 3 * self.L * self.layer_spec.intermediate_size)
        routed, inner = self.places * self.spec.hidden_size, self.places * self.layer_spec.intermediate_size
        stream = (3 * e + 4 * FLOAT32) * self.hidden
        routing = FLOAT32 * (3 * self.L * self.layer_spec.num_experts + 8 * self.routes)
        return stream + routing + e * (4 * routed + 5 * inner)
