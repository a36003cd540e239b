"""The steps of an engine: one flat pass of the model for all that run, and what each request makes of its logits.

All of MLX's work of an engine happens here, on one thread. A step dispatches a pass, and then hands over the tokens of
the pass before, which the device has computed meanwhile. What a step does is decided by the scheduler; what a token
becomes, by the request's `Sequence`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import mlx.core as mx

from ..decoding.batch_sampling import SamplerGroup
from ..decoding.budget import TOKENS_AT_ONCE
from ..decoding.gpu_errors import empty_stream, is_out_of_memory, is_watchdog
from ..decoding.prefill import chunk_throttle, lock_of
from ..decoding.sampling import log_probabilities
from ..decoding.tokens import Choice, Forward, HostWork, computed
from ..errors import MemoryLimitError, SettingError
from ..models.rows import Rows, flat_logits
from ..text.tokenizer import Tokenizer
from .active import ActiveRequest, Pending
from .memory import BatchMemory
from .scheduler import Scheduler
from .single import CLEAR_CACHE_EVERY, not_finite

if TYPE_CHECKING:
    from ..models import Model

# Seconds that a step waits for constraints before it goes on without the requests that they belong to.
LONGEST_WAIT = 2e-3
# Drafts are checked beside so many other requests at most: with more, a pass shares what a draft would save.
MOST_BESIDE_DRAFTS = 4


@dataclass
class _Part:
    """One request's share of a pass. tokens: a scalar or (n,); rows: where it stands among the flat rows."""

    request: ActiveRequest
    tokens: mx.array
    rows: Rows
    offset: int

    @property
    def is_prompt(self) -> bool:
        return self.rows.is_prompt


