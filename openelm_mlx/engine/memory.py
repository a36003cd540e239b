"""What many requests may take together: asked before one is admitted, and every few tokens of those that run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, final

import mlx.core as mx

from ..decoding.budget import Budget
from ..decoding.prefix_cache import PrefixCache
from ..memory.admission import TOKENS_AT_ONCE
from ..models.slots import SlotBank
from ..runtime import runtime_of
from .active import ActiveRequest

if TYPE_CHECKING:
    from ..models import Model

# A request is admitted when so many tokens of its answer have room beside all others' next ones. More are not kept
# ready: most answers end long before their limit, and who comes last gives way when it gets tight.
ADMITTED_TOKENS = 4 * TOKENS_AT_ONCE


@final
class BatchMemory:
    """The plan's budget, as all requests of an engine share it. Without a plan everything fits.

    held_bytes: keys and values of those that run. `active_memory` can be injected.
    """

    def __init__(self, model: Model, bank: SlotBank, active_memory: Callable[[], int] | None = None) -> None:
        self._model, self._bank = model, bank
        self._itemsize = model.embed(mx.array([[0]])).dtype.size  # lazy: nothing is computed
        self._active_memory = mx.get_active_memory if active_memory is None else active_memory
        self.held_bytes = 0

    @property
    def limit(self) -> int | None:
        plan = runtime_of(self._model).plan
        return None if plan is None else plan.budget_bytes

    def without_requests(self) -> int:
        """Bytes in use, but for what running requests hold: what a request would find if it were alone."""
        return max(0, self._active_memory() - self.held_bytes)

    def changed(self, running: Iterable[ActiveRequest]) -> None:
        """Somebody's keys and values have grown, or are gone."""
        self.held_bytes = self._bank.nbytes + sum(
            layer.nbytes for each in running if each.turn is not None for layer in each.cache
        )

    def has_room_for(self, request: ActiveRequest, running: Sequence[ActiveRequest]) -> bool:
        """Whether one more fits beside those that run. Kept prefixes give way first."""
        if self.limit is None:
            return True
        checked = request.sequence.request
        cache = checked.make_cache(self._model)
        wanted = len(checked.prompt_tokens) + len(request.sequence.tokens) + min(request.num_left, ADMITTED_TOKENS)
        new = Budget(self._model, cache, active_memory=self._active_memory)
        chunk = min(len(checked.prompt_tokens), new.planned_chunk)
        return self._fits([*self._growing(running), (new, wanted)], chunk + len(running), [*running, request])

    def can_grow(self, growing: Sequence[ActiveRequest], running: Sequence[ActiveRequest]) -> bool:
        """Whether the next tokens of these have room. Kept prefixes give way first."""
        return self.limit is None or self._fits(self._growing(growing), len(running), running)

    def has_slot_for(self, request: ActiveRequest) -> bool:
        """Whether the bank of slots has room for one more, its own cache being there until it has joined."""
        limit = self.limit
        if limit is None:
            return True
        length = request.position + min(request.num_left, TOKENS_AT_ONCE + 1)
        more = self._bank.nbytes_with(1, length, self._itemsize) - self._bank.nbytes
        # A buffer that grows is there twice, one layer at a time.
        copied = 2 * self._bank.nbytes // max(1, len(self._model.spec.layers))
        return self._active_memory() + max(0, more) + copied <= limit

    def forget_kept(self, requests: Iterable[ActiveRequest]) -> bool:
        """Forget the oldest of the kept prefixes. False when none is left."""
        stores: dict[int, PrefixCache] = {}
        for each in requests:
            store = each.sequence.request.prefix_cache
            if store is not None:
                stores[id(store)] = store
        found = any(store.forget_oldest() for store in stores.values())
        if found:
            mx.clear_cache()
        return found

    def _growing(self, requests: Iterable[ActiveRequest]) -> list[tuple[Budget, int]]:
        """Those that have a cache, and how many tokens each is to have room for."""
        found = []
        for each in requests:
            if each.turn is None or each.bank is not None:
                continue
            total = each.turn.num_prompt_tokens + len(each.sequence.tokens)
            found.append((each.budget, total + min(each.num_left, TOKENS_AT_ONCE + 1)))
        return found

    def _fits(self, growing: Sequence[tuple[Budget, int]], num_rows: int, requests: Sequence[ActiveRequest]) -> bool:
        limit = self.limit
        assert limit is not None
        longest = self._bank.longest + TOKENS_AT_ONCE + 1
        more = (
            max(0, self._bank.nbytes_with(0, longest, self._itemsize) - self._bank.nbytes) if self._bank.longest else 0
        )
        copied = scratch = 0
        for budget, total in growing:
            grown, twice = budget.growth(total)
            more, copied = more + grown, max(copied, twice)
            scratch = max(scratch, budget.scratch(num_rows))
        while self._active_memory() + more + copied + scratch > limit:
            if not self.forget_kept(requests):
                return False
        return True
