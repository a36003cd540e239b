"""Guess several tokens, and let the model check all of them in one pass (arXiv 2211.17192).

Greedy: the tokens are those of the plain loop. Sampled: they have the plain loop's distribution, since a guess is taken
with probability min(1, p / q) and replaced by a draw from the positive part of p - q; p and q are what is drawn from after
penalties, bias, the constraint's mask, temperature and filters. While guessing loses time, plain steps are made instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ..models.precision import runs_on_cpu
from ..specs import ModelSpec
from .constraint import TokenConstraint
from .drafts import Draft, Guesser
from .sampling import Sampler, log_probabilities, unpacked
from .speculation_gain import DraftHistory, Gain
from .step import Step
from .tokens import Choice, Forward, TokenSource, constrained_source, drive, plain_source

if TYPE_CHECKING:
    from ..models import Model

# What MLX's Metal kernels of attention take (backend/metal/scaled_dot_product_attention.cpp, 0.32.2).
FUSED_PRODUCT, LEAST_OF_MANY = 32, 9

# Plain steps where there is nothing to guess by.
_WITHOUT_GUESS = 3


class Speculative:
    """The tokens of an answer, as `one_by_one` gives them. gain: what it measures and decides by; history: of earlier requests.

    prompt: the tokens in the step's cache, whose rings have room for `num_draft_tokens`. may_guess: asked before each
    guess; where it says no, plain steps are made.
    """

    def __init__(
        self,
        model: Model,
        step: Step,
        sampler: Sampler,
        prompt: Sequence[int],
        guesser: Guesser,
        num_draft_tokens: int,
        num_logprobs: int | None = None,
        constraint: TokenConstraint | None = None,
        gain: Gain | None = None,
        history: DraftHistory | None = None,
        clock: Callable[[], float] = time.perf_counter,
        may_guess: Callable[[], bool] | None = None,
    ) -> None:
        self._model, self._step, self._sampler, self._guesser = model, step, sampler, guesser
        self._num_logprobs, self._constraint = num_logprobs, constraint
        self._tokens = list(prompt)
        self.gain = Gain(num_draft_tokens, history) if gain is None else gain
        self._clock, self._may_guess = clock, may_guess

    def choices(self, logits: mx.array, max_tokens: int) -> Iterator[Choice]:
        """`max_tokens` tokens, the first of them chosen from `logits` (V,); the caller stops earlier where it wants to."""
        return drive(self._step, self.source(logits, max_tokens))

    def source(self, logits: mx.array, max_tokens: int) -> TokenSource:
        """`choices` for whoever computes the passes; the step is asked for its cache alone."""
        stop = len(self._tokens) + max_tokens
        yield from self._plain(logits, 1, is_measured=False)
        while len(self._tokens) < stop and not self._is_finished:
            left = stop - len(self._tokens)
            pause = self.gain.pause()
            is_alone = self._may_guess is None or self._may_guess()
            if pause or not is_alone:
                logits = yield Forward(mx.array(self._tokens[-1]))
                yield from self._plain(logits, min(pause or _WITHOUT_GUESS, left), is_measured=is_alone)
            else:
                yield from self._round(left)

    @property
    def _is_finished(self) -> bool:
        return self._constraint is not None and self._constraint.is_finished

    def _plain(self, logits: mx.array, count: int, is_measured: bool) -> TokenSource:
        """`count` tokens without a guess; the last one is not in the cache, as after a round."""
        if self._constraint is None:
            source = plain_source(self._step, self._sampler, logits, count, self._num_logprobs)
        else:
            source = constrained_source(self._step, self._sampler, logits, count, self._constraint, self._num_logprobs)
        began = self._clock()
        num_given, reply = 0, None
        while True:
            try:
                wanted = source.send(reply)
            except StopIteration:
                return
            if not isinstance(wanted, Choice):
                reply = yield wanted
                continue
            self._tokens.append(wanted.item())
            reply = yield wanted
            began, seconds = self._clock(), self._clock() - began
            if is_measured and (num_given or count < _WITHOUT_GUESS):  # the first has no step under way before it
                self.gain.plain_token(seconds)
            num_given += 1

    def _round(self, left: int) -> TokenSource:
        """One guess and its verification, or a few plain tokens where there is nothing to go by."""
        began, before = self._clock(), len(self._tokens)
        guide = Guided(self._constraint, self._model.spec.vocab_size)
        state = self._sampler.state
        draft = None
        if left > 1:
            count = num_fused(min(self.gain.num_drafts, left - 1), self._model.spec)
            draft = self._guesser.guess(self._tokens, count, self._sampler, guide)
        guide.back()
        # The keys that were drawn stay drawn; the penalties are those before the guess again.
        self._sampler.state = (self._sampler.state[0], *state[1:])
        if draft is None:
            logits = yield Forward(mx.array(self._tokens[-1]))
            yield from self._plain(logits, min(_WITHOUT_GUESS, left), is_measured=False)
        else:
            fed = mx.concatenate([mx.array(self._tokens[-1:], mx.uint32), draft.tokens])
            for choice in self._verified(draft, guide.masks, (yield Forward(fed))):
                self._tokens.append(choice.item())
                yield choice
        self.gain.round(self._clock() - began, len(self._tokens) - before)

    def _verified(self, draft: Draft, masks: list[mx.array | None], logits: mx.array) -> list[Choice]:
        """The guesses that hold, and the token after them. logits (k + 1, V): after the last token and each guess."""
        cache, num_drafts = self._step.cache, draft.tokens.size
        start = cache[0].offset - num_drafts - 1
        guesses, others, num_held = self._compare(draft, logits, masks)
        tokens = [*guesses[:num_held], others[num_held]]
        self.gain.counts.rounds += 1
        self.gain.counts.drafted += num_drafts
        self.gain.counts.accepted += num_held
        choices = self._chosen(tokens, logits)
        for layer in cache:
            layer.rewind(1 + num_drafts - len(choices))
        assert {layer.offset for layer in cache} == {start + len(choices)}, "layers disagree about the offset"
        return choices

    def _compare(
        self, draft: Draft, logits: mx.array, masks: list[mx.array | None]
    ) -> tuple[list[int], list[int], int]:
        """The guesses (k), what would take the place of each and what follows the last (k + 1), and how many hold."""
        sampler, state = self._sampler, self._sampler.state
        num_drafts = draft.tokens.size
        processed = []
        for i in range(num_drafts + 1):
            processed.append(sampler.processed(logits[i], masks[i] if i < len(masks) else None))
            if i < num_drafts:
                sampler.count(draft.tokens[i])
        sampler.state = (sampler.state[0], *state[1:])
        if sampler.params.temperature == 0.0:
            others = mx.stack([mx.argmax(each) for each in processed])
            holds = others[:-1] == draft.tokens
        else:
            others, holds = self._drawn(draft, mx.softmax(mx.stack(processed), axis=-1))
        mx.eval(draft.tokens, others, holds)  # the host needs them: the one wait of a round
        held = np.array(holds)
        num_held = int(np.argmin(held)) if not held.all() else num_drafts
        return cast("list[int]", draft.tokens.tolist()), cast("list[int]", others.tolist()), num_held

    def _drawn(self, draft: Draft, probs: mx.array) -> tuple[mx.array, mx.array]:
        """Draws (k + 1,) for where a guess does not hold, and which guesses (k,) do. probs (k + 1, V): the model's."""
        tokens = draft.tokens[:, None].astype(mx.int32)
        if draft.probs is None:
            guessed = (mx.arange(probs.shape[-1])[None] == tokens).astype(mx.float32)
        else:
            guessed = mx.stack(draft.probs)
        p, q = (mx.take_along_axis(each, tokens, axis=-1)[:, 0] for each in (probs[:-1], guessed))
        holds = mx.random.uniform(shape=p.shape, key=self._sampler.next_key()) * q < p
        rest = mx.maximum(probs[:-1] - guessed, 0)
        # Where p equals q but for rounding, nothing is left, and the guess holds but for rounding.
        rest = mx.where(mx.sum(rest, axis=-1, keepdims=True) > 0, rest, probs[:-1])
        weights = mx.log(mx.concatenate([rest, probs[-1:]]))
        return mx.random.categorical(weights, key=self._sampler.next_key()), holds

    def _chosen(self, tokens: list[int], logits: mx.array) -> list[Choice]:
        """The tokens as choices, as far as the constraint takes them; logits (k + 1, V), of which each came."""
        choices: list[Choice] = []
        for token, each in zip(tokens, logits, strict=False):
            is_taken = self._constraint is None or self._constraint.accept(token)
            if is_taken:
                self._sampler.count(token)
                array = mx.array(token, mx.uint32)
            else:
                assert self._constraint is not None
                # It leaves no room to end the answer; the new mask has what does, as in `constrained`.
                allowed = _unpacked(self._constraint.mask(), self._model.spec.vocab_size)
                array = self._sampler(each, allowed)
                is_accepted = self._constraint.accept(cast(int, array.item()))
                assert is_accepted, f"token {array.item()} is in the mask and not accepted"
            scores = () if self._num_logprobs is None else log_probabilities(each, array, self._num_logprobs)
            choices.append(Choice(array, *scores))
            if not is_taken or self._is_finished:
                break
        return choices


