"""What many requests may take together: asked before one is admitted, before a prompt's chunk, and every few tokens.

The arithmetic is the plan's (memory/admission.py); here it is told what the requests of an engine really hold. Counted are
the memory in use now, what caches and slots grow by, and the arrays of the next pass.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, final

import mlx.core as mx

from ..checks import size
from ..decoding.budget import chunk_of_plan
from ..decoding.prefix_cache import PrefixCache
from ..errors import MemoryLimitError
from ..memory.admission import LEAST_CHUNK, TOKENS_AT_ONCE, Admission, RequestMemory
from ..memory.cache_bytes import Growth
from ..memory.machine import backend_name
from ..memory.plan import USUAL_CONTEXT
from ..memory.plan_types import MemoryPlan
from ..models.cache import cache_bytes
from ..models.slots import SlotBank
from ..runtime import runtime_of
from ..specs import KV_STEP
from .active import ActiveRequest
from .request import Request
from .request_memory import PassRow, RequestMemories, model_caches

if TYPE_CHECKING:
    from ..models import Model

# A request is admitted when so many tokens of its answer have room beside all others' next ones. More are not kept
# ready: most answers end long before their limit, and who comes last gives way when it gets tight.
ADMITTED_TOKENS = 4 * TOKENS_AT_ONCE
# Requests at once where nobody says.
MAX_RUNNING = 64
# Bytes of freed buffers that MLX keeps at most while requests are in slots, and what part of the budget. Chunks of many
# lengths leave many sizes behind.
KEPT_IN_CACHE, KEPT_PART = 2**33, 1 / 16
# Of more requests, only how long they are in steps of the caches is looked at.
_LOOKED_AT = 4


class OtherModels(Protocol):
    """Other engines in the same memory. stores: their kept prefixes, which give way to this one's requests, too."""

    stores: Sequence[PrefixCache]

    def takes(self) -> int:
        """All bytes that they may use: weights, requests and computing."""

    def reserved(self) -> int:
        """Of those, what is not in use now."""

    def are_computing(self) -> bool:
        """Whether what is seen of MLX's memory may be theirs."""


