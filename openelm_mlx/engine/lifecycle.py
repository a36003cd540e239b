"""How requests come, share a prompt, give way when memory is short, and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, final

import mlx.core as mx

from ..errors import SettingError
from ..memory.admission import TOKENS_AT_ONCE
from ..models.adapter_sets import GONE
from ..models.slots import SlotBank
from ..text.tokenizer import Tokenizer
from .active import ActiveRequest
from .flat_pass import Part, SamplerGroups
from .memory import BatchMemory
from .scheduler import Scheduler
from .sequence import Chunk

if TYPE_CHECKING:
    from ..models import Model


@final
class Lifecycle:
    """What becomes of requests between their steps. updated: those for whose readers something has come."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler[ActiveRequest],
        memory: BatchMemory,
        groups: SamplerGroups,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._scheduler, self._memory, self._groups = scheduler, memory, groups
        self.updated: dict[ActiveRequest, None] = {}

    # --- coming -------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Begin with those who wait, as far as there is room."""
        is_anybody_new = False
        while (request := self._scheduler.admit(self._fits)) is not None:
            is_anybody_new = True
            try:
                self._begin(request)
            except Exception as error:
                self.end(request, error=error)
        if is_anybody_new:
            self._memory.changed(self._scheduler.running())

    def fork(self, leader: ActiveRequest, request: ActiveRequest) -> None:
        """One more answer to the leader's prompt, which has just been computed."""
        assert leader.turn is not None
        request.begin_with(self._model, self._tokenizer, leader.turn.forked())
        request.channel.prompt_logprobs = list(leader.channel.prompt_logprobs)
        request.job.chunks.clear()
        self._scheduler.prompt_is_done(request)

    def _fits(self, request: ActiveRequest) -> bool:
        running = list(self._scheduler.running())
        return not running or self._memory.has_room_for(request, running)

    def _begin(self, request: ActiveRequest) -> None:
        if request.has_begun:
            request.begin_again(self._model)
            return
        key = request.prompt_key
        for other in self._scheduler.prompts:
            if other is not request and other.has_begun and other.prompt_key == key:
                other.followers.append(request)
                self._scheduler.follow(request)
                return
        request.begin(self._model, self._tokenizer)

    # --- going --------------------------------------------------------------------------------------------------------

    def drop_cancelled(self) -> None:
        """End those whose callers want no more."""
        for each in [*self._scheduler.waiting, *self._scheduler.running()]:
            if each.channel.is_cancelled:
                self.end(each)

    def drop_without_adapter(self) -> None:
        """End those whose adapter the model does not have any more."""
        there = self._model.adapters.served.ids
        for each in [*self._scheduler.waiting, *self._scheduler.running()]:
            if each.adapter is not None and each.adapter not in there:
                self.end(each, error=SettingError(GONE))

    def end(self, request: ActiveRequest, *, last: Chunk | None = None, error: BaseException | None = None) -> None:
        """It has ended with its `last` chunk, was cancelled, or failed. What it held is free before its caller hears of it."""
        heirs, request.followers = request.followers, []
        self._unfollow(request)
        self._scheduler.forget(request)
        self._groups.leave(request)
        if request.work is not None:
            request.work.cancel()  # where it has begun, its result is dropped: nobody waits for it
            request.work = None
        cache = None if request.turn is None else request.cache
        is_lost = request.bank is not None and request.bank.is_lost
        is_kept = error is None and request.sequence.request.prefix_cache is not None and not is_lost
        try:
            if heirs and self._inherit(request, heirs):
                is_kept, cache = False, None
            request.end(is_kept)
        except Exception as failure:  # what could not be kept is lost, and nothing else
            error, is_kept = error or failure, False
        if cache is not None and not is_kept:
            for layer in cache:
                layer.clear()
        request.channel.end(last, error)
        self.updated[request] = None
        self._memory.changed(self._scheduler.running())

    def end_all(self, requests: Sequence[ActiveRequest], make_error: Callable[[], BaseException]) -> None:
        """All of these end, and whoever waits for their prompts, each with an error of its own."""
        for each in requests:
            followers, each.followers = each.followers, []
            for one in (each, *followers):
                self.end(one, error=make_error())

    def _inherit(self, request: ActiveRequest, heirs: list[ActiveRequest]) -> bool:
        """The first of those who waited for a prompt goes on with it. False where nothing is left of it: all wait again."""
        is_lost = request.turn is None or (request.bank is not None and request.bank.is_lost)
        try:
            if not is_lost:
                request.leave_slot()
        except RuntimeError:
            is_lost = True
        if request.turn is None or is_lost:
            for each in heirs:
                self._scheduler.put_back(each)
            return False
        heir, *others = heirs
        del request.turn.tokens[request.turn.num_prompt_tokens :]  # the answer, where its prompt was computed again
        try:
            heir.begin_with(self._model, self._tokenizer, request.turn)
        except Exception as error:
            for each in others:
                self._scheduler.put_back(each)
            self.end(heir, error=error)
            raise
        heir.channel.prompt_logprobs = list(request.channel.prompt_logprobs)
        heir.followers = others
        heir.job.chunks = request.job.chunks
        self._scheduler.compute_prompt(heir)
        return True

    def _unfollow(self, request: ActiveRequest) -> None:
        """It does not wait for another's prompt any more."""
        for each in self._scheduler.prompts:
            if request in each.followers:
                each.followers.remove(request)

    # --- memory -------------------------------------------------------------------------------------------------------

    def make_room(self, finish_host_work: Callable[[], None]) -> None:
        """Let the caches of those grow who need it; who came last gives way where there is no room."""
        growing = [
            each for each in self._scheduler.decoding if each.replay or len(each.sequence.tokens) % TOKENS_AT_ONCE == 0
        ]
        if not growing:
            return
        while (running := list(self._scheduler.running())) and not self._memory.can_grow(running):
            self.make_way(running[0], finish_host_work)
        for each in growing:
            if each in self._scheduler.decoding:
                self._memory.reserve(each)
        self._memory.changed(self._scheduler.running())

    def make_way(self, request: ActiveRequest, finish_host_work: Callable[[], None]) -> None:
        """Somebody has to give way, or ends: `request`, where nobody else runs.

        One that is in a slot is computed once more apart first: its own cache has no places for others.
        """
        if self.let_youngest_give_way(finish_host_work):
            return
        if request.bank is None:
            self.end(request, error=self._memory.refusal(request))
            return
        self.recompute(request)
        mx.clear_cache()
        self._memory.changed(self._scheduler.running())

    def let_youngest_give_way(self, finish_host_work: Callable[[], None]) -> bool:
        """Who came last waits again, with its cache given up. False where only one is running."""
        request = self._scheduler.youngest(lambda each: each.work is None) or self._scheduler.youngest()
        if request is not None and request.work is not None:
            wait([request.work])
            finish_host_work()  # its source has gone on with the token that is in the cache, or it has ended
            request = self._scheduler.youngest()
        if request is None:
            return False
        self._groups.leave(request)
        self._unfollow(request)
        if request.turn is not None:
            request.give_way()
        followers, request.followers = request.followers, []
        for each in (request, *followers):
            self._scheduler.put_back(each)
        mx.clear_cache()
        self._memory.changed(self._scheduler.running())
        return True

    def recompute(self, request: ActiveRequest) -> None:
        """Its cache is not to be trusted: everything is computed once more, and then it goes on where it was."""
        request.give_way()
        self._scheduler.compute_prompt(request)
        request.begin_again(self._model)

    def recover(self, bank: SlotBank) -> None:
        """What was in slots is lost: whoever had one is computed once more."""
        for owner in [each for each in self._scheduler.running() if each.bank is bank]:
            self.recompute(owner)
        bank.clear()
        self._memory.changed(self._scheduler.running())

    def take_back(self, parts: Sequence[Part]) -> None:
        """Bring caches back to where they were before a pass that failed; recompute what cannot be brought back."""
        for part in parts:
            try:
                for layer in part.rows.cache:
                    if layer.offset > part.offset:
                        layer.rewind(layer.offset - part.offset)
            except ValueError:
                self.recompute(part.request)
