"""The tokens of an answer, one after the other: how they are chosen and when the device starts on the next.

A source of tokens is a generator that computes nothing itself. It asks for logits (`Forward`) and for work on the host
(`HostWork`), is sent what came of it, and hands over its tokens (`Choice`). `drive` answers with the step of one request;
the engine (engine/runner.py) answers many sources with one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from .constraint import TokenConstraint
from .sampling import Sampler, choice_among, log_probabilities
from .step import Step


@dataclass(frozen=True)
class Choice:
    """A chosen token that may still be being computed, with its log-probabilities when asked for.

    logprob: scalar; top (n,) tokens and top_logprobs (n,): the likeliest alternatives, best first.
    """

    token: mx.array
    logprob: mx.array | None = None
    top: mx.array | None = None
    top_logprobs: mx.array | None = None

    def item(self) -> int:
        """The token on the host; waits for it."""
        return cast(int, self.token.item())

    def logprob_values(self) -> tuple[float | None, dict[int, float] | None]:
        """The log-probability and the alternatives on the host; (None, None) when they were not asked for."""
        if self.logprob is None or self.top is None or self.top_logprobs is None:
            return None, None
        tokens, logprobs = cast("list[int]", self.top.tolist()), cast("list[float]", self.top_logprobs.tolist())
        return cast(float, self.logprob.item()), dict(zip(tokens, logprobs, strict=True))


class Forward(NamedTuple):
    """A source asks for logits: (V,) after one more token (a scalar), (L, V) after each of several tokens (L,).

    sampler: with it, for one token, the source is sent the logits and the token that the sampler chooses from them.
    """

    tokens: mx.array
    sampler: Sampler | None = None


class HostWork(NamedTuple):
    """A source asks for what `call` gives. It touches no array of MLX's, so that a thread beside MLX's may do it."""

    call: Callable[[], Any]


# What it asks for or hands over, and what it is sent: logits for a Forward, the result of a HostWork, None for a Choice.
TokenSource = Generator["Forward | HostWork | Choice", Any, None]


def drive(step: Step, source: TokenSource) -> Iterator[Choice]:
    """The tokens of `source`, computed by the step of one request."""
    try:
        wanted = next(source)
        while True:
            if isinstance(wanted, Choice):
                yield wanted
                wanted = next(source)
            elif isinstance(wanted, Forward):
                wanted = source.send(computed(step, wanted))
            else:
                wanted = source.send(wanted.call())
    except StopIteration:
        return
    finally:
        source.close()


def computed(step: Step, wanted: Forward) -> Any:
    """What a source is sent for a `Forward`, by the step of one request."""
    if wanted.sampler is not None:
        return step.choose(wanted.tokens, wanted.sampler)
    return step(wanted.tokens) if wanted.tokens.ndim == 0 else step.many(wanted.tokens)


def one_by_one(
    step: Step, sampler: Sampler, logits: mx.array, max_tokens: int, num_logprobs: int | None = None
) -> Iterator[Choice]:
    """`max_tokens` tokens, the first of them chosen from `logits` (V,); the caller stops earlier where it wants to.

    The next step is dispatched before this token is handed over, so that the device works while the host makes text of
    it; after the caller has stopped, one token more than it took may be in the cache.
    """
    return drive(step, plain_source(step, sampler, logits, max_tokens, num_logprobs))


def plain_source(
    step: Step, sampler: Sampler, logits: mx.array, max_tokens: int, num_logprobs: int | None = None
) -> TokenSource:
    """The source of `one_by_one`; `step` is asked whether it runs ahead, and nothing else."""
    choice = choose(sampler, logits, num_logprobs)
    for _ in range(max_tokens - 1):
        if step.runs_ahead:
            logits, token = yield Forward(choice.token, sampler)
            upcoming = started(logits, token, num_logprobs)
            yield choice
        else:
            yield choice
            logits, token = yield Forward(choice.token, sampler)
            upcoming = started(logits, token, num_logprobs)
        choice = upcoming
    yield choice


def constrained_source(
    step: Step,
    sampler: Sampler,
    logits: mx.array,
    max_tokens: int,
    constraint: TokenConstraint,
    num_logprobs: int | None = None,
) -> TokenSource:
    """`max_tokens` tokens, every one of them one that `constraint` accepts; `step` is asked for its cache alone.

    The next step is dispatched before this token is read, and its mask is worked out on the host while the device
    computes: only the choice waits for both. A token that is not accepted after all (the answer could not end any more)
    is rare; the step with it is taken back then. In free text the next choice is made ahead, too, with the mask that most
    likely holds, and made again if it did not.
    """
    masks = _Masks()
    words, state = (yield HostWork(constraint.mask)), sampler.state
    choice = choose(sampler, logits, num_logprobs, masks(words))
    for count in range(1, max_tokens + 1):
        next_logits, upcoming, next_state = None, None, sampler.state
        if count < max_tokens and step.runs_ahead:
            next_logits = yield Forward(choice.token)
            if constraint.is_free():
                upcoming = choose(sampler, next_logits, num_logprobs, masks(words))
            else:
                mx.async_eval(next_logits)
        if not (yield HostWork(partial(constraint.accept, choice.item()))):
            if next_logits is not None:
                next_logits = upcoming = None
                for layer in step.cache:
                    layer.rewind(1)
            # The new mask has tokens that are accepted alone.
            sampler.state = state
            choice = choose(sampler, logits, num_logprobs, masks((yield HostWork(constraint.mask))))
            is_accepted, next_state = constraint.accept(choice.item()), sampler.state
            assert is_accepted, f"token {choice.item()} is in the mask and not accepted"
        if count < max_tokens and next_logits is None and not constraint.is_finished:
            next_logits = yield Forward(choice.token)
            mx.async_eval(next_logits)
        yield choice
        if next_logits is None or constraint.is_finished:
            return
        logits, state, expected, words = next_logits, next_state, words, (yield HostWork(constraint.mask))
        if upcoming is not None and words is expected:
            choice = upcoming
        else:
            sampler.state = state
            choice = choose(sampler, logits, num_logprobs, masks(words))


class _Masks:
    """A constraint's masks on the device. The last one is kept: in free text it is the same for many tokens."""

    def __init__(self) -> None:
        self._words: np.ndarray | None = None
        self._mask: mx.array | None = None

    def __call__(self, words: np.ndarray | None) -> mx.array | None:
        if words is not self._words:
            self._words, self._mask = words, None if words is None else mx.array(words)
        return self._mask


def choose(sampler: Sampler, logits: mx.array, num_logprobs: int | None, words: mx.array | None = None) -> Choice:
    """Choose the next token from `logits` (V,) and start computing it. words: a constraint's mask, what may be chosen."""
    token = sampler(logits) if words is None else choice_among(sampler, logits, words)
    return started(logits, sampler.agree(token), num_logprobs)


def started(logits: mx.array, token: mx.array, num_logprobs: int | None) -> Choice:
    """Start computing `token`, chosen from `logits` (V,), and its log-probabilities when they were asked for."""
    choice = Choice(token)
    if num_logprobs is not None:
        choice = Choice(token, *log_probabilities(logits, token, num_logprobs))
    mx.async_eval([array for array in (choice.token, choice.logprob, choice.top) if array is not None])
    return choice
