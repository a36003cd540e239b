"""The steps of an engine: one flat pass of the model for all that run, and what each request makes of its logits.

All of MLX's work of an engine happens here, on one thread. A step dispatches a pass, and then hands over the tokens of
the pass before, which the device has computed meanwhile. What a step does is decided by the scheduler; what a token
becomes, by the request's `Sequence`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, final

import mlx.core as mx

from ..decoding.batch_step import BatchStep
from ..decoding.prefill import is_throttled
from ..decoding.tokens import computed
from ..errors import SettingError
from ..models.rows import Rows
from ..runtime import runtime_of
from ..text.tokenizer import Tokenizer
from .active import ActiveRequest, Pending
from .delivery import Delivery
from .expert_shares import ExpertShares
from .failures import Failures
from .flat_pass import (
    Part,
    SamplerGroups,
    compute,
    decoding_part,
    num_shares,
    parts_beside_slots,
    pending_arrays,
    requests_of_rows,
)
from .lifecycle import Lifecycle
from .memory import BatchMemory
from .prompt_pieces import PromptPieces
from .scheduler import Scheduler, longest_share
from .single import CLEAR_CACHE_EVERY, not_finite
from .slots import arrange_slots, slot_bank, warm_up
from .step_times import StepTimes

if TYPE_CHECKING:
    from ..models import Model

# Drafts are checked beside so many other requests at most: with more, a pass shares what a draft would save.
MOST_BESIDE_DRAFTS = 4
# Steps after which a request that is alone leaves its slot: to move it takes as long as some of them, and others may come.
STEPS_BEFORE_LEAVING = 32


@final
class Runner:
    """See the module. Every method is called from the engine's thread.

    wake: set when something has come from elsewhere (a request, a cancellation, work on the host that is done), and
    cleared before it is looked at.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler[ActiveRequest],
        wake: threading.Event | None = None,
    ) -> None:
        self._wake = threading.Event() if wake is None else wake
        self.model, self.tokenizer, self.scheduler = model, tokenizer, scheduler
        self.bank = slot_bank(model)
        self.memory = BatchMemory(model, self.bank)
        self._batch_step = BatchStep(model)
        residency = runtime_of(model).residency
        self._shares = None if residency is None else ExpertShares(residency)
        self.num_steps = 0
        self._num_shares = num_shares(model)
        self._times = StepTimes(scheduler)
        self._num_alone = 0  # steps of one request in a slot with nobody beside it
        self._groups = SamplerGroups()
        self.life = Lifecycle(model, tokenizer, scheduler, self.memory, self._groups)
        self._failures = Failures(scheduler, self.life, self._groups)
        self._delivery = Delivery(scheduler, self.life, self._failures.handle, self._wake)
        finish = self._delivery.finish_host_work
        self._pieces = PromptPieces(model, scheduler, self.bank, self.memory, self.life, self._num_shares, finish)

    def prepare(self) -> None:
        """Before the first request."""
        with suppress(RuntimeError, MemoryError):  # there was no room for it
            warm_up(self.model, self._batch_step)

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One pass, if there is anything to compute, and all that follows from it.

        An error that is nobody's in particular (memory that was to be got for the pass) ends those who run, or whoever was
        to be admitted, and not the engine.
        """
        try:
            self._step()
        except Exception as error:
            self._failures.handle(list(self.scheduler.running()) or self.scheduler.waiting[:1], error)

    def _step(self) -> None:
        began, num_owners = time.perf_counter(), self.bank.num_owners
        if self.bank.is_lost:
            self.life.recover(self.bank)
        self.life.drop_cancelled()
        self.life.drop_without_adapter()
        self.life.admit()
        self._delivery.finish_host_work()
        self.life.make_room(self._delivery.finish_host_work)
        prompts = self._pieces.next()
        single = self._single(prompts)
        if single is not None:
            self._step_alone(single)
            self._count_step()
            self._times.took(began, 0, is_alone=True)
            return
        decoding = self.scheduler.decoding
        in_slots = arrange_slots(self.model, self.bank, self.memory, decoding, [each for each, _ in prompts])
        parts = parts_beside_slots(decoding, prompts)
        before = [(each, each.pending) for each in decoding if each.pending and not each.replay]
        chunk_length = longest_share([length for _, length in prompts], self._num_shares)
        has_work, has_moved = bool(parts) or any(in_slots), self.bank.num_owners > num_owners
        is_ahead = self.bank.is_in_place and bool(before)
        tokens = pending_arrays([each for each, _ in before]) if is_ahead else []
        # The host waits for the device while such a pass is dispatched, and the tokens would seem to have come afterwards.
        comes_first = bool(prompts) and is_throttled(sum(length for _, length in prompts))
        if is_ahead and comes_first:
            self._times.wait_for(tokens)
        if has_work and not self._pass(in_slots, parts):
            self._times.failed()
            return
        if is_ahead and not comes_first:
            self._times.wait_for(tokens)
        self._delivery.hand_over(before)
        if not has_work:
            return
        self._count_step()
        if is_ahead:
            self._times.dispatched(began, chunk_length, has_moved)
            return
        if self.bank.is_in_place:
            self._times.waited(began, chunk_length)
            return
        if chunk_length and self.scheduler.decoding:
            self._evaluated([each.pending for each in self.scheduler.decoding if each.pending is not None])
        self._times.took(began, chunk_length, was_first=not before)

    def updated(self) -> list[ActiveRequest]:
        """Those for whom something has come since the last call."""
        found = list(self.life.updated)
        self.life.updated.clear()
        return found

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.waiting or scheduler.prompts or scheduler.decoding)

    def close(self, error: BaseException) -> None:
        """Every request ends here, its caller is told `error`, and nothing is left behind."""
        self.life.end_all([*self.scheduler.waiting, *self.scheduler.running()], lambda: error)
        self._delivery.close()
        mx.clear_cache()

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _single(self, prompts: Sequence[tuple[ActiveRequest, int]]) -> ActiveRequest | None:
        """The one request that runs, where there is but one: it takes the loop for one."""
        decoding = self.scheduler.decoding
        if prompts or len(decoding) != 1 or decoding[0].replay:
            self._num_alone = 0
            return None
        request = decoding[0]
        if self.bank.num_owners and self.scheduler.prompts:  # it would be in no slot for one step
            return None
        if request.bank is not None and self.bank.is_in_place and self._num_alone < STEPS_BEFORE_LEAVING:
            self._num_alone += 1
            return None
        return request if request.can_go_on else None

    def _step_alone(self, request: ActiveRequest) -> None:
        adapters = self.model.adapters
        try:
            selection = adapters.select([request.adapter])
        except SettingError as error:
            self.life.end(request, error=error)
            return
        with adapters.using(selection):
            self._step_of_one(request)

    def _step_of_one(self, request: ActiveRequest) -> None:
        self._groups.release()
        request.leave_slot()
        if request.forward is not None:
            forward, request.forward = request.forward, None
            try:
                with self._shared([(request, max(1, forward.tokens.size))]):
                    reply = computed(request.step, forward)
            except Exception as error:
                self._failures.handle([request], error)
                return
            self._delivery.go_on(request, reply)
            return
        pending = request.pending
        assert pending is not None
        try:
            if request.step.runs_ahead:
                request.pending = request.chosen(*request.step.choose(pending.token, request.sampler))
                mx.async_eval(request.pending.arrays)
                self._delivery.hand_over([(request, pending)])
                return
            self._delivery.hand_over([(request, pending)])
            if request.turn is not None:
                with self._shared([(request, 1)]):
                    request.pending = request.chosen(*request.step.choose(pending.token, request.sampler))
                mx.async_eval(request.pending.arrays)
        except Exception as error:
            self._failures.handle([request], error)

    def _pass(self, in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part]) -> bool:
        """Compute the flat pass, and let each go on with its logits. False where it failed."""
        measured = next((part.request.lease for part in parts if part.is_prompt), None)
        before = self.memory.in_use()
        if measured is not None:
            measured.lap()
        try:
            logits = self._compute(in_slots, parts)
        except Exception as error:
            self.life.take_back(parts)
            self._pass_failed(in_slots, parts, error)
            return False
        if measured is not None:
            took = measured.lap() - max(before, self.memory.in_use())
            self.memory.pass_took(took, [(part.request, part.rows.length, part.offset) for part in parts])
        # Nobody reads the logits of a token that is computed again: without this, all of its steps would pile up.
        replayed = [part.rows.cache for part in parts if part.request.replay and not part.is_prompt]
        self._distribute(in_slots, parts, logits)
        try:
            requests = [*(each for each in in_slots if each is not None), *(part.request for part in parts)]
            arrays = [*pending_arrays(requests), *(layer.buffers for cache in replayed for layer in cache)]
            mx.async_eval([*arrays, logits] if logits is not None and self.bank.is_in_place else arrays)
        except RuntimeError as error:
            self._failures.handle(list(self.scheduler.running()), error)
            return False
        return True

    def _compute(self, in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part]) -> mx.array | None:
        """The logits of the flat pass; see `compute`."""
        rows = requests_of_rows(in_slots, parts)
        ids = [None if request is None else request.adapter for request, length in rows for _ in range(length)]
        adapters = self.model.adapters
        with (
            adapters.using(adapters.select(ids)),
            self._shared([(request, length) for request, length in rows if request is not None]),
        ):
            return compute(self.model, self._batch_step, self.bank, in_slots, parts)

    @contextmanager
    def _shared(self, rows: Sequence[tuple[ActiveRequest, int]]) -> Iterator[None]:
        """What is read of experts on disk meanwhile is for these, each with so many rows; also what a failed pass read."""
        if self._shares is None:
            yield
            return
        self._shares.begin()
        try:
            yield
        finally:
            self._shares.divide([(each.experts, count) for each, count in rows if each.experts is not None])

    def _distribute(
        self, in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part], logits: mx.array | None
    ) -> None:
        """Everybody's own rows of the logits (R, V)."""
        plain = [part.request for part in parts if part.tokens is None]
        row = len(in_slots) + len(plain)
        if row:
            assert logits is not None
            self._groups.arrange([*in_slots, *plain])
            for request, pending in self._groups.choose(logits if logits.shape[0] == row else logits[:row]):
                request.pending = pending
        for part in parts[len(plain) :]:
            request, count = part.request, part.rows.num_logits
            at = row if part.slot is None else part.slot
            own = None if logits is None or count == 0 else logits[at : at + count]
            row += count if part.slot is None else 0
            if part.is_prompt:
                self._prompt_went_on(request, part.rows, own)
            elif request.replay:
                request.replay.popleft()
            else:
                assert own is not None
                self._answered(request, own)

    def _answered(self, request: ActiveRequest, logits: mx.array) -> None:
        """A source gets the logits (n, V) that it asked for."""
        forward, request.forward = request.forward, None
        assert forward is not None
        reply: Any = logits if forward.tokens.ndim else logits[0]
        if forward.sampler is not None:
            reply = reply, forward.sampler(reply)
        self._delivery.go_on(request, reply)

    def _prompt_went_on(self, request: ActiveRequest, rows: Rows, logits: mx.array | None) -> None:
        job = request.job
        num_chunks = len(job.chunks)
        job.take(rows.length)
        if request.wants_prompt_scores and logits is not None:
            request.score_prompt(logits)
        for each in (request, *request.followers):
            each.channel.num_prompt_tokens_done = request.position
        assert request.turn is not None
        if len(job.chunks) < num_chunks and request.sequence.request.prefix_cache is not None and job.chunks:
            request.leave_slot()  # a snapshot is of its own cache
            request.turn.at_border()
        if job.chunks:
            return
        assert logits is not None
        followers, request.followers = request.followers, []
        if followers:
            request.leave_slot()  # its own cache is what they begin with
        self.scheduler.prompt_is_done(request)
        beginning = [] if request.has_answered else [request]
        for each in followers:  # before the first answer begins, or ends
            try:
                self.life.fork(request, each)
            except Exception as error:
                self.life.end(each, error=error)
            else:
                beginning.append(each)
        for each in beginning:
            self._start_answer(each, logits[-1])

    def _start_answer(self, request: ActiveRequest, logits: mx.array) -> None:
        """The first token, from the logits (V,) after the prompt."""
        if request.sequence.clock is not None:
            request.sequence.clock.prompt_is_done()
        is_finite = mx.all(mx.isfinite(logits))
        if request.is_plain:
            pending = request.chosen(logits, request.sampler(logits))
            request.pending = Pending(pending.tokens, 0, pending.choice, is_finite)
            return
        try:
            if not is_finite.item():
                raise not_finite()
            request.start_answer(self.model, logits, self._may_guess)
        except Exception as error:
            self.life.end(request, error=error)
            return
        self._delivery.go_on(request, None)

    def _may_guess(self) -> bool:
        return self.scheduler.num_running <= 1 + MOST_BESIDE_DRAFTS

    # --- failures -----------------------------------------------------------------------------------------------------

    def _pass_failed(self, in_slots: Sequence[ActiveRequest | None], parts: Sequence[Part], error: Exception) -> None:
        """A pass of several has raised: find out whose fault it was, by computing each by itself."""
        together = [each for each in in_slots if each is not None]
        everybody = [*together, *(part.request for part in parts)]
        if isinstance(error, RuntimeError | MemoryError) or len(everybody) == 1:
            self._failures.handle(everybody, error, can_recompute=True)
            return
        self._groups.release()
        for request in together:
            request.leave_slot()
        for part in parts:
            if part.slot is not None:
                part.request.leave_slot()
                part.slot = None
        for part in [*(decoding_part(each) for each in together), *parts]:
            request = part.request
            if request.turn is None or part.rows.cache[0].offset != part.offset:
                continue  # it has ended, or is computed once more from the beginning
            before = request.pending
            try:
                logits = self._compute((), [part])
            except Exception as own:
                self.life.take_back([part])
                self.life.end(request, error=own)
                continue
            self._distribute((), [part], logits)
            if part.tokens is None:
                self._delivery.hand_over([(request, before)])

    def _evaluated(self, pending: Sequence[Pending]) -> None:
        try:
            mx.eval([array for each in pending for array in each.arrays])
        except RuntimeError as error:
            self._failures.handle(list(self.scheduler.running()), error)

    def _count_step(self) -> None:
        self.num_steps += 1
        if self.num_steps % CLEAR_CACHE_EVERY == 0 and not (self.bank.is_in_place and self.memory.may_keep_cache()):
            mx.clear_cache()