@final
class Runner:
    """See the module. Every method is called from the engine's thread."""

    def __init__(self, model: Model, tokenizer: Tokenizer | None, scheduler: Scheduler[ActiveRequest]) -> None:
        self.model, self.tokenizer, self.scheduler = model, tokenizer, scheduler
        self.memory = BatchMemory(model)
        self.num_steps = 0
        self._groups: list[SamplerGroup] = []
        self._pool: ThreadPoolExecutor | None = None
        self._touched: dict[ActiveRequest, None] = {}  # whose readers are to be woken
        self._has_failed_before = False

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One pass, if there is anything to compute, and all that follows from it."""
        began = time.perf_counter()
        self._drop_cancelled()
        self._admit()
        self._finish_host_work()
        self._make_room()
        prompt = self._next_prompt()
        singles = self._single(prompt)
        if singles is not None:
            self._step_alone(singles)
            self._note_time(began, 0)
            return
        parts = self._parts(prompt)
        before = [(each, each.pending) for each in self.scheduler.decoding if each.pending and not each.replay]
        chunk_length = 0 if prompt is None else prompt[1]
        if parts:
            if not self._pass(parts):
                return
        self._hand_over(before)
        if chunk_length and self.scheduler.decoding:
            self._evaluated([each.pending for each in self.scheduler.decoding if each.pending is not None])
        self._note_time(began, chunk_length)

    def touched(self) -> list[ActiveRequest]:
        """Those for whom something has come since the last call."""
        found = list(self._touched)
        self._touched.clear()
        return found

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.waiting or scheduler.prompts or scheduler.decoding)

    def close(self, error: BaseException) -> None:
        """Every request ends here, its caller is told `error`, and nothing is left behind."""
        for each in [*self.scheduler.waiting, *self.scheduler.running()]:
            each.followers = []
            self._end(each, error=error)
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        mx.clear_cache()

    # --- who comes and who goes ---------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for each in [*self.scheduler.waiting, *self.scheduler.running()]:
            if each.channel.is_cancelled:
                self._end(each)

    def _admit(self) -> None:
        while (request := self.scheduler.admit(self._fits)) is not None:
            try:
                self._begin(request)
            except Exception as error:
                self._end(request, error=error)

    def _fits(self, request: ActiveRequest) -> bool:
        running = list(self.scheduler.running())
        return not running or self.memory.has_room_for(request, running)

    def _begin(self, request: ActiveRequest) -> None:
        if request.has_begun:
            request.begin_again(self.model)
            return
        key = request.prompt_key
        for other in self.scheduler.prompts:
            if other is not request and other.has_begun and not other.replay and other.prompt_key == key:
                other.followers.append(request)
                self.scheduler.follow(request)
                return
        request.begin(self.model, self.tokenizer)
        self.memory.changed(self.scheduler.running())

    def _end(self, request: ActiveRequest, *, error: BaseException | None = None, is_kept: bool = True) -> None:
        """It has ended, was cancelled, or failed."""
        heirs, request.followers = request.followers, []
        self._unfollow(request)
        self.scheduler.forget(request)
        self._leave_groups(request)
        if request.work is not None:
            wait([request.work])  # it is at work on what the request's end takes away
        is_finished = request.sequence.finish_reason is not None
        cache = None if request.turn is None else request.cache
        try:
            if heirs and not is_finished:
                self._inherit(request, heirs)
                is_kept, cache = False, None
            request.end(is_kept and error is None)
        except Exception as failure:  # what could not be kept is lost, and nothing else
            error = error or failure
        if cache is not None and (error is not None or request.sequence.request.prefix_cache is None):
            for layer in cache:
                layer.clear()
        request.channel.end(error=error)
        self._touched[request] = None
        self.memory.changed(self.scheduler.running())

    def _inherit(self, request: ActiveRequest, heirs: list[ActiveRequest]) -> None:
        """The first of those who waited for a prompt goes on with it."""
        heir, *others = heirs
        heir.followers = others
        if request.turn is None:
            for each in heirs:
                self.scheduler.put_back(each)
            return
        heir.begin_with(self.model, self.tokenizer, request.turn)
        heir.job.chunks = request.job.chunks
        self.scheduler.compute_prompt(heir)

    def _unfollow(self, request: ActiveRequest) -> None:
        """It does not wait for another's prompt any more."""
        for each in self.scheduler.prompts:
            if request in each.followers:
                each.followers.remove(request)

    def _make_room(self) -> None:
        """Let the caches of those grow who need it; who came last gives way where there is no room."""
        growing = [each for each in self.scheduler.decoding if len(each.sequence.tokens) % TOKENS_AT_ONCE == 0]
        if not growing:
            return
        while not self.memory.can_grow(growing, list(self.scheduler.running())):
            youngest = self.scheduler.youngest()
            if youngest is None:
                break
            self._give_way(youngest)
            growing = [each for each in growing if each is not youngest]
        for each in growing:
            try:
                each.budget.before_tokens(len(each.sequence.tokens), each.sequence.request.limit)
            except MemoryLimitError as error:
                self._end(each, error=error)
        self.memory.changed(self.scheduler.running())

    def _give_way(self, request: ActiveRequest) -> None:
        """Back into the queue, with its cache given up."""
        if request.work is not None:
            wait([request.work])
            self._finish_host_work()
        self._leave_groups(request)
        self._unfollow(request)
        if request.turn is not None:
            request.give_way()
        followers, request.followers = request.followers, []
        self.scheduler.put_back(request)
        for each in followers:
            self.scheduler.put_back(each)
        mx.clear_cache()
        self.memory.changed(self.scheduler.running())

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _next_prompt(self) -> tuple[ActiveRequest, int] | None:
        """Whose prompt is gone on with, and by how many tokens."""
        request = self.scheduler.next_prompt()
        if request is None:
            return None
        try:
            length = self.scheduler.chunk_length(request, request.job.chunks[0])
            fitting = request.budget.chunk_of_prompt(length, length)
        except MemoryLimitError as error:
            if (youngest := self.scheduler.youngest()) is not None and self.memory.forget_kept(
                list(self.scheduler.running())
            ):
                return self._next_prompt()
            if youngest is not None:
                self._give_way(youngest)
                return self._next_prompt()
            self._end(request, error=error)
            return self._next_prompt()
        return request, request.job.piece(fitting)

    def _single(self, prompt: tuple[ActiveRequest, int] | None) -> ActiveRequest | None:
        """The one request that runs, where there is but one: it takes the loop for one."""
        decoding = self.scheduler.decoding
        if prompt is not None or len(decoding) != 1 or decoding[0].replay:
            return None
        request = decoding[0]
        if request.is_plain:
            return request if request.pending is not None and request.num_left > 1 else None
        return request if request.forward is not None else None

    def _step_alone(self, request: ActiveRequest) -> None:
        self._release_groups()
        if request.forward is not None:
            forward, request.forward = request.forward, None
            try:
                reply = computed(request.step, forward)
            except Exception as error:
                self._failed([request], error)
                return
            self._go_on(request, reply)
            return
        pending = request.pending
        assert pending is not None
        token = pending.tokens if pending.tokens.ndim == 0 else pending.tokens[pending.at]
        try:
            if request.step.runs_ahead:
                request.pending = self._chosen(request, *request.step.choose(token, request.sampler))
                mx.async_eval(request.pending.arrays)
                self._hand_over([(request, pending)])
                return
            self._hand_over([(request, pending)])
            if request.turn is not None:
                request.pending = self._chosen(request, *request.step.choose(token, request.sampler))
                mx.async_eval(request.pending.arrays)
        except Exception as error:
            self._failed([request], error)

    def _parts(self, prompt: tuple[ActiveRequest, int] | None) -> list[_Part]:
        """What everybody brings to the next pass: plain requests first, by the form of their samplers."""
        plain = [each for each in self.scheduler.decoding if each.pending is not None and not each.replay]
        feeding = [each for each in plain if each.num_left > 1]
        feeding.sort(key=lambda each: (repr(each.sampler.form), each.job.number))
        self._group(feeding)
        parts = [self._part(each, self._token_of(each)) for each in feeding]
        for each in self.scheduler.decoding:
            if each.replay:
                parts.append(self._part(each, mx.array(each.replay[0])))
            elif each.forward is not None:
                parts.append(self._part(each, each.forward.tokens))
        if prompt is not None:
            request, length = prompt
            is_last = len(request.job.chunks) == 1 and request.job.chunks[0] == length
            tokens = mx.array(request.prompt_piece(length))
            parts.append(_Part(request, tokens, Rows(request.cache, length, True, is_last), request.cache[0].offset))
        return parts

    def _part(self, request: ActiveRequest, tokens: mx.array) -> _Part:
        length = 1 if tokens.ndim == 0 else tokens.size
        return _Part(request, tokens, Rows(request.cache, length), request.cache[0].offset)

    def _pass(self, parts: Sequence[_Part]) -> bool:
        """Compute the flat pass of `parts`, and let each go on with its logits. False where it failed."""
        try:
            logits = self._computed(parts)
        except Exception as error:
            self._take_back(parts)
            self._pass_failed(parts, error)
            return False
        self._distribute(parts, logits)
        try:
            mx.async_eval([array for part in parts for array in self._arrays_of(part.request)])
        except RuntimeError as error:
            self._failed([part.request for part in parts], error)
            return False
        return True

    def _computed(self, parts: Sequence[_Part]) -> mx.array | None:
        prompts = [each for each in parts if each.is_prompt]
        throttle = None
        if prompts and prompts[0].rows.length > 1:
            throttle = chunk_throttle(prompts[0].rows.cache)
        with lock_of(self.model):
            logits = flat_logits(self.model, self._tokens(parts), [each.rows for each in parts], throttle)
            for each in prompts:
                mx.eval([layer.buffers for layer in each.rows.cache])
        for each in prompts:
            each.request.budget.chunk_is_done(each.rows.length)
            mx.clear_cache()
        return logits

    def _tokens(self, parts: Sequence[_Part]) -> mx.array:
        """All the tokens (M,), joined with as few operations as there are sources of them."""
        found: list[mx.array] = []
        at = 0
        while at < len(parts):
            pending = parts[at].request.pending
            if not parts[at].is_prompt and pending is not None and pending.tokens.ndim == 1:
                stop = at
                while stop < len(parts) and _stands_at(parts[stop], pending.tokens, stop - at + pending.at):
                    stop += 1
                if stop > at:
                    whole = pending.at == 0 and stop - at == pending.tokens.size
                    found.append(pending.tokens if whole else pending.tokens[pending.at : pending.at + stop - at])
                    at = stop
                    continue
            tokens = parts[at].tokens
            found.append((tokens if tokens.ndim else tokens[None]).astype(mx.uint32))
            at += 1
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def _distribute(self, parts: Sequence[_Part], logits: mx.array | None) -> None:
        """Everybody's own rows of the logits (R, V)."""
        row = 0
        grouped = sum(len(group.samplers) for group in self._groups)
        for group in self._groups:
            members = [part.request for part in parts[row : row + len(group.samplers)]]
            assert logits is not None
            mine = logits if len(members) == logits.shape[0] else logits[row : row + len(members)]
            tokens = group(mine)
            for at, request in enumerate(members):
                request.pending = self._pending(request, tokens, at, mine)
            row += len(members)
        for part in parts[grouped:]:
            request, count = part.request, part.rows.num_logits
            own = None if logits is None or count == 0 else logits[row : row + count]
            row += count
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
        self._go_on(request, reply)

    def _prompt_went_on(self, request: ActiveRequest, rows: Rows, logits: mx.array | None) -> None:
        job = request.job
        num_chunks = len(job.chunks)
        job.take(rows.length)
        assert request.turn is not None
        if len(job.chunks) < num_chunks and request.sequence.request.prefix_cache is not None and job.chunks:
            request.turn.at_border()
        if job.chunks:
            return
        assert logits is not None
        followers, request.followers = request.followers, []
        self.scheduler.prompt_is_done(request)
        if request.replay or request.pending is not None or request.source is not None:
            return  # it has begun its answer before
        self._start_answer(request, logits[0])
        for each in followers:
            try:
                self._fork(request, each, logits[0])
            except Exception as error:
                self._end(each, error=error)

    def _fork(self, leader: ActiveRequest, request: ActiveRequest, logits: mx.array) -> None:
        """One more answer to a prompt that has just been computed."""
        assert leader.turn is not None
        turn = leader.turn.forked()
        request.begin_with(self.model, self.tokenizer, turn)
        request.job.chunks.clear()
        self.scheduler.prompt_is_done(request)
        self._start_answer(request, logits)

    def _start_answer(self, request: ActiveRequest, logits: mx.array) -> None:
        """The first token, from the logits (V,) after the prompt."""
        is_finite = mx.all(mx.isfinite(logits))
        if request.is_plain:
            pending = self._chosen(request, logits, request.sampler(logits))
            request.pending = Pending(pending.tokens, 0, pending.choice, is_finite)
            return
        try:
            if not is_finite.item():
                raise not_finite()
            request.start_answer(self.model, logits)
        except Exception as error:
            self._end(request, error=error)
            return
        self._go_on(request, None)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _chosen(self, request: ActiveRequest, logits: mx.array, token: mx.array) -> Pending:
        num_logprobs = request.sequence.request.logprobs
        if num_logprobs is None:
            return Pending(token)
        return Pending(token, 0, Choice(token, *log_probabilities(logits, token, num_logprobs)))

    def _pending(self, request: ActiveRequest, tokens: mx.array, at: int, logits: mx.array) -> Pending:
        num_logprobs = request.sequence.request.logprobs
        if num_logprobs is None:
            return Pending(tokens, at)
        token = tokens[at]
        return Pending(tokens, at, Choice(token, *log_probabilities(logits[at], token, num_logprobs)))

    def _token_of(self, request: ActiveRequest) -> mx.array:
        pending = request.pending
        assert pending is not None
        return pending.tokens if pending.tokens.ndim == 0 else pending.tokens[pending.at]

    def _arrays_of(self, request: ActiveRequest) -> list[mx.array]:
        return [] if request.pending is None else request.pending.arrays

    def _hand_over(self, chosen: Iterable[tuple[ActiveRequest, Pending | None]]) -> None:
        """Tokens that have been computed meanwhile, to their requests."""
        on_host: dict[int, Any] = {}
        for request, pending in chosen:
            if pending is None or request.turn is None:
                continue
            try:
                if pending.is_finite is not None and not pending.is_finite.item():
                    raise not_finite()
                key = id(pending.tokens)
                if key not in on_host:
                    on_host[key] = pending.tokens.tolist()
                values = on_host[key]
                token = cast(int, values if pending.tokens.ndim == 0 else values[pending.at])
                scores = (None, None) if pending.choice is None else pending.choice.logprob_values()
            except RuntimeError as error:  # the device's
                self._failed(list(self.scheduler.running()), error)
                return
            except Exception as error:
                self._end(request, error=error)
                continue
            self._accept(request, token, *scores)

    def _accept(self, request: ActiveRequest, token: int, logprob: float | None, top: dict[int, float] | None) -> bool:
        """Hand one token over. False where it was the last."""
        assert request.turn is not None
        try:
            request.turn.tokens.append(token)
            chunk = request.sequence.accept(token, logprob, top)
        except Exception as error:
            self._end(request, error=error)
            return False
        self._touched[request] = None
        if chunk.finish_reason is None:
            request.channel.put(chunk)
            return True
        # What it took is given back before its caller hears of the end.
        self._end_with(request, chunk)
        return False

    def _end_with(self, request: ActiveRequest, chunk: Any) -> None:
        channel = request.channel
        channel.items.put(chunk)
        channel.statistics = chunk.statistics
        self._end(request)

    # --- sources: requests with a constraint or a draft ---------------------------------------------------------------

    def _go_on(self, request: ActiveRequest, reply: Any) -> None:
        """Let a source go on, up to where it needs the next pass or longer work of the host."""
        source = request.source
        assert source is not None
        try:
            wanted = source.send(reply)
            while not isinstance(wanted, Forward):
                if isinstance(wanted, Choice):
                    if not self._accept(request, wanted.item(), *wanted.logprob_values()):
                        return
                    wanted = source.send(None)
                elif isinstance(wanted, HostWork):
                    if self.scheduler.num_running > 1:
                        request.work = self._workers().submit(wanted.call)
                        return
                    wanted = source.send(wanted.call())
        except StopIteration:
            self._end(request)
        except Exception as error:
            self._end(request, error=error)
        else:
            request.forward = wanted

    def _finish_host_work(self) -> None:
        """Let those go on whose work on the host is done. It is waited for a moment, or where nothing else is to be done."""
        working = {each.work: each for each in self.scheduler.decoding if each.work is not None}
        deadline = time.perf_counter() + LONGEST_WAIT
        while working:
            left: float | None = max(0.0, deadline - time.perf_counter())
            if not self._has_other_work(working):
                left = None
            done, _ = wait(cast("Any", list(working)), timeout=left, return_when=FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                request = working.pop(future)
                request.work = None
                self._resume(request, future)
            working = {each.work: each for each in self.scheduler.decoding if each.work is not None}

    def _resume(self, request: ActiveRequest, future: Future[Any]) -> None:
        try:
            result = future.result()
        except Exception as error:
            self._end(request, error=error)
            return
        self._go_on(request, result)

    def _has_other_work(self, working: Any) -> bool:
        busy = set(working.values())
        return bool(self.scheduler.prompts) or any(each not in busy for each in self.scheduler.decoding)

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="openelm_mlx constraints")
        return self._pool

    # --- groups of samplers -------------------------------------------------------------------------------------------

    def _group(self, requests: Sequence[ActiveRequest]) -> None:
        """Sampler groups for these requests, in this order; those of the last step where nothing has changed."""
        by_form: list[list[ActiveRequest]] = []
        for each in requests:
            if by_form and by_form[-1][0].sampler.form == each.sampler.form:
                by_form[-1].append(each)
            else:
                by_form.append([each])
        wanted = [[each.sampler for each in group] for group in by_form]
        if len(wanted) == len(self._groups) and all(
            group.holds(samplers) for group, samplers in zip(self._groups, wanted, strict=True)
        ):
            return
        self._release_groups()
        self._groups = [SamplerGroup(samplers) for samplers in wanted]

    def _release_groups(self) -> None:
        for group in self._groups:
            group.release()
        self._groups = []

    def _leave_groups(self, request: ActiveRequest) -> None:
        if request.has_begun and any(request.sampler in group.samplers for group in self._groups):
            self._release_groups()

    # --- failures -----------------------------------------------------------------------------------------------------

    def _take_back(self, parts: Sequence[_Part]) -> None:
        """Bring the caches back to where they were before a pass that failed; recompute what cannot be brought back."""
        for part in parts:
            try:
                for layer in part.rows.cache:
                    if layer.offset > part.offset:
                        layer.rewind(layer.offset - part.offset)
            except ValueError:
                self._recompute(part.request)

    def _recompute(self, request: ActiveRequest) -> None:
        request.give_way()
        self.scheduler.compute_prompt(request)
        request.begin_again(self.model)

    def _pass_failed(self, parts: Sequence[_Part], error: Exception) -> None:
        """A pass of several has raised: find out whose fault it was, by computing each by itself."""
        if isinstance(error, RuntimeError | MemoryError) or len(parts) == 1:
            self._failed([part.request for part in parts], error)
            return
        self._release_groups()
        for part in parts:
            request = part.request
            if request.turn is None or (request.job.chunks and not part.is_prompt):
                continue
            try:
                logits = self._computed([part])
            except Exception as own:
                self._take_back([part])
                self._end(request, error=own)
                continue
            if part.is_prompt or request.replay or request.forward is not None:
                self._distribute([part], logits)
                continue
            before = request.pending
            assert logits is not None
            request.pending = self._chosen(request, logits[0], request.sampler(logits[0]))
            self._hand_over([(request, before)])

    def _failed(self, requests: Sequence[ActiveRequest], error: Exception) -> None:
        """A pass has failed for all of them together."""
        errors = (error, *empty_stream())
        found = next((each for each in errors if is_out_of_memory(each)), error)
        self._groups = []  # their arrays may be part of what failed
        if is_out_of_memory(found):
            text = (str(found).strip().splitlines() or [type(found).__name__])[0]
            self._end_those(requests, lambda: MemoryLimitError(
                "The memory ran out while several requests were being computed, and they were ended: ask again, with fewer "
                f"requests at once (max_running), shorter ones, or a smaller memory_limit. (MLX says: {text})"
            ))  # fmt: skip
        elif is_watchdog(found) and not self._has_failed_before:
            self._has_failed_before = True
            self.scheduler.pace.halve()
            for each in requests:
                if each.turn is not None:
                    self._recompute(each)
        elif is_watchdog(found):
            self._end_those(requests, lambda: SettingError(
                "The GPU was stopped because a pass took longer than macOS allows: ask for a shorter prefill_chunk "
                "(--prefill-chunk), or fewer requests at once (max_running)."
            ))  # fmt: skip
        else:
            self._end_those(requests, lambda: found)
        mx.clear_cache()

    def _end_those(self, requests: Iterable[ActiveRequest], make_error: Callable[[], BaseException]) -> None:
        for each in requests:
            for follower in each.followers:
                self._end(follower, error=make_error())
            each.followers = []
            self._end(each, error=make_error(), is_kept=False)

    def _evaluated(self, pending: Sequence[Pending]) -> None:
        try:
            mx.eval([array for each in pending for array in each.arrays])
        except RuntimeError as error:
            self._failed(list(self.scheduler.running()), error)

    def _note_time(self, began: float, chunk_length: int) -> None:
        self.num_steps += 1
        if self.num_steps % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        if self.scheduler.decoding:
            self.scheduler.pace.step_took(time.perf_counter() - began, chunk_length)


def _stands_at(part: _Part, tokens: mx.array, at: int) -> bool:
    """Whether a part's token is the one at `at` of `tokens`, so that it need not be cut out."""
    pending = part.request.pending
    return not part.is_prompt and pending is not None and pending.tokens is tokens and pending.at == at