@final
class BatchMemory:
    """The plan's budget, as all requests of an engine share it. Without a plan everything fits.

    held_bytes: keys and values of those that run. `active_memory` can be injected.
    """

    def __init__(self, model: Model, bank: SlotBank, active_memory: Callable[[], int] | None = None) -> None:
        self._model, self._bank = model, bank
        self._itemsize = model.embed(mx.array([[0]])).dtype.size  # lazy: nothing is computed
        self._own_view = mx.get_active_memory if active_memory is None else active_memory
        self._neighbours: OtherModels | None = None
        self.held_bytes = 0
        # What a pass has taken beyond its plan, as far as that was seen; until nobody runs.
        self._excess = 0
        # In use when nobody ran, kept prefixes left out, and adapters, which come and go.
        self._without_requests = self._active_memory() - self._adapters()
        self._memories = RequestMemories(model, self._itemsize)
        self._stores: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._admission: tuple[MemoryPlan, Admission] | None = None
        self._computing: dict[tuple[object, ...], int] = {}

    def share(self, neighbours: OtherModels | None) -> None:
        """Other engines are in the same memory from now on; None: no more."""
        more, less = (0 if each is None else each.takes() for each in (neighbours, self._neighbours))
        self._neighbours = neighbours
        self._without_requests += more - less

    def _adapters(self) -> int:
        return self._model.adapters.served.nbytes

    @property
    def limit(self) -> int | None:
        plan = runtime_of(self._model).plan
        return None if plan is None else plan.budget_bytes

    @property
    def admission(self) -> Admission:
        """The plan's arithmetic."""
        plan = runtime_of(self._model).plan
        if self._admission is None or self._admission[0] is not plan:
            made = admission_of(self._model, plan, self._itemsize)
            if plan is None:
                return made
            self._admission = plan, made
            self._computing.clear()
        return self._admission[1]

    # --- a request by itself: called from any thread ---

    def without_requests(self) -> int:
        """Bytes that are in use whoever runs: what requests hold, compute with, or kept for later ones is not among them."""
        adapters = self._adapters()
        in_use = self._active_memory() - self.held_bytes - self._kept_bytes() - adapters
        return min(self._without_requests, max(0, in_use)) + adapters

    def check(self, request: Request, max_tokens: int) -> None:
        """Raise MemoryLimitError for a request that can never fit, whoever runs now, with what would."""
        if (failure := runtime_of(self._model).failure) is not None:
            raise MemoryLimitError(failure)
        self._know(request.prefix_cache)
        self._alone(request).check(len(request.prompt_tokens), max_tokens, self.without_requests())

    def room_for_answer(self, request: Request, most: int) -> int:
        """How many tokens of an answer would fit if nobody else ran, at most `most`; 0 if none does."""
        if self.limit is None:
            return most
        longest = self._alone(request).longest(self.without_requests(), [], RequestMemory(0, 0))
        return max(0, min(most, longest - len(request.prompt_tokens)))

    def _alone(self, request: Request) -> Admission:
        return replace(self.admission, caches=self._memories.caches_of(request))

    # --- those that run: called from the engine's thread ---

    def changed(self, running: Iterable[ActiveRequest]) -> None:
        """Somebody's keys and values have grown, or are gone."""
        running = list(running)
        self.held_bytes = self._bank.nbytes + sum(
            cache_bytes(each.cache) for each in running if each.turn is not None and each.bank is None
        )
        if not running:
            self._excess = 0
            in_use = self._active_memory() - self.held_bytes - self._kept_bytes() - self._adapters()
            self._without_requests = min(self._without_requests, max(0, in_use))

    def has_room_for(self, request: ActiveRequest, running: Sequence[ActiveRequest]) -> bool:
        """Whether one more fits beside those that run. Kept prefixes give way first."""
        if self.limit is None:
            return True
        checked = request.sequence.request
        self._know(checked.prefix_cache)
        length = len(checked.prompt_tokens)
        chunk = min(length, checked.prefill_chunk or self.admission.chunk)
        new = self._memories.of_new(request, ADMITTED_TOKENS, self.admission.chunk)
        rows = [self._memories.row(each) for each in running]
        first = chunk, length - chunk, self._memories.caches_of(checked)
        return self._fits([*(self._memories.of(each) for each in running), new], [*rows, first], len(rows))

    def can_grow(self, running: Sequence[ActiveRequest]) -> bool:
        """Whether the next tokens of all have room beside each other. Kept prefixes give way first."""
        if self.limit is None:
            return True
        rows = [self._memories.row(each) for each in running]
        return self._fits([self._memories.of(each) for each in running], rows, len(rows))

    def longest_piece(self, request: ActiveRequest, wanted: int, decoding: Sequence[ActiveRequest]) -> int:
        """How many tokens of a prompt to compute beside those who decode: `wanted`, or half of it, or a quarter ...

        Kept prefixes give way first, where that is enough; 0 when not even 16 tokens fit.
        """
        length = wanted
        while short := self._shortage(*self._pass_of([(request, length)], decoding)):
            if short <= self._kept_bytes() and self.forget_kept():
                continue
            if length <= LEAST_CHUNK:
                return 0
            length = max(LEAST_CHUNK, length // 2)
        return length

    def has_room_for_pieces(
        self, pieces: Sequence[tuple[ActiveRequest, int]], decoding: Sequence[ActiveRequest]
    ) -> bool:
        """Whether these pieces of prompts fit into one pass, beside those who decode."""
        return not self._shortage(*self._pass_of(pieces, decoding))

    def has_slot_for(self, request: ActiveRequest, num_more: int = 1, num_tokens: int = 0) -> bool:
        """Whether the bank of slots has room for one more, its own cache being there until it has joined.

        num_more: and for others, so many in all. num_tokens: that the longest of them will have.
        """
        limit = self.limit
        if limit is None:
            return True
        length = max(request.position, request.num_prompt_tokens) + min(request.num_left, TOKENS_AT_ONCE + 1)
        growth = sum(self._bank_growth(num_more, max(length, num_tokens)))
        # A prompt that had a slot, and no room for a pass, would give way again.
        caches = self._memories.caches_of(request.sequence.request)
        computing = self._pass_bytes([(LEAST_CHUNK, length, caches)], 1) if request.job.chunks else 0
        return self._active_memory() + growth + computing <= limit

    def reserve(self, request: ActiveRequest, num_tokens: int | None = None) -> None:
        """Let its caches grow, one layer after the other, so that only one is in memory twice while it is copied.

        num_tokens: in all; up to where it is looked at again when that is None.
        """
        if request.turn is None or request.bank is not None:
            return
        num_tokens = self._memories.of(request).reserved if num_tokens is None else num_tokens
        for layer in request.cache:
            mx.eval(layer.reserve(num_tokens))  # before the next layer's copy is made

    def in_use(self) -> int:
        """Bytes in use now."""
        return self._own_view()

    def may_keep_cache(self) -> bool:
        """Whether freed buffers stay MLX's: some, within the budget. To give them back takes as long as many steps."""
        limit, kept = self.limit, mx.get_cache_memory()
        if limit is None:
            return kept <= KEPT_IN_CACHE
        return kept <= min(KEPT_IN_CACHE, KEPT_PART * limit) and self._active_memory() + kept <= limit

    def pass_took(self, computed: int, parts: Sequence[tuple[ActiveRequest, int, int]]) -> None:
        """Learn from a pass: `computed` bytes beside what was in use. parts: requests, their tokens, cached ones before."""
        neighbours = self._neighbours
        if self.limit is not None and (neighbours is None or not neighbours.are_computing()):
            made = [(length, cached, self._memories.caches_of(each.sequence.request)) for each, length, cached in parts]
            self._excess = max(self._excess, computed - self._pass_bytes(made, len(made)))

    def forget_kept(self) -> bool:
        """Forget the oldest of the kept prefixes of every store. False when none is left."""
        found = [store.forget_oldest() for store in self._known_stores()]
        if any(found):
            mx.clear_cache()
        return any(found)

    def refusal(self, request: ActiveRequest) -> MemoryLimitError:
        """Why a request cannot go on though nobody else runs."""
        held = self._memories.of(request)
        count = len(request.sequence.tokens)
        if request.job.chunks and not count:
            what = f"The prompt was stopped after {request.position:,} tokens"
            advice = "shorten the prompt"
        else:
            what, advice = f"The answer was stopped after {count:,} tokens", "ask for fewer tokens"
        growth = self._growth([held])
        needed = self._needed([held], [self._memories.row(request)], 1)
        in_use = self._active_memory()
        return MemoryLimitError(
            f"{what}, before it would pass the memory limit: {size(in_use)} are in use, the keys and values of "
            f"{held.most:,} tokens take {size(growth.more)} more and computing takes "
            f"{size(needed - in_use - growth.more)}, together {size(needed)} of the {size(self.limit or 0)} allowed. "
            f"The model can be used again: {advice}, or raise memory_limit (--memory-limit)."
        )

    # --- the sum ---

    def _growth(self, held: Sequence[RequestMemory]) -> Growth:
        """Of the requests' own caches, and of the slots."""
        growth = self.admission.growth(held)
        bank = self._bank
        if not bank.num_owners:
            return growth
        more, copied = self._bank_growth(0, bank.longest + TOKENS_AT_ONCE + 1)
        return growth if not more else Growth(growth.more + more, max(growth.copied, copied))

    def _bank_growth(self, num_more: int, length: int) -> Growth:
        """Of the slots, with so many more requests, the longest of all of `length` tokens."""
        bank = self._bank
        more = bank.nbytes_with(num_more, length, self._itemsize) - bank.nbytes
        # A buffer that grows is there twice, one layer at a time.
        return Growth(max(0, more), 2 * bank.nbytes // max(1, len(self._model.spec.layers)))

    def _needed(self, held: Sequence[RequestMemory], parts: Sequence[PassRow], num_logits: int) -> int:
        growth = self._growth(held)
        computing = self._pass_bytes(parts, num_logits) + self._excess
        return self._active_memory() + growth.more + max(growth.copied, computing)

    def _shortage(self, held: Sequence[RequestMemory], parts: Sequence[PassRow], num_logits: int) -> int:
        """By how many bytes that is above the limit; 0 when it fits."""
        limit = self.limit
        if limit is None or self._needed(held, parts, num_logits) <= limit:
            return 0
        with contextlib.suppress(RuntimeError):  # of work that had failed, which whoever reads its results is told
            mx.synchronize()  # what is being computed now is not there then
        return max(0, self._needed(held, parts, num_logits) - limit)

    def _fits(self, held: Sequence[RequestMemory], parts: Sequence[PassRow], num_logits: int) -> bool:
        """Whether that fits, once as many kept prefixes are gone as it takes."""
        while self._shortage(held, parts, num_logits):
            if not self.forget_kept():
                return False
        return True

    def _pass_of(
        self, pieces: Sequence[tuple[ActiveRequest, int]], decoding: Sequence[ActiveRequest]
    ) -> tuple[list[RequestMemory], list[PassRow], int]:
        """What a pass of these pieces of prompts and of those who decode grows, computes and gives logits of."""
        held = [self._memories.of(each) for each in decoding]
        parts = [self._memories.row(each) for each in decoding]
        for request, length in pieces:
            offset, caches = request.position, self._memories.caches_of(request.sequence.request)
            held.append(self._memories.of(request)._replace(reserved=offset + length))
            parts.append((length, offset, caches))
        return held, parts, len(parts)

    def _pass_bytes(self, parts: Sequence[PassRow], num_logits: int) -> int:
        """The arrays of a pass."""
        is_long = len(parts) > _LOOKED_AT
        counts = Counter(
            (length, -(-cached // KV_STEP) * KV_STEP if is_long else cached, id(caches), caches.kv_bits, caches.window)
            for length, cached, caches in parts
        )
        key = (tuple(sorted(counts.items(), key=str)), num_logits)
        admission = self.admission
        if key not in self._computing:
            if len(self._computing) > 4096:
                self._computing.clear()
            kinds = {id(caches): caches for _, _, caches in parts}
            made = [
                admission.part(length, cached, kinds[kind])._replace(number=number)
                for (length, cached, kind, *_), number in counts.items()
            ]
            self._computing[key] = admission.parts_bytes(made, num_logits)
        return self._computing[key]

    # --- kept prefixes ---

    def _know(self, store: PrefixCache | None) -> None:
        """A request came with a store, which this engine may empty when memory is short."""
        if store is None:
            return
        with self._lock:
            if store not in self._stores:
                self._stores.add(store)
                self._without_requests = max(0, self._without_requests - store.nbytes)

    def _known_stores(self) -> list[PrefixCache]:
        neighbours = self._neighbours
        with self._lock:
            return [*self._stores, *(() if neighbours is None else neighbours.stores)]

    def _active_memory(self) -> int:
        """Bytes in use now, and what other engines must be able to use."""
        neighbours = self._neighbours
        return self._own_view() + (0 if neighbours is None else neighbours.reserved())

    def _kept_bytes(self) -> int:
        return sum(store.nbytes for store in self._known_stores())


def default_max_running(model: Model) -> int:
    """How many requests an engine runs at once where nobody says: as many as the model was loaded for (`batch_size`), or as
    the plan has room for at a usual length, at most 64 then; 64 without a plan.
    """
    plan = runtime_of(model).plan
    if plan is None:
        return MAX_RUNNING
    if plan.batch_size > 1:
        return plan.batch_size
    itemsize = model.embed(mx.array([[0]])).dtype.size
    length = min(model.context_length, USUAL_CONTEXT // 4)
    return max(1, admission_of(model, plan, itemsize).most_requests(length, MAX_RUNNING))


def admission_of(model: Model, plan: MemoryPlan | None, itemsize: int) -> Admission:
    """The arithmetic of a model's plan, for requests with its own settings."""
    chunk = chunk_of_plan(model) if plan is None else plan.prefill_chunk
    return Admission.of(plan, model_caches(model, itemsize), backend_name(), chunk)
