"""The next tokens of many requests in one call. Each row gets the token that its own sampler would choose alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from ..models.precision import runs_on_cpu
from .sampling import CompiledChoices, Sampler

_choices = CompiledChoices()


class SamplerGroup:
    """Samplers of one form (`Sampler.form`), with their keys and counts stacked while they choose together.

    While a group is in use its samplers' own state is out of date; `release` brings it up to date.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.samplers = list(samplers)
        self._form = self.samplers[0].without_arrays()
        columns = [list(column) for column in zip(*(each.arrays for each in self.samplers), strict=True)]
        self._arrays = [_stacked(column) for column in columns]

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token of each row, (n,) uint32, from its logits (n, V). Lazy."""
        choose = _batch_choice(self._form) if runs_on_cpu() else _choices.of(self._form, _batch_choice)
        tokens, *state = choose(logits, self._arrays)
        self._arrays[: len(state)] = state
        return cast(mx.array, tokens)

    def release(self) -> None:
        """Give each sampler its own state back."""
        keys, *rest = self._arrays
        for row, sampler in enumerate(self.samplers):
            in_answer = None if sampler.state[1] is None else rest[0][row]
            sampler.state = keys[row], in_answer


def _stacked(arrays: list[mx.array]) -> mx.array:
    """(n, ...); a bias that all have in common stays one."""
    is_common = len(arrays) > 1 and all(each is arrays[0] for each in arrays)
    return arrays[0] if is_common else mx.stack(arrays)


def _batch_choice(form: Sampler) -> Callable[..., Any]:
    """A function of logits (n, V) and the stacked arrays of n samplers: the tokens (n,), and the arrays that change."""

    def choose(logits: mx.array, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        sampler = form.with_arrays(arrays)
        processed = sampler.processed(logits)
        keys = arrays[0]
        if form.params.temperature == 0.0:
            tokens = mx.argmax(processed, axis=-1)
        else:
            pairs = mx.vmap(mx.random.split)(keys)
            keys = pairs[:, 0]
            tokens = mx.vmap(_drawn)(processed, pairs[:, 1])
        in_answer = sampler.state[1]
        if in_answer is None:
            return tokens, keys
        return tokens, keys, in_answer.at[mx.arange(tokens.size), tokens].add(1.0)

    return choose


def _drawn(logits: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)
