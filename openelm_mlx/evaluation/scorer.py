"""Log-likelihoods of continuations, many at once: what texts have in common is computed once, and of the logits only what
is asked for.

`Scorer.score` decides with `Prefixes` what is computed together; a pass is a prompt's chunk into the cache or a forest of
texts beside it, or where other machines have layers one text after the other. The answers are those of each text alone,
whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..decoding.budget import Budget, check_room, chunk_of_plan, drop, keeping_to_plan
from ..decoding.gpu_errors import empty_stream, is_watchdog
from ..decoding.prefill import chunk_throttle, every_token, fill, lock_of
from ..engine.single import not_finite
from ..memory.plan import DEFAULT_CHUNK
from ..models.buffers import Snapshot
from ..models.cache import Cache
from ..models.trees import NO_PARENT, Forest, TreeWalk
from ..runtime import runtime_of
from ..training.products import on_all_cores
from .prefixes import Branch, Extend, Prefixes
from .requests import OnDone, Score, TokenRequest
from .store import Store

if TYPE_CHECKING:
    from ..models import Model

# At most so many bytes of logits at once: V is 201,088, and softmax wants float32.
LOGITS_BYTES = 64 * 2**20
# How many arrays of that size the CPU backend makes of them.
LOGITS_COPIES = 4

# Called after each pass with the requests that are complete, by number.
OnScores = Callable[[Mapping[int, Score]], None]


class Scorer:
    """Scores continuations with one model.

    tokens_at_once: how many tokens a pass has at most; `longest_pass` when it is None. Fewer where memory is short.
    num_passes, num_tokens: what has been computed so far. peak_memory_bytes: the most that MLX had meanwhile.
    """

    def __init__(self, model: Model, tokens_at_once: int | None = None) -> None:
        self.model = model
        self.tokens_at_once = chunk_of_plan(model) if tokens_at_once is None else tokens_at_once
        self._is_fixed = tokens_at_once is not None
        self.num_passes = self.num_tokens = self.peak_memory_bytes = 0

    def score(
        self,
        requests: Sequence[TokenRequest],
        known: Mapping[int, Score] | None = None,
        on_scores: OnScores | None = None,
    ) -> list[Score]:
        """The score of each request, in their order. Raises MemoryLimitError, CheckpointError for logits that are no numbers.

        known: scores of an interrupted run, by number; the others are computed as they would have been then.
        """
        run = self._through_all(requests, {} if known is None else known, on_scores)
        return [run.scores[number] for number in range(len(requests))]

    def token_logprobs(self, requests: Sequence[TokenRequest], on_scores: OnScores | None = None) -> list[list[float]]:
        """The log-probability of each token of each request's continuation; the rest as `score`."""
        return self._through_all(requests, {}, on_scores).logprobs

    def _through_all(
        self, requests: Sequence[TokenRequest], known: Mapping[int, Score], on_scores: OnScores | None
    ) -> _Run:
        run = _Run(self, requests, known, on_scores)
        missing = [len(each.inputs) for number, each in enumerate(requests) if number not in known]
        if missing:
            cache = self.model.make_cache()
            check_room(self.model, cache, max(missing), 1)
            if not self._is_fixed:
                self.tokens_at_once = longest_pass(self.model, max(missing))
            with keeping_to_plan(self.model, cache) as (budget, lease), on_all_cores(self.model):
                try:
                    run.through_all(cache, budget)
                finally:
                    drop(cache)
                    self.peak_memory_bytes = max(self.peak_memory_bytes, lease.peak_memory_bytes())
        return run

    def shorten(self, tokens_at_once: int) -> None:
        """Have so many tokens in a pass at most, from now on."""
        self.tokens_at_once, self._is_fixed = tokens_at_once, True


class _Target(NamedTuple):
    """A token that is to be predicted: the request's number, the place in its continuation, and the token."""

    request: int
    place: int
    token: int


@dataclass
class _Trunk:
    """How to come back to a trunk of so many tokens."""

    length: int
    snapshots: list[Snapshot] = field(default_factory=list)


