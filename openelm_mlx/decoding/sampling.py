"""From logits to a token. Everything stays on the device, so that the next step can be built before this token is known."""

from __future__ import annotations

import copy
import functools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import mlx.core as mx

from ..arguments import checked_call
from ..checks import is_number, whole_number
from ..errors import SettingError
from ..files import shown
from ..models.precision import runs_on_cpu
from ..models.tracing import compile_apart

_LOWEST = -1e30
# Parameters that only affect a sampler's arrays.
_NOT_IN_FORM = ("logit_bias", "seed")


@checked_call("om.SamplingParams")
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 divides the logits before drawing.
        top_k: Draw among the k likeliest (0: all).
        top_p: Draw among the likeliest that together have this probability (1: all).
        min_p: Drop tokens less likely than this fraction of the likeliest (0: none). The three apply in this
            order, at the given temperature.
        repetition_penalty: Divide positive and multiply negative logits of tokens in prompt or answer by it
            (arXiv 1909.05858; 1: off). presence_penalty and frequency_penalty: subtract once, or once an
            occurrence, for tokens of the answer (OpenAI's definition; 0: off).
        logit_bias: Token -> what is added to its logit.
        seed: The same seed gives the same text; None draws a new one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        whole_number("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise SettingError(f"logit_bias is {shown(self.logit_bias)}: give a dictionary of token to number.")
        for token, bias in self.logit_bias.items():
            whole_number("logit_bias token", token, 0, 2**31 - 1)
            # -inf forbids a token; +inf or nan would leave no distribution to draw from.
            if bias != -math.inf:
                _check(f"logit_bias of token {token}", bias, -1e9, 1e9)
        if self.seed is not None:
            whole_number("seed", self.seed, 0, 2**64 - 1)

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed."""
        return replace(self, seed=seed)

    def check_tokens(self, usable_vocab_size: int) -> None:
        """Raise SettingError when a token is named that the model does not have."""
        too_large = [token for token in self.logit_bias if token >= usable_vocab_size]
        if too_large:
            raise SettingError(
                f"logit_bias names token {too_large[0]}; the model's tokens end at {usable_vocab_size - 1}."
            )


class Sampler:
    """Chooses one token a call for one sequence, and counts the chosen tokens for the penalties.

    vocab_size: rows of logits. usable_vocab_size: ids from there on are not tokens of the tokenizer and are never chosen.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, usable_vocab_size: int, prompt_tokens: Sequence[int] = ()
    ) -> None:
        params.check_tokens(usable_vocab_size)
        self.params = params
        # What makes of this machine's choice the one that holds, where several machines share the model.
        self.agreed: Callable[[mx.array], mx.array] | None = None
        self._bias = _bias(params.logit_bias, vocab_size, usable_vocab_size)
        self._key = mx.random.key(secrets.randbits(63) if params.seed is None else params.seed)
        self._in_prompt = self._in_answer = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self._in_prompt = _occurrences(prompt_tokens, vocab_size)
            self._in_answer = mx.zeros((vocab_size,), mx.float32)

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """The next token, a uint32 scalar, from its logits (V,). Lazy. allowed: (V,) of bool, what may be chosen."""
        logits = self.processed(logits, allowed)
        if self.params.temperature == 0.0:
            token = mx.argmax(logits)
        else:
            token = mx.random.categorical(logits, key=self.next_key())
        self.count(token)
        return token

    def agree(self, token: mx.array) -> mx.array:
        """The token that holds where this sampler has chosen `token`: the first machine's, where several share the model.

        Their logits may differ in the last bit, and their random keys do; the first one's sampler is the one that counts.
        """
        return token if self.agreed is None else self.agreed(token)

    def processed(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """The logits (V,) after penalties and filters, from which the token is chosen or drawn."""
        logits = self.adjusted(logits)
        if allowed is not None:
            # A finite floor: allowed tokens can be chosen even if a bias of -inf forbids all of them.
            logits = mx.where(allowed, mx.maximum(logits, _LOWEST), -mx.inf)
        return logits if self.params.temperature == 0.0 else self.filtered(logits)

    def next_key(self) -> mx.array:
        """A key for one draw."""
        self._key, key = mx.random.split(self._key)
        return key

    def count(self, token: mx.array | int) -> None:
        """Count `token` for the penalties."""
        if self._in_answer is not None:
            self._in_answer = self._in_answer.at[token].add(1.0)

    @property
    def state(self) -> tuple[mx.array | None, ...]:
        """What the next choice depends on besides the logits; set it to take choices back."""
        return self._key, self._in_answer

    @state.setter
    def state(self, state: tuple[mx.array | None, ...]) -> None:
        self._key, self._in_answer = cast(mx.array, state[0]), state[1]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Everything that a choice depends on besides the logits and `form`."""
        every = (self._key, self._in_answer, self._in_prompt, self._bias)
        return tuple(array for array in every if array is not None)

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for two samplers that are the same function of logits and `arrays`."""
        numbers = (getattr(self.params, each.name) for each in fields(self.params) if each.name not in _NOT_IN_FORM)
        return (*numbers, self._in_answer is None, self._bias is None)

    def with_arrays(self, arrays: Sequence[mx.array]) -> Sampler:
        """A sampler of the same form with `arrays`."""
        new, rest = copy.copy(self), list(arrays)
        new._key = rest.pop(0)
        if self._in_answer is not None:
            new._in_answer, new._in_prompt = rest.pop(0), rest.pop(0)
        if self._bias is not None:
            new._bias = rest.pop(0)
        return new

    def without_arrays(self) -> Sampler:
        """A sampler of the same form with nothing in it: its own arrays are as large as the vocabulary."""
        return self.with_arrays([mx.array(0)] * len(self.arrays))

    def adjusted(self, logits: mx.array) -> mx.array:
        """The logits (V,) in float32 after penalties and bias, with -inf for ids that are not tokens."""
        logits = logits.astype(mx.float32)
        if self._in_answer is not None and self._in_prompt is not None:
            logits = self._penalized(logits, self._in_prompt, self._in_answer)
        return logits if self._bias is None else logits + self._bias

    def filtered(self, logits: mx.array) -> mx.array:
        """Logits (..., V) to draw from: over temperature, with what top_k, top_p and min_p leave out at -inf."""
        logits = logits / self.params.temperature
        if 0 < self.params.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.params.top_k)
        if self.params.top_p < 1.0:
            logits = keep_top_p(logits, self.params.top_p)
        if self.params.min_p > 0.0:
            logits = keep_min_p(logits, self.params.min_p)
        return logits

    def _penalized(self, logits: mx.array, in_prompt: mx.array, in_answer: mx.array) -> mx.array:
        penalty = self.params.repetition_penalty
        if penalty != 1.0:
            repeated = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where((in_prompt + in_answer) > 0, repeated, logits)
        logits = logits - self.params.presence_penalty * (in_answer > 0)
        return logits - self.params.frequency_penalty * in_answer


def unpacked(words: mx.array, vocab_size: int) -> mx.array:
    """A constraint's mask, uint32 words with one bit a token, as (vocab_size,) of bool; False past its end. Lazy."""
    allowed = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).astype(mx.bool_).reshape(-1)
    if allowed.size < vocab_size:
        return mx.pad(allowed, (0, vocab_size - allowed.size))
    return allowed[:vocab_size]


