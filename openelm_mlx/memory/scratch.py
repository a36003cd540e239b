"""Scratch memory: the arrays besides weights and caches that are alive at the same time, computed from the shapes.

MLX allocates an array when the operation that makes it is dispatched, and frees it when the last operation that reads it
has been computed. A prompt goes through a model part by part (decoding/prefill.py, `in_turn`), so the live arrays are all
those that one part makes: on the CPU one part of a layer, on a GPU two successive layers. An elementwise operation reuses
its input's memory if nothing else reads it.

The sums follow from the code in `models/`; a test measures each part on the CPU. GPUs have kernels where the CPU needs
several steps; their internal memory was measured on CUDA and is assumed for Metal (docs/memory.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..models.routing_ways import BY_SORTING, IN_BLOCKS, MOST_ROUTES_OF_A_TABLE, ExpertWays, most_places
from ..specs import KV_SCORES_BYTES, KV_STEP, KV_UNPACK_FROM, LayerSpec, ModelSpec, kv_capacity

FLOAT32 = 4
# How many arrays of the logits' size sampling needs.
LOGITS_COPIES = 3
# How many layers of a prompt's chunk may be in memory at the same time (decoding/prefill.py, `in_turn`). Where a layer takes
# 0.2 ms, as on a fast GPU, memory comes back layers later than it could, and waiting for it would take as long as the work.
LAYERS_IN_FLIGHT = {"metal": 2, "cuda": 4}
# How a GPU's rows go through their experts unless `selfcheck` found another way faster (models/precision.py).
_EXPERT_WAYS = {"metal": BY_SORTING, "cuda": IN_BLOCKS}
# The most tokens that are verified at once in speculative decoding, with all outputs of every layer.
GUESSED = 9


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
    spec: ModelSpec, layer: LayerSpec, L: int, offset: int, itemsize: int, backend: str, kv_bits: int | None = None
) -> LayerScratch:
    """The scratch memory of one layer for `L` tokens after `offset` cached ones, with numbers of `itemsize` bytes."""
    return _counting(spec, layer, L, offset, itemsize, backend, kv_bits).layer()


def _counting(
    spec: ModelSpec, layer: LayerSpec, L: int, offset: int, itemsize: int, backend: str, kv_bits: int | None
) -> _Counting:
    if backend == "cpu":
        return _OnCpu(spec, layer, L, offset, itemsize, kv_bits)
    return _OnGpu(spec, layer, L, offset, itemsize, kv_bits, _EXPERT_WAYS[backend])


class _Counting:
    """The shapes, and the sums that both backends share."""

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, L: int, offset: int, itemsize: int, kv_bits: int | None
    ) -> None:
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


class _OnCpu(_Counting):
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
        routed, inner = self.routes * self.spec.hidden_size, self.routes * self.layer_spec.intermediate_size
        add = FLOAT32 * self.hidden + self.cast(self.hidden) + self.rounded(self.hidden)
        norm = 2 * FLOAT32 * self.hidden + self.rounded(self.hidden)
        router = 3 * FLOAT32 * self.L * self.layer_spec.num_experts
        gate_up = self.cast(routed) + FLOAT32 * 2 * inner + self.rounded(2 * inner) + e * 2 * inner
        swiglu = 3 * FLOAT32 * inner + (2 * self.cast(inner) + self.rounded(inner) if e < FLOAT32 else 0)
        down = self.cast(inner) + FLOAT32 * routed + self.rounded(routed) + 3 * e * routed
        # To be summed (models/moe.py, `weighted_sum`).
        is_copied = e < FLOAT32 and self.routes <= MOST_ROUTES_OF_A_TABLE
        summed = 2 * (e + FLOAT32) * self.hidden + (FLOAT32 * routed if is_copied else 0)
        return merged + 2 * add + norm + router + e * routed + gate_up + swiglu + down + summed


class _OnGpu(_Counting):
    """A kernel each for a norm, a rotation, an attention and what is elementwise between them. Measured on CUDA."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        L: int,
        offset: int,
        itemsize: int,
        kv_bits: int | None,
        expert_ways: ExpertWays,
    ) -> None:
        super().__init__(spec, layer, L, offset, itemsize, kv_bits)
        # With what they are padded with; a few tokens that are left over may take more than a whole chunk.
        k = layer.experts_per_token
        self.places = most_places(L, k, layer.num_experts, expert_ways) if k else 0

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
            return total + (e * self.keys_and_values(self.num_keys) if self.is_packed else 0)
        if self.joins:
            total += e * self.keys_and_values(self.num_keys)
        if self.in_blocks:
            n = -(-self.L // window)
            total += e * self.keys_and_values((n + 1) * window) + e * self.keys_and_values(2 * n * window)
            # With a mask there is no fused kernel: the scores, and copies of queries and results around them.
            scores = self.layer_spec.num_heads * n * window * 2 * window
            total += e * scores + (3 if self.L % window == 0 else 4) * e * self.queries
        return total

    def after(self) -> int:
        e = self.itemsize
        if not self.layer_spec.num_experts:
            return e * (self.queries + 3 * self.hidden + 3 * self.L * self.layer_spec.intermediate_size)
        routed, inner = self.places * self.spec.hidden_size, self.places * self.layer_spec.intermediate_size
        stream = (3 * e + 4 * FLOAT32) * self.hidden
        routing = FLOAT32 * (3 * self.L * self.layer_spec.num_experts + 8 * self.routes)
        return stream + routing + e * (4 * routed + 5 * inner)


@lru_cache(maxsize=4096)  # a plan tries many lengths, and a table of Macs the same ones for each of them
def scratch_bytes(
    spec: ModelSpec, chunk: int, context: int, itemsize: int, batch_size: int, backend: str, kv_bits: int | None = None
) -> int:
    """The largest scratch memory of all passes over a prompt's chunks, or over one token.

    chunk, context: tokens at once, and in total, from an empty cache on: full chunks and a remainder. batch_size:
    how many requests are at work, each with so long a context: all decode, or one has a chunk of its prompt instead, or
    several prompts that are shorter share a chunk.
    """
    shared, chunk = min(chunk, batch_size * context), min(chunk, context)
    full = context // chunk * chunk
    guessed = min(GUESSED, context)
    passes = [(chunk, full - chunk, True), (context - full, full, True), (guessed, context - guessed, False)]
    largest = max(
        pass_bytes(spec, L, offset, itemsize, backend, kv_bits, is_prompt) for L, offset, is_prompt in passes if L
    )
    # A full layer's buffers are briefly in memory twice while they grow, when nothing is computed.
    grown = max(
        (layer.kv_bytes_per_token(itemsize, kv_bits) for layer in spec.layers if layer.window is None), default=0
    )
    places = kv_capacity(context, spec.context_length)
    largest = max(largest, grown * (places - KV_STEP))
    if batch_size > 1:
        flat = [
            ({context - 1: batch_size - 1}, length, offset)
            for length, offset, is_prompt in passes
            if is_prompt and length
        ]
        flat.append(({context - 1: batch_size}, 0, 0))
        if shared > chunk:  # several prompts in one pass
            parts = [PassPart(context, 0, spec.layers, kv_bits, shared // context)]
            if shared % context:
                parts.append(PassPart(shared % context, 0, spec.layers, kv_bits))
            largest = max(largest, parts_bytes(spec, parts, itemsize, backend))
        largest = max(largest, *(flat_pass_bytes(spec, *each, itemsize, backend, kv_bits) for each in flat))
    return max(largest, logits_bytes(spec, batch_size))


def logits_bytes(spec: ModelSpec, rows: int) -> int:
    """Bytes of the logits of so many rows, and of what choosing from them takes."""
    return LOGITS_COPIES * FLOAT32 * spec.vocab_size * rows


def flat_pass_bytes(
    spec: ModelSpec,
    rows: Iterable[int] | Mapping[int, int],
    chunk: int,
    offset: int,
    itemsize: int,
    backend: str,
    kv_bits: int | None = None,
) -> int:
    """Bytes that a pass over several requests takes: one token of each that decodes, `chunk` tokens of one prompt.

    rows: how many tokens each of the former has in its cache, or how many of them have so many; offset: how many the
    latter has. Products are over all of these rows together; the attentions are each request's own, and their arrays may
    all be there at the same time.
    """
    alone = [PassPart(1, cached, spec.layers, kv_bits, number) for cached, number in Counter(rows).items()]
    if chunk:
        alone.append(PassPart(chunk, offset, spec.layers, kv_bits))
    return parts_bytes(spec, alone, itemsize, backend)


class PassPart(NamedTuple):
    """What a request brings to a pass: `length` tokens after `cached` ones, in caches of its own kind.

    layers: the model's, with the windows that its caches have. kv_bits: of those that keep everything. number: of such
    requests.
    """

    length: int
    cached: int
    layers: Sequence[LayerSpec]
    kv_bits: int | None = None
    number: int = 1


def parts_bytes(spec: ModelSpec, parts: Sequence[PassPart], itemsize: int, backend: str) -> int:
    """Bytes that a pass over several requests takes, as `flat_pass_bytes`, where their caches may be of different kinds."""
    L = sum(part.number * part.length for part in parts)
    if not L:
        return 0

    def layer_of(layers: Sequence[LayerSpec]) -> LayerScratch:
        together = _counting(spec, layers[0], L, 0, itemsize, backend, parts[0].kv_bits)
        attention = itemsize * together.queries  # what each request's gives, side by side
        attention += sum(
            part.number * _counting(spec, layer, part.length, part.cached, itemsize, backend, part.kv_bits).attention()
            for layer, part in zip(layers, parts, strict=True)
        )
        kept = itemsize * (together.qkv + together.rotated)
        return LayerScratch(together.before(), attention, together.after(), kept, itemsize * together.queries)

    stream = L * spec.hidden_size * (FLOAT32 if spec.layers[0].num_experts else itemsize)
    # Many layers have the same shape: each is counted once.
    kinds = dict.fromkeys(zip(*(part.layers for part in parts), strict=True))
    scratch = [layer_of(layers) for layers in kinds]
    if backend == "cpu":
        tables = 4 * FLOAT32 * L * max(layer.head_dim for layer in spec.layers)
        return stream + tables + max(_largest_part(each) for each in scratch)
    return stream + min(LAYERS_IN_FLIGHT[backend], len(spec.layers)) * max(each.all for each in scratch)


def slots_bytes(spec: ModelSpec, slots: int, columns: int, itemsize: int, backend: str) -> int:
    """Bytes of one attention of all slots by products (models/slots.py): scores, hidden ones far below, weights.

    columns: of the layers that keep everything.
    """
    scores = max(layer.num_heads * min(columns, layer.window or columns) for layer in spec.layers)
    return LAYERS_IN_FLIGHT.get(backend, 1) * slots * scores * (2 * itemsize + FLOAT32)


def _largest_part(layer: LayerScratch) -> int:
    """Of a layer whose parts are computed one after the other."""
    return max(layer.before, layer.projected + layer.attention, layer.attended + layer.after)


def pass_bytes(
    spec: ModelSpec,
    L: int,
    offset: int,
    itemsize: int,
    backend: str,
    kv_bits: int | None = None,
    is_prompt: bool = False,
) -> int:
    """The scratch memory of one pass for `L` tokens after `offset` cached ones. is_prompt: of the last layer only the new keys
    and values, and one token, are computed.
    """
    head_dim = max(layer.head_dim for layer in spec.layers)
    stream = L * spec.hidden_size * (FLOAT32 if spec.layers[0].num_experts else itemsize)
    # Many layers have the same shape, gpt-oss's two of them in turns: each is counted once.
    of = {
        layer: layer_scratch(spec, layer, L, offset, itemsize, backend, kv_bits) for layer in dict.fromkeys(spec.layers)
    }
    is_cut = is_prompt and L > 1
    last = of[spec.layers[-1]].before if is_cut else 0
    num_complete = len(spec.layers) - is_cut
    complete = [of[layer] for layer in dict.fromkeys(spec.layers[:num_complete])]
    if backend == "cpu":
        tables = 4 * FLOAT32 * L * head_dim  # cosines and sines, and what they are made from
        return stream + tables + max((last, *map(_largest_part, complete)))
    largest, most = max((each.all for each in complete), default=0), LAYERS_IN_FLIGHT[backend]
    return stream + min(most, num_complete) * largest + (last if num_complete < most else 0)