class _Run:
    """One call of `Scorer.score`."""

    def __init__(
        self,
        scorer: Scorer,
        requests: Sequence[TokenRequest],
        known: Mapping[int, Score],
        on_scores: OnScores | None,
    ) -> None:
        self.scorer, self.model = scorer, scorer.model
        self.scores = dict(known)
        self._on_scores = on_scores
        numbers_of: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            numbers_of.setdefault(request.inputs, []).append(number)
        self._texts = sorted(numbers_of)
        self._prefixes = Prefixes(self._texts)
        self._numbers = [numbers_of[text] for text in self._texts]
        self._requests = requests
        # Of each request: its tokens' log-probabilities, how many are missing, whether all were the likeliest.
        self.logprobs = [[0.0] * len(each.continuation) for each in requests]
        self._missing = [len(each.continuation) for each in requests]
        self._greedy = [True] * len(requests)
        self._trunks: list[_Trunk] = []
        self._head_rows = _head_rows(self.model)

    def through_all(self, cache: Cache, budget: Budget) -> None:
        """Everything that is not known."""
        self._cache, self._budget = cache, budget
        self._trunks = [_Trunk(0, self._snapshots())]
        for step in self._prefixes.passes(self.scorer.tokens_at_once):
            self._run(step)

    def _run(self, step: Extend | Branch) -> None:
        """One step, in shorter ones where the GPU's watchdog or the memory demands it."""
        if all(number in self.scores for i in range(step.first, step.last) for number in self._numbers[i]):
            return
        try:
            self._extend(step) if isinstance(step, Extend) else self._branch(step)
        except RuntimeError as error:
            others = empty_stream()
            at_once = self.scorer.tokens_at_once // 2
            if not is_watchdog(error) or others or at_once < 1:
                raise
            self.scorer.shorten(at_once)
            drop(self._cache)
            self._trunks = [_Trunk(0, self._snapshots())]
            self._run_shorter(step, at_once)

    def _run_shorter(self, step: Extend | Branch, most: int) -> None:
        if isinstance(step, Extend):
            self._run(step)
            return
        for shorter in self._prefixes.passes(most, step.first, step.last, step.trunk):
            self._run(shorter)

    def _extend(self, step: Extend) -> None:
        """A longer trunk: keys and values into the cache, and the logits of those of its tokens that are asked for."""
        self._return_to(step.first, step.trunk)
        text, start = self._texts[step.first], step.trunk
        while start < step.stop:
            length = self._budget.chunk_of_prompt(self.scorer.tokens_at_once, step.stop - start)
            targets = self._targets(step.first, step.last, start, start + length)
            with lock_of(self.model):
                self._note(read_chunk(self.model, text[start : start + length], self._cache), targets)
            self._done(length)
            start += length
        self._trunks.append(_Trunk(step.stop, self._snapshots()))
        self._report(step.first, step.last)

    def _branch(self, step: Branch) -> None:
        """Whatever these texts have after the trunk, each token once."""
        if self.model.remote is not None:  # a forest stands beside a cache, and those of other machines are there
            for i in range(step.first, step.last):
                self._extend(Extend(i, i + 1, step.trunk, len(self._texts[i])))
            return
        self._return_to(step.first, step.trunk)
        size = self._prefixes.size(step.first, step.last, step.trunk)
        room = self._budget.chunk_of_prompt(size, size)
        if room < size:
            self._run_shorter(step, room)
            return
        forest, targets = self._forest(step)
        with lock_of(self.model):
            throttle = chunk_throttle([self._cache], size)
            wanted = list(targets)
            h = TreeWalk(self.model, self._cache, forest, throttle).through_all(wanted)
            mx.eval(h)
            self._note(h, {row: targets[at] for row, at in enumerate(wanted)})
        self._done(size)
        self._report(step.first, step.last)

    def _forest(self, step: Branch) -> tuple[Forest, dict[int, list[_Target]]]:
        """The tokens of a pass, and what is predicted after which of them, by flat index."""
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        chain: list[int] = []  # the flat indices of the text that was added last
        targets: dict[int, list[_Target]] = {}
        for i in range(step.first, step.last):
            text = self._texts[i]
            shared = 0 if i == step.first else max(0, self._prefixes.shared[i] - step.trunk)
            del chain[shared:]
            for depth in range(shared, len(text) - step.trunk):
                parents.append(chain[-1] if depth else NO_PARENT)
                chain.append(len(tokens))
                tokens.append(text[step.trunk + depth])
                depths.append(depth)
            for position, each in self._targets_of(i, step.trunk, len(text)):
                targets.setdefault(chain[position - step.trunk], []).append(each)
        return Forest(np.array(tokens), np.array(parents), np.array(depths)), targets

    def _targets(self, first: int, last: int, start: int, stop: int) -> dict[int, list[_Target]]:
        """What these texts predict after their tokens start ... stop - 1, by the distance from `start`."""
        targets: dict[int, list[_Target]] = {}
        for i in range(first, last):
            for position, each in self._targets_of(i, start, stop):
                targets.setdefault(position - start, []).append(each)
        return targets

    def _targets_of(self, text: int, start: int, stop: int) -> list[tuple[int, _Target]]:
        found = []
        for number in self._numbers[text]:
            if number in self.scores:
                continue
            request = self._requests[number]
            begin = len(request.context) - 1
            for at in range(max(start, begin), min(stop, begin + len(request.continuation))):
                found.append((at, _Target(number, at - begin, request.continuation[at - begin])))
        return found

    def _note(self, h: mx.array, targets: Mapping[int, list[_Target]]) -> None:
        """Add the log-probabilities of the targets after rows of the residual stream h (W, hidden_size)."""
        rows = sorted(targets)
        for start in range(0, len(rows), self._head_rows):
            some = rows[start : start + self._head_rows]
            each = [(row, target) for row, at in enumerate(some) for target in targets[at]]
            logprobs, likeliest = target_logprobs(
                self.model, h[mx.array(some)], [row for row, _ in each], [target.token for _, target in each]
            )
            for (row, target), logprob in zip(each, logprobs, strict=True):
                self.logprobs[target.request][target.place] = logprob
                self._missing[target.request] -= 1
                self._greedy[target.request] &= likeliest[row] == target.token

    def _report(self, first: int, last: int) -> None:
        complete = {}
        for i in range(first, last):
            for number in self._numbers[i]:
                if number not in self.scores and self._missing[number] == 0:
                    complete[number] = Score(math.fsum(self.logprobs[number]), self._greedy[number])
        self.scores.update(complete)
        if complete and self._on_scores is not None:
            self._on_scores(complete)

    def _return_to(self, text: int, length: int) -> None:
        """Have the first `length` tokens of a text in the cache, and nothing else."""
        while self._trunks[-1].length > length:
            self._trunks.pop()
        for layer, snapshot in zip(self._cache, self._trunks[-1].snapshots, strict=True):
            layer.restore(snapshot)
        start = self._trunks[-1].length
        if start == length:
            return
        # After an error, or where everything that it was computed for is known.
        tokens = self._texts[text][start:length]
        fill(self.model, tokens, self._cache, self.scorer.tokens_at_once, self._budget, at_border=self._count_pass)
        self.scorer.num_tokens += length - start
        self._trunks.append(_Trunk(length, self._snapshots()))

    def _snapshots(self) -> list[Snapshot]:
        snapshots = [layer.snapshot() for layer in self._cache]
        mx.eval([each.arrays for each in snapshots])  # rings are overwritten
        return snapshots

    def _done(self, length: int) -> None:
        self._budget.chunk_is_done(length)
        self._count_pass()
        self.scorer.num_tokens += length
        mx.clear_cache()

    def _count_pass(self) -> None:
        self.scorer.num_passes += 1


