"""What each request of an engine holds and comes to hold, as admission sees it (memory/admission.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, final

from ..decoding.prefix_cache import MAX_CHECKPOINTS
from ..memory.admission import TOKENS_AT_ONCE, RequestMemory
from ..memory.cache_bytes import CacheBytes
from ..models.cache import Cache, KVCache
from ..models.quantized_cache import QuantizedKVCache
from ..specs import checked_kv_bits
from .active import ActiveRequest
from .request import Request

if TYPE_CHECKING:
    from ..models import Model

# One request in a pass: its tokens there, how many are cached before them, and in caches of which kind.
PassRow = tuple[int, int, CacheBytes]


@final
class RequestMemories:
    """Of requests to one model. itemsize: of its keys and values."""

    def __init__(self, model: Model, itemsize: int) -> None:
        self._model, self._itemsize = model, itemsize
        self._kinds: dict[tuple[int | None, int | None, int], CacheBytes] = {}

    def caches_of(self, request: Request) -> CacheBytes:
        """The caches of a request's kind."""
        window, room = request.sliding_window, request.room
        kv_bits = request.kv_bits or (None if window else self._model.kv_bits)
        key = kv_bits, window, room
        if key not in self._kinds:
            bits = checked_kv_bits(self._model.spec, kv_bits, window)
            made = model_caches(self._model, self._itemsize)
            self._kinds[key] = replace(made, kv_bits=bits, window=window, room=room)
        return self._kinds[key]

    def of(self, request: ActiveRequest, answer: int = TOKENS_AT_ONCE + 1) -> RequestMemory:
        """What it holds, with so many tokens of its answer to come."""
        checked = request.sequence.request
        total = len(checked.prompt_tokens) + len(request.sequence.tokens) + min(request.num_left, answer)
        caches = self.caches_of(checked)
        turn = request.turn
        if turn is None:  # it waits, or another computes its prompt
            return RequestMemory(0, total, 0, 0, caches)
        snapshots = 0
        if checked.prefix_cache is not None and request.job.chunks:
            snapshots = max(0, min(len(request.job.chunks) - 1, MAX_CHECKPOINTS + 1 - turn.num_checkpoints))
        if request.bank is not None:  # which grows for all; out of it, a request has a cache of its own again
            leaves = bool(snapshots or request.followers)
            return RequestMemory(
                request.position, total, 0 if leaves else max(total, request.position), snapshots, caches
            )
        position, places = request.cache[0].offset, _places(request.cache)
        if position and position == turn.num_reused:  # nothing has been written yet, and what is there may be shared
            if turn.is_fork and places <= position:
                places = 0
            else:
                snapshots += 1
        return RequestMemory(position, total, places, snapshots, caches)

    def of_new(self, request: ActiveRequest, answer: int, chunk: int) -> RequestMemory:
        """As `of`, for one that has not begun: with the snapshots of its rings that it will take, a chunk each."""
        checked = request.sequence.request
        num_chunks = -(-len(checked.prompt_tokens) // (checked.prefill_chunk or chunk))
        snapshots = 0 if checked.prefix_cache is None else min(MAX_CHECKPOINTS, num_chunks)
        return self.of(request, answer)._replace(snapshots=snapshots)

    def row(self, request: ActiveRequest) -> PassRow:
        """Its part of a pass in which it decodes."""
        return 1, self.of(request).most, self.caches_of(request.sequence.request)


def model_caches(model: Model, itemsize: int) -> CacheBytes:
    """The caches of a request that asks for none of another kind."""
    kv_bits = checked_kv_bits(model.spec, model.kv_bits)
    return CacheBytes(
        model.spec, itemsize, kv_bits, context_length=model.context_length, spare_places=model.choices.spare_places
    )


def _places(cache: Cache) -> int:
    """How many places the layers have that keep everything; 1 where there are only rings, 0 before the first token."""
    for layer in cache:
        if isinstance(layer, KVCache):
            return 0 if layer.keys is None else layer.keys.shape[2]
        if isinstance(layer, QuantizedKVCache):
            return 0 if layer.keys is None else layer.keys.weight.shape[2]
    return int(bool(cache[0].buffers))