class CompiledChoices:
    """Functions that choose tokens, compiled once for each form of sampler. The oldest go where there are many."""

    MOST = 32

    def __init__(self) -> None:
        self._compiled: dict[tuple[object, ...], Callable[..., Any]] = {}

    def of(self, sampler: Sampler, make: Callable[[Sampler], Callable[..., Any]]) -> Callable[..., Any]:
        """The function that `make` gives for a sampler of this form without its arrays, compiled."""
        form = sampler.form
        choose = self._compiled.get(form)
        if choose is None:
            while len(self._compiled) >= self.MOST:
                self._compiled.pop(next(iter(self._compiled)), None)
            choose = self._compiled[form] = compile_apart(make(sampler.without_arrays()))
        return choose


_choices = CompiledChoices()


def choice_among(sampler: Sampler, logits: mx.array, words: mx.array) -> mx.array:
    """`sampler`'s choice from the logits (V,) among what a constraint's mask allows. Lazy.

    words: as for `unpacked`. On a GPU it is compiled: a mask comes with every token, and dispatching its single operations
    costs more than computing them.
    """
    if runs_on_cpu():
        return sampler(logits, unpacked(words, logits.size))
    choose = _choices.of(sampler, _masked_choice)
    token, *state = choose(logits, words, sampler.arrays)
    sampler.state = tuple(state)
    return cast(mx.array, token)


