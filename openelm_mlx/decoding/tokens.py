"""The tokens of an answer, one after the other: how they are chosen and when the device starts on the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .sampling import Sampler, log_probabilities
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


def one_by_one(
    step: Step, sampler: Sampler, logits: mx.array, max_tokens: int, num_logprobs: int | None = None
) -> Iterator[Choice]:
    """`max_tokens` tokens, the first of them chosen from `logits` (V,); the caller stops earlier where it wants to.

    The next step is dispatched before this token is handed over, so that the device works while the host makes text of
    it; after the caller has stopped, one token more than it took may be in the cache.
    """
    choice = choose(sampler, logits, num_logprobs)
    for count in range(1, max_tokens + 1):
        upcoming = None
        if count < max_tokens and step.runs_ahead:
            upcoming = choose(sampler, step(choice.token), num_logprobs)
        yield choice
        if count == max_tokens:
            return
        choice = choose(sampler, step(choice.token), num_logprobs) if upcoming is None else upcoming


def choose(sampler: Sampler, logits: mx.array, num_logprobs: int | None) -> Choice:
    """Choose the next token from `logits` (V,) and start computing it."""
    token = sampler(logits)
    choice = Choice(token)
    if num_logprobs is not None:
        choice = Choice(token, *log_probabilities(logits, token, num_logprobs))
    mx.async_eval([array for array in (choice.token, choice.logprob, choice.top) if array is not None])
    return choice
