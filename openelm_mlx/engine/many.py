"""Many requests at once: continuous batching, in which every request gets the answer that it would get alone."""

from __future__ import annotations

import collections
import contextlib
import inspect
import threading
import weakref
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as ManyOf
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import mlx.core as mx

from ..arguments import checked_call, refuse_unknown
from ..checks import whole_number
from ..decoding.arguments import check_model
from ..decoding.sampling import SamplingParams
from ..errors import EngineClosedError, MemoryLimitError, PromptError, SettingError
from ..memory.limits import end_streams
from ..runtime import runtime_of
from ..text.tokenizer import Tokenizer
from .active import ActiveRequest
from .handle import Channel, Handle, wake_readers
from .memory import OtherModels, default_max_running
from .prompt import Prompt
from .request import usable_vocab_size
from .runner import Runner
from .scheduler import Scheduler
from .single import new_sequence
from .statistics import Statistics

if TYPE_CHECKING:
    from ..models import Model

# Requests in the queue where nobody says.
MAX_WAITING = 1024
# Tokens of a prompt whose log-probabilities are wanted, in one pass: each has a row of logits as long as the vocabulary.
SCORED_AT_ONCE = 16


class _Shared:
    """What the engine's thread and its callers share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wake = threading.Event()
        self.incoming: collections.deque[ActiveRequest] = collections.deque()
        self.is_closing = False
        self.num_submitted = 0
        self.failure: BaseException | None = None


@final
@checked_call("om.Engine")
class Engine:
    """Answers any number of requests together; each may come and go when it likes.

        with om.Engine(model, tokenizer) as engine:
            handles = [engine.submit(prompt, max_tokens=100) for prompt in prompts]
            for handle in handles:
                print(handle.text())

    While it is open the model is the engine's: whoever else wants to use it submits a request. Requests are admitted
    first come first served, as many as the plan's memory holds; when it gets tight the youngest waits again, and goes
    on where it was. Safe to use from several threads, and from asyncio (`async for chunk in handle`).

    Args:
        max_running: Requests that are computed at once. None: as many as the model was loaded for (`batch_size`);
            where nobody said, as many requests of 2,048 tokens as fit beside the weights, at most 64. Memory may
            still let fewer run, when they are long.
        max_waiting: Requests in the queue; 1,024 when it is None. One more is refused with EngineFullError.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        max_running: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        check_model(model, tokenizer)
        if runtime_of(model).group is not None:
            raise SettingError(
                "An engine decides by the clock what is computed next, and machines that share a model have to do the same: "
                "call om.generate with one prompt after the other."
            )
        max_running = (
            default_max_running(model) if max_running is None else whole_number("max_running", max_running, high=4096)
        )
        max_waiting = MAX_WAITING if max_waiting is None else whole_number("max_waiting", max_waiting, low=0)
        self.model, self.tokenizer = model, tokenizer
        self._scheduler: Scheduler[ActiveRequest] = Scheduler(max_running, max_waiting)
        self._shared = _Shared()
        # What the thread must not evaluate for the first time while others look at it.
        mx.eval([layer.prepare_constants() for layer in model.layers])
        self._runner = Runner(model, tokenizer, self._scheduler, self._shared.wake)
        self._thread = threading.Thread(
            target=_run, args=(self._runner, self._scheduler, self._shared), name="openelm_mlx engine", daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._shared, self._thread)

    def submit(
        self,
        prompt: Prompt | None = None,
        prompt_logprobs: int | None = None,
        group: Hashable = None,
        **options: Any,
    ) -> Handle:
        """One more request; its handle gives the chunks as they come. Takes the options of `om.stream_generate`.

        prompt_logprobs: report the log-probability of each of the prompt's tokens, and this many of the likeliest ones at
        its place: `handle.prompt_logprobs` has them. All of the prompt is computed then, a few tokens at a time.
        group: the same for requests of one client that are submitted together: others that come later are not all behind
        them in the queue.

        What is wrong with the request is raised here (PromptError, SettingError, TokenizerError, MemoryLimitError where
        it could never fit), and EngineFullError when the queue is full.
        """
        known = option_names()
        refuse_unknown("engine.submit", {name: each for name, each in options.items() if name not in known}, known)
        shared = self._shared
        self._check_open()
        if prompt_logprobs is not None:
            whole_number("prompt_logprobs", prompt_logprobs, low=0, high=usable_vocab_size(self.model, self.tokenizer))
            options |= {"prefix_cache": None, "prefill_chunk": SCORED_AT_ONCE}
        sequence = new_sequence(self.model, self.tokenizer, prompt, memory=self._runner.memory, **options)
        sequence.request = replace(sequence.request, prompt_logprobs=prompt_logprobs)
        channel = Channel(shared.wake.set, len(sequence.request.prompt_tokens))
        with shared.lock:
            self._check_open()
            self._scheduler.check_room(len(shared.incoming))
            shared.incoming.append(ActiveRequest(shared.num_submitted, sequence, channel, group))
            shared.num_submitted += 1
        shared.wake.set()
        return Handle(channel)

    def submit_several(self, prompt: Prompt | None, count: int, **options: Any) -> list[Handle]:
        """`count` requests of one prompt, which is computed once. With a seed, the answers have seed, seed + 1, ..."""
        whole_number("count", count)
        sampling = options.get("sampling")
        options.setdefault("group", object())
        handles = []
        for i in range(count):
            if isinstance(sampling, SamplingParams) and sampling.seed is not None:
                options["sampling"] = sampling.with_seed((sampling.seed + i) % 2**64)
            handles.append(self.submit(prompt, **options))
        return handles

    def close(self) -> None:
        """Give up what is running and waiting, and end the engine's thread. May be called again."""
        self._stop()

    @property
    def num_running(self) -> int:
        """Requests that are being computed."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        with self._shared.lock:
            return len(self._shared.incoming) + len(self._scheduler.waiting)

    def place_in_queue(self, handle: Handle) -> int | None:
        """How many requests are before this one in the queue; None once it has been admitted."""
        with self._shared.lock:
            waiting = self._scheduler.queue(self._shared.incoming)
        for place, request in enumerate(waiting):
            if request.channel is handle.channel:
                return place
        return None

    @property
    def failure(self) -> BaseException | None:
        """Why the engine's thread has ended, if it has ended by itself: requests are refused from then on."""
        return self._shared.failure

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values of those that are being computed."""
        return self._runner.memory.held_bytes

    def share_memory(self, neighbours: OtherModels | None) -> None:
        """From now on leave room for other engines in the same memory, and let their kept prefixes give way; None: alone."""
        self._runner.memory.share(neighbours)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        shared = self._shared
        if shared.failure is not None:
            raise EngineClosedError(
                f"The engine has ended because of an error ({type(shared.failure).__name__}: {shared.failure}): make a "
                "new om.Engine."
            )
        if shared.is_closing:
            raise EngineClosedError("The engine has been closed: make a new om.Engine.")


def option_names() -> list[str]:
    """The keywords of a request."""
    parameters = inspect.signature(new_sequence).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "memory"]


def _run(runner: Runner, scheduler: Scheduler[ActiveRequest], shared: _Shared) -> None:
    """The engine's thread. It knows nothing of the `Engine`, so that one that is forgotten can be closed."""
    failure: BaseException | None = None
    try:
        runner.prepare()
        while not shared.is_closing:
            shared.wake.clear()
            with shared.lock:  # whoever counts finds a request in one of the two
                while shared.incoming:
                    scheduler.waiting.append(shared.incoming.popleft())
            if shared.is_closing:
                break
            if runner.has_work:
                runner.step()
                wake_readers([request.channel for request in runner.updated()])
            else:
                shared.wake.wait()
    except BaseException as error:  # of ours: nobody may wait for ever
        failure = error
    finally:
        _end(runner, shared, failure)