def _masked_choice(form: Sampler) -> Callable[..., Any]:
    def choose(logits: mx.array, words: mx.array, arrays: Sequence[mx.array]) -> tuple[mx.array | None, ...]:
        sampler = form.with_arrays(arrays)
        return (sampler(logits, unpacked(words, logits.size)), *sampler.state)

    return choose


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """The k largest logits (..., V), the rest at -inf; ties at the border all stay."""
    threshold = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits >= threshold, logits, -mx.inf)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """The smallest set of likeliest logits (..., V) whose probability reaches p, the rest at -inf (arXiv 1904.09751)."""
    order = mx.argsort(-logits, axis=-1)
    ordered = mx.take_along_axis(logits, order, axis=-1)
    probs = mx.softmax(ordered, axis=-1)
    # A token stays while those before it have not reached p; the likeliest always does.
    keep = (mx.cumsum(probs, axis=-1) - probs) < p
    return mx.put_along_axis(mx.full(logits.shape, -mx.inf), order, mx.where(keep, ordered, -mx.inf), axis=-1)


def keep_min_p(logits: mx.array, fraction: float) -> mx.array:
    """The logits (..., V) of tokens at least `fraction` as likely as the likeliest, the rest at -inf (arXiv 2407.01082)."""
    return mx.where(logits >= mx.max(logits, axis=-1, keepdims=True) + math.log(fraction), logits, -mx.inf)


def log_probabilities(logits: mx.array, token: mx.array, num_top: int) -> tuple[mx.array, mx.array, mx.array]:
    """The model's own log-probability of `token`, and its `num_top` likeliest tokens with theirs, best first. Lazy.

    logits (V,), before penalties and temperature -> scalar, (num_top,) tokens, (num_top,) log-probabilities.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    if num_top == 0:
        return logprobs[token], mx.array([], mx.uint32), mx.array([])
    top = mx.argpartition(-logprobs, num_top - 1)[:num_top]
    top = top[mx.argsort(-logprobs[top])]
    return logprobs[token], top, logprobs[top]


def _bias(logit_bias: Mapping[int, float], vocab_size: int, usable_vocab_size: int) -> mx.array | None:
    """The bias to add to the logits (V,), or None if there is none."""
    if not logit_bias and usable_vocab_size >= vocab_size:
        return None
    bias = _without_padding(vocab_size, usable_vocab_size)
    if not logit_bias:
        return bias
    return bias.at[mx.array(list(logit_bias))].add(mx.array([float(value) for value in logit_bias.values()]))


@functools.lru_cache(maxsize=8)
def _without_padding(vocab_size: int, usable_vocab_size: int) -> mx.array:
    """0 for tokens and -inf for the rows of padding behind them, (V,): one array for all samplers of a model."""
    bias = mx.where(mx.arange(vocab_size) < usable_vocab_size, 0.0, -math.inf)
    mx.eval(bias)  # by whichever thread asks first: others may not evaluate what it has begun
    return bias


def _occurrences(tokens: Sequence[int], vocab_size: int) -> mx.array:
    counts = mx.zeros((vocab_size,), mx.float32)
    return counts.at[mx.array(list(tokens))].add(1.0) if tokens else counts


def _check(name: str, value: float, low: float, high: float, above_low: bool = False) -> None:
    if not is_number(value) or not (low < value <= high if above_low else low <= value <= high):
        border = f"above {low:g}" if above_low else f"at least {low:g}"
        raise SettingError(f"{name} is {shown(value)}: it must be a number, {border} and at most {high:g}.")
