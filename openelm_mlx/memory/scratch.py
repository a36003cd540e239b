"""Scratch memory: the arrays besides weights and caches that are alive at the same time, computed from the shapes.

MLX allocates an array when the operation that makes it is dispatched, and frees it when the last operation that reads it
has been computed; it dispatches some hundred steps before it waits for the first ones. A prompt goes through a model part
by part (decoding/prefill.py, `in_turn`), so the live arrays are all those that one part makes, but for the first ones of a
part of more steps: on the CPU one part of a layer, on a GPU a few successive layers. An elementwise operation reuses its
input's memory if nothing else reads it.

What one layer makes is in layer_scratch.py; here are passes over all layers, of one request and of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..specs import KV_STEP, LayerSpec, ModelSpec, kv_capacity
from .layer_scratch import FLOAT32, LayerScratch, counting, layer_scratch

# How many arrays of the logits' size sampling needs.
LOGITS_COPIES = 3
# How many layers of a prompt's chunk may be in memory at the same time (decoding/prefill.py, `in_turn`). Where a layer takes
# 0.2 ms, as on a fast GPU, memory comes back layers later than it could, and waiting for it would take as long as the work.
LAYERS_IN_FLIGHT = {"metal": 2, "cuda": 4}
# The most tokens that are verified at once in speculative decoding, with all outputs of every layer.
GUESSED = 9


@lru_cache(maxsize=4096)  # a plan tries many lengths, and a table of Macs the same ones for each of them
def scratch_bytes(
    spec: ModelSpec,
    chunk: int,
    context: int,
    itemsize: int,
    batch_size: int,
    backend: str,
    kv_bits: int | None = None,
    slots: int | None = None,
) -> int:
    """The largest scratch memory of all passes over a prompt's chunks, or over one token.

    chunk, context: tokens at once, and in total, from an empty cache on: full chunks and a remainder. batch_size:
    how many requests are at work, each with so long a context: all decode, or one has a chunk of its prompt instead, or
    several prompts that are shorter share a chunk. slots: how many of a layer's experts are in memory, None: all of them.
    """
    shared, chunk = min(chunk, batch_size * context), min(chunk, context)
    full = context // chunk * chunk
    guessed = min(GUESSED, context)
    passes = [(chunk, full - chunk, True), (context - full, full, True), (guessed, context - guessed, False)]
    largest = max(
        pass_bytes(spec, L, offset, itemsize, backend, kv_bits, is_prompt, slots)
        for L, offset, is_prompt in passes
        if L
    )
    # A full layer's buffers are briefly in memory twice while they grow, when nothing is computed.
    grown = max(
        (layer.kv_bytes_per_token(itemsize, kv_bits) for layer in spec.layers if layer.window is None), default=0
    )
    places = kv_capacity(context, spec.context_length)
    largest = max(largest, grown * (places - KV_STEP))
    if batch_size > 1:
        others = PassPart(1, context - 1, spec.layers, kv_bits, batch_size - 1)
        together = [
            [others, PassPart(length, offset, spec.layers, kv_bits)]
            for length, offset, is_prompt in passes
            if is_prompt and length
        ]
        together.append([others._replace(number=batch_size)])
        if shared > chunk:  # several prompts in one pass
            parts = [PassPart(context, 0, spec.layers, kv_bits, shared // context)]
            if shared % context:
                parts.append(PassPart(shared % context, 0, spec.layers, kv_bits))
            together.append(parts)
        largest = max(largest, *(parts_bytes(spec, each, itemsize, backend, slots) for each in together))
    return max(largest, logits_bytes(spec, batch_size))


def logits_bytes(spec: ModelSpec, rows: int) -> int:
    """Bytes of the logits of so many rows, and of what choosing from them takes."""
    return LOGITS_COPIES * FLOAT32 * spec.vocab_size * rows


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


def parts_bytes(
    spec: ModelSpec, parts: Sequence[PassPart], itemsize: int, backend: str, slots: int | None = None
) -> int:
    """Bytes that a pass over several requests takes: one token of each that decodes, chunks of prompts.

    Their caches may be of different kinds. Products are over all of these rows together; the attentions are each request's
    own, and their arrays may all be there at the same time.
    """
    parts = _together(parts)
    L = sum(part.number * part.length for part in parts)
    if not L:
        return 0

    def layer_of(layers: Sequence[LayerSpec]) -> LayerScratch:
        together = counting(spec, layers[0], L, 0, itemsize, backend, parts[0].kv_bits, slots)
        attention = itemsize * together.queries  # what each request's gives, side by side
        for layer, part in zip(layers, parts, strict=True):
            own = counting(spec, layer, part.length, part.cached, itemsize, backend, part.kv_bits, is_beside=True)
            attention += part.number * own.attention()
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


def _together(parts: Sequence[PassPart]) -> Sequence[PassPart]:
    """The parts, each kind of them once: of many requests most may be alike."""
    found: dict[tuple[int, int, int, int | None], PassPart] = {}
    for part in parts:
        kind = part.length, part.cached, id(part.layers), part.kv_bits
        known = found.get(kind)
        found[kind] = part if known is None else known._replace(number=known.number + part.number)
    return list(found.values())


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
    slots: int | None = None,
) -> int:
    """The scratch memory of one pass for `L` tokens after `offset` cached ones. is_prompt: of the last layer only the new keys
    and values, and one token, are computed.
    """
    head_dim = max(layer.head_dim for layer in spec.layers)
    stream = L * spec.hidden_size * (FLOAT32 if spec.layers[0].num_experts else itemsize)
    # Many layers have the same shape, gpt-oss's two of them in turns: each is counted once.
    of = {
        layer: layer_scratch(spec, layer, L, offset, itemsize, backend, kv_bits, slots)
        for layer in dict.fromkeys(spec.layers)
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
