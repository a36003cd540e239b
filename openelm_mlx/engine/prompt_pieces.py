"""Which pieces of prompts the next pass computes, with the memory and the slots that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

from ..decoding.budget import chunk_of_plan
from ..models.slot_sizes import slots_for
from ..models.slots import SlotBank
from .active import ActiveRequest
from .lifecycle import Lifecycle
from .memory import BatchMemory
from .pace import LEAST_CHUNK
from .scheduler import Scheduler
from .slots import is_to_join, join_prompts, takes_prompt

if TYPE_CHECKING:
    from ..models import Model


@final
class PromptPieces:
    """See the module. cores: that share a pass. finish_host_work: called before somebody gives way."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler[ActiveRequest],
        bank: SlotBank,
        memory: BatchMemory,
        life: Lifecycle,
        cores: int,
        finish_host_work: Callable[[], None],
    ) -> None:
        self._model, self._scheduler, self._bank = model, scheduler, bank
        self._memory, self._life, self._cores = memory, life, cores
        self._finish_host_work = finish_host_work
        self._chunk = chunk_of_plan(model)
        self._moving: list[ActiveRequest] = []

    def next(self) -> list[tuple[ActiveRequest, int]]:
        """Whose prompts are gone on with, and by how many tokens each."""
        while (found := self._next()) is None:
            pass
        return found

    def _next(self) -> list[tuple[ActiveRequest, int]] | None:
        """As `next`; None where somebody had to give way, and it is to be asked again."""
        scheduler, decoding = self._scheduler, self._scheduler.decoding
        scheduler.pace.is_one = len(decoding) == 1
        if scheduler.pace.is_usual_due and self._can_be_measured():
            return []
        beside = self._limit_pieces()
        wanted = scheduler.next_prompts(max(LEAST_CHUNK, self._chunk - beside), self._cores, beside)
        if not wanted:
            return []
        coming = [request for request, _ in wanted if request.job.longest is not None]
        join_prompts(self._bank, self._memory, coming, scheduler.num_running)
        first, length = wanted[0]
        fitting = self._memory.longest_piece(first, length, decoding)
        if not fitting:
            self._life.make_way(first, self._finish_host_work)
            return None
        found = [(first, first.job.piece(fitting))]
        for each in wanted[1:] if fitting == length else ():
            if not self._memory.has_room_for_pieces([*found, each], decoding):
                break
            found.append(each)
        if coming and self._look_who_moves():
            return []
        for request, piece in found:
            self._memory.reserve(request, request.position + piece)
        self._memory.changed(scheduler.running())
        return found

    def _can_be_measured(self) -> bool:
        """Whether a step without a chunk says how long the usual one takes: somebody has a token in every step."""
        decoding = [each for each in self._scheduler.decoding if each.can_go_on and not each.replay]
        if any(each.has_token_to_feed for each in decoding):
            return True
        # One that asks for logits is measured where it is computed by itself, which it is not beside prompts in slots.
        return len(decoding) == len(self._scheduler.decoding) == 1 and not self._bank.num_owners

    def _limit_pieces(self) -> int:
        """Say how long a piece of each prompt may be. Gives the rows that a pass with prompts in slots has anyway, 0 where
        none is to be in one.
        """
        scheduler, are_any = self._scheduler, False
        are_several = scheduler.num_running > 1
        for each in scheduler.prompts:
            is_in_slot = each.bank is not None or (are_several and takes_prompt(self._bank, each, self._model))
            each.job.longest = self._bank.longest_piece if is_in_slot else None
            are_any |= is_in_slot
        return max(len(self._bank), slots_for(scheduler.num_running)) if are_any else 0

    def _look_who_moves(self) -> bool:
        """Whether somebody who decodes moves into a slot beside prompts in this step, which is enough for one.

        Whoever could not be moved then does not hold prompts up again.
        """
        before = self._moving
        self._moving = [each for each in self._scheduler.decoding if is_to_join(each, self._model)]
        return self._bank.num_owners > 0 and any(each not in before for each in self._moving)
