"""Loads of requests, and how each library answers one: ours with `Engine`, mlx-lm with its `BatchGenerator`.

Both are asked for the same tokens, take the likeliest one each time, and go on past ends of text, so that their work is the
same. Times are those at which the caller has a token.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..engine.handle import Handle
from ..engine.many import Engine
from ..models.precision import runs_on_cpu
from .against import usable_tokens

if TYPE_CHECKING:
    from ..models import Model

# How often the engine's answers are looked at, in seconds. Less often than a step, and it would show in the times.
POLL = 1e-3
# Prompt lengths of a mixed load, and how many tokens are answered, where the context holds as many.
SHORTEST, LONGEST, FEWEST, MOST = 64, 2048, 32, 192
MIXED_SEED = 1794
# The longest prompt on MLX's CPU backend, which takes minutes for more.
LONGEST_ON_CPU = 128


@dataclass(frozen=True)
class Load:
    """Requests that come all at once: the prompt of each, and how many tokens it gets."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_new_tokens(self) -> int:
        return sum(self.new_tokens)

    def first(self, count: int, new_tokens: int) -> Load:
        """A small one of the same kind, to warm up with."""
        return Load(self.prompts[:count], [min(each, new_tokens) for each in self.new_tokens[:count]])


def aligned_load(model: Model, count: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> Load:
    """`count` requests of the same lengths, each with other tokens: equal prompts would be computed once."""
    return Load(_prompts(model, [prompt_tokens] * count, seed), [new_tokens] * count)


def mixed_load(model: Model, count: int = 64, seed: int = MIXED_SEED, longest: int | None = None) -> Load:
    """Requests of many lengths: most prompts short, few long. The same seed gives the same load.

    longest: tokens of the longest prompt, after which all lengths go, those of answers too; 2,048 on a GPU and 128 on a CPU
    when it is None, and never more than the context. With 2,048 there are 31,950 prompt and 7,176 new tokens.
    """
    if longest is None:
        longest = LONGEST_ON_CPU if runs_on_cpu() else LONGEST
    drawn, scale = random.Random(seed), min(longest, model.context_length) / LONGEST
    lengths, new = [], []
    for _ in range(count):
        length = math.exp(drawn.uniform(math.log(SHORTEST), math.log(LONGEST)))
        new.append(max(2, round(drawn.randint(FEWEST, MOST) * scale)))
        lengths.append(max(2, min(round(length * scale), model.context_length - new[-1])))
    return Load(_prompts(model, lengths, seed), new)


def _prompts(model: Model, lengths: Sequence[int], seed: int) -> list[list[int]]:
    drawn, vocab_size = random.Random(seed), usable_tokens(model)
    return [[drawn.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


@dataclass
class Timeline:
    """When the tokens of each request were there, in seconds after all were asked for.

    peak_bytes: the most in use beside what was in use before. given_up_after: so many seconds, where the time ended first.
    """

    arrivals: list[list[float]]
    peak_bytes: int = 0
    given_up_after: float | None = None

    @property
    def is_complete(self) -> bool:
        return self.given_up_after is None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.arrivals))

    @property
    def seconds(self) -> float:
        """To the last token."""
        return max(each[-1] for each in self.arrivals)

    @property
    def first_tokens(self) -> list[float]:
        """Of each request; where none came, infinity."""
        return [each[0] if each else math.inf for each in self.arrivals]


@dataclass
class Window:
    """A stretch of time in which all requests decode: from `left_out` tokens after the last one has come in, `wanted` tokens
    of each. Without one a load runs to its end.
    """

    wanted: int
    left_out: int
    began: float | None = None
    ended: float | None = None
    _all_in: list[int] = field(default_factory=list)
    _first: list[int] = field(default_factory=list)
    _last: list[int] = field(default_factory=list)

    def is_over(self, arrivals: Sequence[Sequence[float]], now: float) -> bool:
        """Look at what has come until now."""
        counts = [len(each) for each in arrivals]
        if not self._all_in:
            if min(counts) > 0:
                self._all_in = counts
        elif self.began is None:
            if _least(counts, self._all_in) >= self.left_out:
                self.began, self._first = now, counts
        elif _least(counts, self._first) >= self.wanted:
            self.ended, self._last = now, counts
        return self.ended is not None

    @property
    def rate(self) -> float | None:
        """Tokens a second of all requests together; None where not all of them came so far."""
        if self.began is None or self.ended is None:
            return None
        return (sum(self._last) - sum(self._first)) / (self.ended - self.began)

    @property
    def tokens_before(self) -> float:
        """How many tokens a request had when the window began, on average."""
        return sum(self._first) / max(1, len(self._first))


def _least(counts: Sequence[int], before: Sequence[int]) -> int:
    return min(now - then for now, then in zip(counts, before, strict=True))


def without_ends(model: Model) -> Model:
    """The model, for which no token ends a text from now on. A bias against them would be work that mlx-lm does not have."""
    model.spec = replace(model.spec, eos_tokens=())
    return model


def run_engine(
    model: Model,
    load: Load,
    seconds: float,
    window: Window | None = None,
    max_running: int | None = None,
    running: Engine | None = None,
) -> Timeline:
    """Answer a load with an engine, for at most so many seconds. Raises what a request raises.

    running: one that is there already, as a server's is, and stays. It has to be given time enough.
    """
    timeline, before = _timeline(load), _memory_before()
    made = Engine(model, None, max_running, len(load.prompts)) if running is None else nullcontext(running)
    with made as engine:
        started = time.perf_counter()
        handles = _submitted(engine, load)
        left = dict(enumerate(handles))
        while left:
            now = time.perf_counter() - started
            num_left = len(left)
            if not _take(left, timeline, now):
                time.sleep(POLL)
            elif window is not None and (window.is_over(timeline.arrivals, now) or len(left) < num_left):
                break
            if now > seconds:
                timeline.given_up_after = now
                for handle in left.values():
                    handle.cancel()
                break
    peaks = [each.statistics.peak_memory_bytes for each in handles if each.statistics is not None]
    # The engine counts anew for each request: what MLX says is since the last one.
    timeline.peak_bytes = max(0, max([mx.get_peak_memory(), *peaks]) - before)
    return timeline


def _submitted(engine: Engine, load: Load) -> list[Handle]:
    return [
        engine.submit(prompt, max_tokens=count) for prompt, count in zip(load.prompts, load.new_tokens, strict=True)
    ]


def _take(left: dict[int, Handle], timeline: Timeline, now: float) -> bool:
    """Whatever has come since, and whether anything has; those that are done are left no more."""
    found = False
    for place, handle in list(left.items()):
        items = handle.channel.items
        while not items.empty():
            found = True
            if next(handle, None) is None:
                del left[place]
                break
            timeline.arrivals[place].append(now)
    return found


def run_batches(
    model: Any,
    load: Load,
    seconds: float,
    window: Window | None = None,
    max_running: int | None = None,
    caches: list[list[Any]] | None = None,
) -> Timeline:
    """Answer a load with mlx-lm's BatchGenerator, for about so many seconds: it is asked between its steps.

    caches: what each request's prompt comes after; then all of them begin in one step.
    """
    from mlx_lm.generate import BatchGenerator

    timeline, before = _timeline(load), _memory_before()
    sizes = {} if max_running is None else {"completion_batch_size": max_running}
    if caches is not None:
        sizes["prefill_batch_size"] = len(load.prompts)
    generator = BatchGenerator(model, **sizes)
    try:
        started = time.perf_counter()
        uids = generator.insert(load.prompts, load.new_tokens, caches=caches)
        places = {uid: place for place, uid in enumerate(uids)}
        left = set(uids)
        while left:
            _, responses = generator.next()
            now = time.perf_counter() - started
            for each in responses:
                timeline.arrivals[places[each.uid]].append(now)
                if each.finish_reason is not None:
                    left.discard(each.uid)
            if window is not None and (window.is_over(timeline.arrivals, now) or len(left) < len(uids)):
                break
            if now > seconds:
                timeline.given_up_after = now
                break
    finally:
        generator.close()
    timeline.peak_bytes = max(0, mx.get_peak_memory() - before)
    return timeline


def read_prompt(model: Any, prompt: list[int], count: int, chunk: int = 2048) -> list[list[Any]]:
    """mlx-lm's caches for `count` requests that all begin with `prompt`, which is computed once."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for start in range(0, len(prompt), chunk):
        model(mx.array(prompt[start : start + chunk])[None], cache=cache)
        mx.eval([each.state for each in cache])
    return [cache] * count  # they are copied into one batch, and stay as they are


def _timeline(load: Load) -> Timeline:
    return Timeline([[] for _ in load.prompts])


def _memory_before() -> int:
    """What is in use, with nothing kept from before and the peak counted anew."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    return before