def num_fused(num_drafts: int, spec: ModelSpec, on_metal: bool | None = None) -> int:
    """How many of `num_drafts` guesses to check at once so that attention over them is one kernel.

    Metal has a kernel for 9 queries and more, and one for 1 to 8 where queries times query heads a key head are at most 32;
    anything between takes several, and an array of scores. gpt-oss has 8 such heads: 1 to 4 queries, or 9 and more. One
    query is the token before the guesses.
    """
    if on_metal is None:
        on_metal = mx.metal.is_available() and not runs_on_cpu()
    if not on_metal:
        return num_drafts
    most = FUSED_PRODUCT // max(layer.num_heads // layer.num_kv_heads for layer in spec.layers)
    return most - 1 if 1 < most < num_drafts + 1 < LEAST_OF_MANY else num_drafts


class Guided:
    """A constraint followed along a draft, and taken back. masks: what was allowed at each place, one after the draft."""

    def __init__(self, constraint: TokenConstraint | None, vocab_size: int) -> None:
        self._constraint, self._vocab_size = constraint, vocab_size
        self._num_followed, self._was_refused = 0, False
        self.is_open = constraint is None or not constraint.is_finished
        self.masks: list[mx.array | None] = [] if constraint is None else [self._mask()]

    def allowed(self) -> mx.array | None:
        return self.masks[-1] if self.masks else None

    def follow(self, token: mx.array | int) -> None:
        if self._constraint is None:
            return
        number = token if isinstance(token, int) else cast(int, token.item())
        self.is_open = self._constraint.accept(number)
        self._num_followed += self.is_open
        self._was_refused = not self.is_open
        if self.is_open:
            self.is_open = not self._constraint.is_finished
            self.masks.append(self._mask() if self.is_open else None)

    def back(self) -> None:
        """Take everything back that was followed."""
        if self._constraint is not None and (self._num_followed or self._was_refused):
            self._constraint.rewind(self._num_followed)

    def _mask(self) -> mx.array | None:
        assert self._constraint is not None
        return _unpacked(self._constraint.mask(), self._vocab_size)


def _unpacked(words: np.ndarray | None, vocab_size: int) -> mx.array | None:
    return None if words is None else unpacked(mx.array(words), vocab_size)
