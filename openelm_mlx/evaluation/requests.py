"""What is scored: tokens, and how many of the last of them are the continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Called with how many more are done.
OnDone = Callable[[int], None]
# Called with what is being done, how many more are done, and how many there are.
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TokenRequest:
    """A context and the continuation whose log-likelihood is wanted, as tokens; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], context_length: int | None = None) -> TokenRequest:
        """Of two lists of tokens, whose beginning is cut off where they are longer than context_length + 1 together.

        The last token is predicted and never read, so that one more than the context holds can be scored.
        """
        assert context
        assert continuation
        tokens = (*context, *continuation)
        if context_length is not None and len(tokens) > context_length + 1:
            tokens = tokens[-(context_length + 1) :]
        at = max(1, len(tokens) - len(continuation))
        return cls(tokens[:at], tokens[at:])

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: everything but the last token."""
        return (*self.context, *self.continuation[:-1])


class Score(NamedTuple):
    """The sum of a continuation's log-probabilities, and whether each of its tokens was the likeliest one."""

    logprob: float
    is_greedy: bool