def _end(runner: Runner, shared: _Shared, failure: BaseException | None) -> None:
    with shared.lock:
        shared.is_closing, shared.failure = True, failure
        left = list(shared.incoming)
        shared.incoming.clear()
    told = failure
    if told is None:
        told = EngineClosedError("The engine was closed before the request had been answered.")
    try:
        runner.close(told)
    finally:
        for request in left:
            request.channel.end(error=told)
        wake_readers([*(request.channel for request in left), *(request.channel for request in runner.updated())])
        end_streams()


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    shared.is_closing = True
    shared.wake.set()
    if thread is not threading.current_thread():
        thread.join()


def answers(
    model: Model, tokenizer: Tokenizer | None, prompts: ManyOf[Prompt], **options: Any
) -> list[tuple[str, Statistics | None]]:
    """The text of an answer to each prompt, computed together, and what it took. Errors say which prompt's they are."""
    with Engine(model, tokenizer, max_waiting=max(MAX_WAITING, len(prompts))) as engine:
        handles = []
        for at, prompt in enumerate(prompts):
            with _numbered(at, len(prompts)):
                handles.append(engine.submit(prompt, **options))
        found = []
        for at, handle in enumerate(handles):
            with _numbered(at, len(prompts)):
                found.append((handle.text(), handle.statistics))
        return found


@contextlib.contextmanager
def _numbered(at: int, count: int) -> Iterator[None]:
    try:
        yield
    except (PromptError, MemoryLimitError) as error:  # what differs from prompt to prompt
        raise type(error)(f"Prompt {at + 1} of {count}: {error}") from None