def kept_scores(
    scorer: Scorer, requests: Sequence[TokenRequest], store: Store, keys: Sequence[str], on_done: OnDone
) -> list[Score]:
    """`Scorer.score` for requests with these keys: what the store has is not computed again, and what is new goes there."""
    known = {i: Score(*stored) for i, key in enumerate(keys) if (stored := store.get(key)) is not None}
    on_done(len(known))

    def keep(scores: Mapping[int, Score]) -> None:
        store.put({keys[i]: list(score) for i, score in scores.items()})
        on_done(len(scores))

    return scorer.score(requests, known, keep)


def read_chunk(model: Model, tokens: Sequence[int], cache: Cache) -> mx.array:
    """The residual stream (L, hidden_size) after the last layer, of tokens whose keys and values go into the cache."""
    h = model.embed(mx.array(list(tokens))[None])
    h = every_token(model, h, cache)
    return (h if model.remote is None else model.remote.chunk(h, cache))[0]


def target_logprobs(
    model: Model, h: mx.array, rows: Sequence[int], tokens: Sequence[int]
) -> tuple[list[float], list[int]]:
    """The log-probability of each of `tokens` after its row of h (W, hidden_size), and the likeliest token of each row.

    Rows that only pad the vocabulary take no part in it. Raises CheckpointError for logits that are no numbers.
    """
    logits = model.head(h)[:, : model.spec.usable_vocab_size]
    at = mx.array(np.asarray(rows) * logits.shape[1] + np.asarray(tokens))
    total = mx.logsumexp(logits.astype(mx.float32), axis=-1)
    chosen = mx.take(logits, at).astype(mx.float32) - total[mx.array(list(rows))]
    likeliest = mx.argmax(logits, axis=-1)
    mx.eval(chosen, likeliest)  # the logits are freed
    logprobs = np.array(chosen)
    if not np.isfinite(logprobs).all():
        raise not_finite()
    return logprobs.tolist(), np.array(likeliest).tolist()


def longest_pass(model: Model, longest_text: int) -> int:
    """How many tokens a pass has: a prompt's chunk, and more where the texts leave room.

    The plan has room for the keys and values of a whole context. What shorter texts do not take is room for a longer pass,
    which holds a question with all its answers, and several short ones.
    """
    plan, chunk = runtime_of(model).plan, chunk_of_plan(model)
    is_tight = plan is None or plan.expert_slots is not None or model.remote is not None
    if plan is None or is_tight or chunk >= DEFAULT_CHUNK or not plan.scratch_bytes:
        return chunk
    free = plan.kv_cache_bytes * max(0.0, 1 - longest_text / plan.context_length)
    return min(DEFAULT_CHUNK, int(chunk * (1 + free / plan.scratch_bytes)))


def _head_rows(model: Model) -> int:
    """Of how many rows logits are made at once."""
    plan = runtime_of(model).plan
    most = LOGITS_BYTES if plan is None else min(LOGITS_BYTES, plan.scratch_bytes)
    return max(1, most // (LOGITS_COPIES * 4 * model.spec.vocab_size))
