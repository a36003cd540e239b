"""Drafts for speculative decoding: from a smaller model, or looked up in the text itself.

A caller passes `DraftModel` or `PromptLookup`, best the same object for all requests, because it remembers whether drafts
gained time. `begin` makes the guesser for one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import mlx.core as mx

from ..arguments import checked_call
from ..checks import whole_number
from ..errors import SettingError
from ..memory.plan import DEFAULT_CHUNK
from ..runtime import runtime_of
from .arguments import check_model
from .compiled_step import make_step
from .prefill import only_cache
from .sampling import Sampler
from .speculation_gain import DraftHistory

if TYPE_CHECKING:
    from ..models import Model
    from ..text.tokenizer import Tokenizer

_MOST_DRAFTS = 64


class Draft(NamedTuple):
    """Drafted tokens (k,), and for each the probabilities (V,) that it was drawn from; None: it was not drawn at random."""

    tokens: mx.array
    probs: list[mx.array] | None = None


class Guide(Protocol):
    """Which tokens may be drafted: a constraint that is followed along the draft."""

    @property
    def is_open(self) -> bool:
        """Whether another token may follow."""

    def allowed(self) -> mx.array | None:
        """(V,) of bool: the tokens that may come next; None: any."""

    def follow(self, token: mx.array | int) -> None:
        """Take one drafted token."""


class Guesser(Protocol):
    """Drafts tokens for one request."""

    def guess(self, tokens: Sequence[int], count: int, sampler: Sampler, guide: Guide) -> Draft | None:
        """Up to `count` tokens after `tokens`, the prompt and the answer so far; None if there is no draft.

        The sampler's penalties are those after the last of `tokens`; the caller restores its state.
        """


@checked_call("om.PromptLookup")
@dataclass(frozen=True)
class PromptLookup:
    """Draft the tokens that followed the same last tokens before, in the prompt or the answer.

    ngram: how many tokens have to match; the longest match counts, down to 2 tokens, and of equal ones the latest.
    num_draft_tokens: at most this many at once; fewer while that is faster.
    """

    num_draft_tokens: int = 8
    ngram: int = 3
    history: DraftHistory = field(default_factory=DraftHistory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("num_draft_tokens", self.num_draft_tokens, high=_MOST_DRAFTS)
        whole_number("ngram", self.ngram, high=_MOST_DRAFTS)

    def check(self, model: Model, tokenizer: Tokenizer | None) -> None:
        """Nothing to check: every model can use it."""

    def begin(self, model: Model) -> Guesser:
        return _Lookup(self.ngram)


@checked_call("om.DraftModel")
@dataclass(frozen=True)
class DraftModel:
    """Draft with a smaller model of the same vocabulary. tokenizer: its own, to be compared with the large model's; None: the
    one that the model was loaded with.

    num_draft_tokens: at most this many at once; fewer while that is faster.
    """

    model: Model
    tokenizer: Tokenizer | None = None
    num_draft_tokens: int = 4
    history: DraftHistory = field(default_factory=DraftHistory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_model(self.model, self.tokenizer)
        whole_number("num_draft_tokens", self.num_draft_tokens, high=_MOST_DRAFTS)

    def check(self, model: Model, tokenizer: Tokenizer | None) -> None:
        """Raise SettingError when the two models have different tokenizers."""
        if self.model is model:
            raise SettingError("The draft model is the model itself: give a smaller one.")
        sizes = [each.spec.usable_vocab_size for each in (self.model, model)]
        if sizes[0] != sizes[1]:
            raise SettingError(
                f"The draft model has {sizes[0]:,} tokens and the model {sizes[1]:,}: a draft model must share the tokenizer."
            )
        # A tokenizer argument takes precedence; a model that was not loaded from a source may have none.
        own, other = self.tokenizer or runtime_of(self.model).tokenizer, tokenizer or runtime_of(model).tokenizer
        if own is None or other is None:
            families = [each.spec.family for each in (self.model, model)]
            if own is not other and families[0] != families[1]:
                raise SettingError(
                    f"The draft model is of the family {families[0]} and the model of {families[1]}, and only one has its "
                    "tokenizer: a draft model must share it, so load both with theirs."
                )
            return
        if own is other:
            return
        sizes = [each.vocab_size for each in (own, other)]
        differs = next((t for t in range(min(sizes)) if _spelled(other, t) != _spelled(own, t)), None)
        if sizes[0] != sizes[1] or differs is not None:
            where = f"token {differs} differs" if differs is not None else f"{sizes[0]:,} and {sizes[1]:,} tokens"
            raise SettingError(
                f"The draft model has another tokenizer than the model ({where}): a draft model must share the tokenizer."
            )

    def begin(self, model: Model) -> Guesser:
        return _Drafter(self.model, model.spec.vocab_size, self.num_draft_tokens)


Drafts = PromptLookup | DraftModel


class _Lookup:
    """`PromptLookup` in one request: for each n-gram, its last position with a following token."""

    def __init__(self, ngram: int) -> None:
        self._lengths = range(ngram, min(ngram, 2) - 1, -1)
        self._places: dict[tuple[int, ...], int] = {}
        self._num_known = 0

    def guess(self, tokens: Sequence[int], count: int, sampler: Sampler, guide: Guide) -> Draft | None:
        for end in range(self._num_known, len(tokens)):
            for length in self._lengths:
                if end >= length:
                    self._places[tuple(tokens[end - length : end])] = end
        self._num_known = len(tokens)
        for length in self._lengths:
            place = self._places.get(tuple(tokens[-length:]))
            if place is not None:
                break
        else:
            return None
        guesses: list[int] = []
        while len(guesses) < count and guide.is_open:
            # Past the end of the known tokens, the draft repeats itself.
            at = place + len(guesses)
            guesses.append(tokens[at] if at < len(tokens) else guesses[at - len(tokens)])
            guide.follow(guesses[-1])
        return Draft(mx.array(guesses, mx.uint32)) if guesses else None


class _Drafter:
    """`DraftModel` in one request. Its cache catches up with the text at the next draft."""

    def __init__(self, model: Model, vocab_size: int, num_draft_tokens: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        # One token at a time is written: a ring must be able to take all of them back.
        self._cache = model.make_cache(room=num_draft_tokens)
        self._step = make_step(model, self._cache)
        self._fed: list[int] = []
        self._guessed: list[mx.array] = []
        self._num_draft_tokens = num_draft_tokens

    def guess(self, tokens: Sequence[int], count: int, sampler: Sampler, guide: Guide) -> Draft | None:
        if len(tokens) + count > self._model.context_length:
            return None
        token = self._catch_up(tokens)
        guesses: list[mx.array] = []
        probs: list[mx.array] = []
        while len(guesses) < count and guide.is_open:
            logits = _of_size(self._step(token), self._vocab_size)
            logits = sampler.processed(logits, guide.allowed())
            if sampler.params.temperature == 0.0:
                token = mx.argmax(logits)
            else:
                token = mx.random.categorical(logits, key=sampler.next_key())
                probs.append(mx.softmax(logits))
            sampler.count(token)
            guesses.append(token)
            guide.follow(token)
        self._guessed = guesses[:-1]  # the last one is not in the cache
        self._fed.append(tokens[-1])
        return Draft(mx.stack(guesses), probs or None) if guesses else None

    def _catch_up(self, tokens: Sequence[int]) -> mx.array:
        """Rewind rejected drafts and feed missing tokens; return the last token, which is to be fed next."""
        self._fed += [cast(int, each.item()) for each in self._guessed]
        self._guessed = []
        shared = next(
            (
                i
                for i in range(max(0, len(self._fed) - self._num_draft_tokens - 1), len(self._fed))
                if i >= len(tokens) - 1 or self._fed[i] != tokens[i]
            ),
            len(self._fed),
        )
        for layer in self._cache:
            layer.rewind(len(self._fed) - shared)
        del self._fed[shared:]
        missing = tokens[shared:-1]
        for start in range(0, len(missing), DEFAULT_CHUNK):
            only_cache(self._model, missing[start : start + DEFAULT_CHUNK], self._cache)
        self._fed += missing
        return mx.array(tokens[-1], mx.uint32)


def _of_size(logits: mx.array, vocab_size: int) -> mx.array:
    """Logits (V,) with another padding at the end of the vocabulary."""
    if logits.size >= vocab_size:
        return logits[:vocab_size]
    return mx.pad(logits, (0, vocab_size - logits.size), constant_values=-mx.inf)


def _spelled(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The token's bytes, None where it has none."""
    try:
        return tokenizer.token_bytes(token)
    except ValueError:
        return None
