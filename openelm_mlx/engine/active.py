"""A request in an engine, from the queue to its end: what is computed of it, and where its tokens come from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import mlx.core as mx

from ..decoding.budget import chunk_of_plan
from ..decoding.compiled_step import make_step
from ..decoding.prefill import prompt_chunks
from ..decoding.prefix_cache import Turn
from ..decoding.sampling import Sampler, log_probabilities
from ..decoding.step import Step
from ..decoding.tokens import Choice, Forward, TokenSource
from ..memory.limits import LimitsLease, generating
from ..models.cache import Cache
from ..models.packed import UNPACK_FROM
from ..models.quantized_cache import QuantizedKVCache
from ..models.slots import SlotBank
from ..runtime import runtime_of
from ..text.tokenizer import Tokenizer
from .expert_shares import ExpertShare
from .handle import Channel
from .request import usable_vocab_size
from .scheduler import HasJob, Job
from .sequence import Sequence
from .single import source_of
from .statistics import Clock

if TYPE_CHECKING:
    from ..models import Model


class Pending(NamedTuple):
    """A token that has been chosen, is perhaps still being computed, and has not been handed over.

    tokens: a scalar, or those of several requests (n,), of which this one's stands at `at`. choice: its log-probabilities,
    where they were asked for. is_finite: whether the logits that it came from were numbers; for the first token.
    """

    tokens: mx.array
    at: int = 0
    choice: Choice | None = None
    is_finite: mx.array | None = None

    @property
    def token(self) -> mx.array:
        """The token by itself, a scalar."""
        return self.tokens if self.tokens.ndim == 0 else self.tokens[self.at]

    @property
    def arrays(self) -> list[mx.array]:
        """All that has to be evaluated before it can be handed over."""
        choice = self.choice
        scores = () if choice is None else (choice.logprob, choice.top, choice.top_logprobs)
        return [each for each in (self.tokens, self.is_finite, *scores) if each is not None]


@final
class ActiveRequest(HasJob):
    """See the module.

    A plain request has a `pending` token, which the next pass is given. One with a constraint or a draft has a `source`,
    and is given what that asks for (`forward`), once its work on the host (`work`) is done.
    """

    def __init__(self, number: int, sequence: Sequence, channel: Channel, group: Hashable = None) -> None:
        self.job = Job(number, group=group)
        self.sequence, self.channel = sequence, channel
        self.submitted = time.perf_counter()
        self.pending: Pending | None = None
        self.source: TokenSource | None = None
        self.forward: Forward | None = None
        self.work: Future[Any] | None = None
        self.work_began = 0.0
        # Seconds that its work on the host takes at a time: the longest, which counts less and less. Unknown: long.
        self.work_seconds = 4e-3
        # Tokens of the answer that are to be computed again, since the cache was given up for others.
        self.replay: deque[int] = deque()
        # Those who wait for this one's prompt, which is theirs too.
        self.followers: list[ActiveRequest] = []
        self.turn: Turn | None = None
        # Where its keys and values are while they are not in its own cache.
        self.bank: SlotBank | None = None
        self.wants_scores = sequence.request.logprobs is not None
        self.wants_prompt_scores = sequence.request.prompt_logprobs is not None
        self._stack = ExitStack()
        self.has_begun = False  # whether it has been admitted before

    # --- what it is made of once it has been admitted ---

    sampler: Sampler
    sampler_form: tuple[object, ...]
    step: Step
    lease: LimitsLease
    experts: ExpertShare | None

    @property
    def cache(self) -> Cache:
        assert self.turn is not None
        return self.turn.cache

    @property
    def adapter(self) -> str | None:
        """Which adapter it asked for, by its id; None: none."""
        return self.sequence.request.adapter

    @property
    def position(self) -> int:
        """How many of its tokens have been computed."""
        slot = None if self.bank is None else self.bank.slot_of(self)
        return self.cache[0].offset if self.bank is None or slot is None else self.bank.lengths[slot]

    def join(self, bank: SlotBank, num_tokens: int = 0, num_owners: int = 0) -> None:
        """Into a slot, beside others. num_tokens, num_owners: see `SlotBank.join`."""
        bank.join(self, self.cache, max(num_tokens, self.num_prompt_tokens), num_owners)
        self.bank = bank

    def leave_slot(self, is_wanted: bool = True) -> None:
        """Out of its slot, if it is in one. is_wanted: into its own cache; else what was computed is given up."""
        bank, self.bank = self.bank, None
        slot = None if bank is None else bank.slot_of(self)
        if bank is not None and slot is not None:
            bank.leave(slot, self.cache if is_wanted else None)

    @property
    def num_left(self) -> int:
        """Tokens that it may still write, those chosen and not yet handed over included."""
        return self.sequence.request.limit - len(self.sequence.tokens)

    @property
    def has_token_to_feed(self) -> bool:
        """Whether a pass may be given its pending token: it is not the last one, and all before it are in the cache."""
        return self.pending is not None and not self.replay and self.num_left > 1

    @property
    def can_go_on(self) -> bool:
        """Whether the next pass has anything to compute for it, its prompt done."""
        return bool(self.replay) or self.forward is not None or self.has_token_to_feed

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return len(self.sequence.request.prompt_tokens)

    @property
    def is_plain(self) -> bool:
        request = self.sequence.request
        return request.constraint is None and request.draft is None

    @property
    def prompt_key(self) -> tuple[object, ...]:
        """What two requests have in common whose prompts leave the same cache."""
        request = self.sequence.request
        return (
            tuple(request.prompt_tokens), request.kv_bits, request.sliding_window, request.prefill_chunk, request.room,
            None if request.prefix_cache is None else id(request.prefix_cache), request.prompt_logprobs,
            request.adapter,
        )  # fmt: skip

    def begin(self, model: Model, tokenizer: Tokenizer | None) -> None:
        """Admitted: the cache with what is known of the prompt, and the chunks of the rest."""
        self.begin_with(model, tokenizer, self.sequence.request.begin_turn(model))

    def begin_with(self, model: Model, tokenizer: Tokenizer | None, turn: Turn) -> None:
        """Admitted, with a cache that is there already."""
        request = self.sequence.request
        runtime = runtime_of(model)
        self.turn = turn
        self.experts = None if runtime.residency is None else ExpertShare(len(runtime.residency.layers))
        self.lease = self._stack.enter_context(generating(runtime.plan))
        queued = time.perf_counter() - self.submitted
        self.sequence.clock = Clock(request, turn.num_reused, self.lease, self.experts, time_queued=queued)
        usable = usable_vocab_size(model, tokenizer)
        self.sampler = Sampler(request.sampling, model.spec.vocab_size, usable, request.prompt_tokens)
        self.sampler_form = self.sampler.form
        self.channel.num_prompt_tokens_done = turn.num_reused
        self.step = make_step(model, turn.cache)
        self.has_begun = True
        self._plan_chunks(model)

    @property
    def has_answered(self) -> bool:
        """Whether its first token has been chosen, also where its prompt is being computed again."""
        return bool(self.replay or self.pending is not None or self.source is not None)

    def begin_again(self, model: Model) -> None:
        """Admitted again after it gave way: everything is computed once more, and then it goes on where it was."""
        self._plan_chunks(model)

    def give_way(self) -> None:
        """Give the cache up; what was computed of it can be computed again."""
        assert self.turn is not None
        offset = self.position
        self.leave_slot(is_wanted=False)
        fed = self.turn.tokens[self.turn.num_prompt_tokens : offset]
        if self.replay:  # it was being computed again, and had not come to the end
            fed = [*fed, *self.replay]
        self.replay = deque(fed)
        for layer in self.cache:
            layer.clear()

    def prompt_piece(self, length: int) -> list[int]:
        """The next tokens of the prompt."""
        assert self.turn is not None
        start = self.position
        return self.turn.tokens[start : start + length]

    def score_prompt(self, logits: mx.array) -> None:
        """Note the log-probabilities of the prompt's tokens that come after those in the cache's end; logits (n, V)."""
        assert self.turn is not None
        count = self.sequence.request.prompt_logprobs or 0
        first = self.position - logits.shape[0] + 1
        tokens = self.turn.tokens[first : min(self.position + 1, self.turn.num_prompt_tokens)]
        known = self.channel.prompt_logprobs
        del known[first - 1 :]  # where it is computed again
        for row, token in enumerate(tokens):
            choice = Choice(mx.array(token), *log_probabilities(logits[row], mx.array(token), count))
            logprob, top = choice.logprob_values()
            known.append((cast(float, logprob), top or {}))

    def start_answer(self, model: Model, logits: mx.array, may_guess: Callable[[], bool]) -> None:
        """The prompt is in the cache, and these are the logits (V,) after its last token.

        may_guess: whether a draft is worth its while now, beside those who run.
        """
        self.source = source_of(model, self.sequence, self.step, self.sampler, logits, may_guess)

    def chosen(self, logits: mx.array, token: mx.array) -> Pending:
        """A token that was chosen from the logits (V,) for this request alone."""
        count = self.sequence.request.logprobs
        choice = None if count is None else Choice(token, *log_probabilities(logits, token, count))
        return Pending(token, 0, choice)

    def scored(self, logits: mx.array, at: int, tokens: mx.array) -> Choice | None:
        """The log-probabilities of the token at `at` of several requests' (n,); logits (n, V)."""
        return self.chosen(logits[at], tokens[at]).choice

    def end(self, is_kept: bool) -> None:
        """Give everything back. is_kept: into the prefix cache, where there is one."""
        if self.source is not None:
            self.source.close()
        try:
            self.leave_slot(is_kept)
            if is_kept and self.turn is not None and not self.replay:
                self.turn.keep()
        finally:
            self._stack.close()
            self.source = self.forward = self.pending = self.turn = None

    def _plan_chunks(self, model: Model) -> None:
        request, turn = self.sequence.request, self.turn
        assert turn is not None
        length = request.prefill_chunk or chunk_of_plan(model)
        has_borders = request.prefix_cache is not None
        # Of keys and values in 8 bits, few queries read them as they are, and many unpack them first.
        self.job.least = max(UNPACK_FROM, 2) if any(isinstance(each, QuantizedKVCache) for each in turn.cache) else 2
        self.job.position = turn.cache[0].offset
        self.job.chunks = deque(
            prompt_chunks(turn.cache[0].offset, turn.num_prompt_tokens, length, turn.stops, has_borders)
        )
