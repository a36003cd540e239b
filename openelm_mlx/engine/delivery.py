"""Tokens to their requests, and what requests with a constraint or a draft ask for on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, cast, final

from ..decoding.tokens import Choice, Forward, HostWork
from .active import ActiveRequest, Pending
from .lifecycle import Lifecycle
from .scheduler import Scheduler
from .single import not_finite

# Seconds that a step waits for constraints before it goes on without the requests that they belong to.
LONGEST_WAIT = 2e-3
# Constraints that are worked on at once; more of them wait for each other, and nobody else for them.
MOST_WORKERS = 8


@final
class Delivery:
    """See the module. fail: what a device's error ends; wake: set when work on the host is done."""

    def __init__(
        self,
        scheduler: Scheduler[ActiveRequest],
        life: Lifecycle,
        fail: Callable[[Sequence[ActiveRequest], Exception], None],
        wake: threading.Event,
    ) -> None:
        self._scheduler, self._life, self._fail, self._wake = scheduler, life, fail, wake
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """No more work on the host."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def hand_over(self, chosen: Iterable[tuple[ActiveRequest, Pending | None]]) -> None:
        """Tokens that have been computed meanwhile, to their requests."""
        on_host: dict[int, Any] = {}
        for request, pending in chosen:
            if pending is None or request.turn is None:
                continue
            try:
                if pending.is_finite is not None and not pending.is_finite.item():
                    raise not_finite()
                values = on_host.get(id(pending.tokens))
                if values is None:
                    values = on_host[id(pending.tokens)] = pending.tokens.tolist()
                token = values[pending.at] if isinstance(values, list) else cast(int, values)
                scores = (None, None) if pending.choice is None else pending.choice.logprob_values()
            except RuntimeError as error:  # the device's
                self._fail(list(self._scheduler.running()), error)
                return
            except Exception as error:
                self._life.end(request, error=error)
                continue
            self.accept(request, token, *scores)

    def accept(self, request: ActiveRequest, token: int, logprob: float | None, top: dict[int, float] | None) -> bool:
        """Hand one token over. False where it was the last."""
        assert request.turn is not None
        try:
            request.turn.tokens.append(token)
            chunk = request.sequence.accept(token, logprob, top)
        except Exception as error:
            self._life.end(request, error=error)
            return False
        self._life.updated[request] = None
        if chunk.finish_reason is None:
            request.channel.put(chunk)
            return True
        self._life.end(request, last=chunk)
        return False

    # --- sources: requests with a constraint or a draft ---------------------------------------------------------------

    def go_on(self, request: ActiveRequest, reply: Any) -> None:
        """Let a source go on, up to where it needs the next pass or longer work of the host."""
        assert request.source is not None
        try:
            wanted = request.source.send(reply)
            while not isinstance(wanted, Forward):
                if isinstance(wanted, Choice):
                    if not self.accept(request, wanted.item(), *wanted.logprob_values()):
                        return
                    wanted = request.source.send(None)
                elif isinstance(wanted, HostWork):
                    if self._scheduler.num_running > 1 or request.work_seconds > LONGEST_WAIT:
                        self._start_host_work(request, wanted)
                        return
                    wanted = request.source.send(_timed(request, wanted.call))
        except StopIteration:
            self._life.end(request)
        except Exception as error:
            self._life.end(request, error=error)
        else:
            request.forward = wanted

    def _start_host_work(self, request: ActiveRequest, wanted: HostWork) -> None:
        request.work_began = time.perf_counter()
        request.work = self._workers().submit(_timed, request, wanted.call)
        request.work.add_done_callback(lambda _: self._wake.set())

    def finish_host_work(self) -> None:
        """Let those go on whose work on the host is done.

        Others wait a moment for it, once. Where nothing else is to be done, it is waited for, or for whoever comes.
        """
        while working := {each.work: each for each in self._scheduler.decoding if each.work is not None}:
            left = max(each.work_began for each in working.values()) + LONGEST_WAIT - time.perf_counter()
            done, _ = wait(cast("Any", list(working)), timeout=max(0.0, left), return_when=FIRST_COMPLETED)
            if not done:
                if not self._has_other_work(working):
                    self._wake.wait()
                return
            for future in done:
                request = working[future]
                request.work = None
                self._resume(request, future)

    def _resume(self, request: ActiveRequest, future: Future[Any]) -> None:
        try:
            result = future.result()
        except Exception as error:
            self._life.end(request, error=error)
            return
        self.go_on(request, result)

    def _has_other_work(self, working: Any) -> bool:
        busy = set(working.values())
        return bool(self._scheduler.prompts) or any(each not in busy for each in self._scheduler.decoding)

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_WORKERS, thread_name_prefix="openelm_mlx constraints")
        return self._pool


def _timed(request: ActiveRequest, call: Callable[[], Any]) -> Any:
    """What `call`, its work on the host, gives."""
    began = time.perf_counter()
    try:
        return call()
    finally:
        request.work_seconds = max(time.perf_counter() - began, 0.9 * request.work_seconds)
