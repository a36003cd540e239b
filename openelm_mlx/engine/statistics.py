"""Statistics of a request: times, memory, and why it gave no answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..decoding.speculation_gain import Counts
from ..experts.statistics import ExpertStatistics
from ..memory.limits import LimitsLease
from ..text.streams import REASONING
from .expert_shares import CountsExpertReads

if TYPE_CHECKING:
    from .request import Request


@dataclass(frozen=True)
class Statistics:
    """Times, rates and memory of a request. Rates are in tokens a second, times in seconds.

    Attributes:
        peak_memory_bytes: The peak of MLX's memory in the process while the request ran.
        max_tokens: The limit in effect: the requested one, or less where the context or the memory has no room
        for it.
        reasoning_tokens: How many of the completion's tokens are not part of the answer (gpt-oss's reasoning,
        its calls and headers).
        no_answer: None, or a sentence that says why gpt-oss gave no answer and what to change.
        notes: Sentences about parts of the answer's format that are not enforced, and about settings of the
        process that were left as they are.
        time_queued: How long it waited in an engine's queue; time_to_first_token is counted from its end.
        cached_tokens: How many of the prompt's tokens came from a prefix cache; prefill_tps counts the others.
        drafted_tokens: How many tokens a draft proposed (speculative decoding).
        accepted_tokens: How many of them were accepted.
        speculation_speedup: Speed relative to plain steps; None where it was not measured.
        prompt_experts: What was read from disk for the prompt, in total and by layer, if experts are on disk; else
        None. Requests of one engine share what a pass reads by the tokens that each has in it; of two
        `stream_generate` at a time from one model, each has what was read for both.
        answer_experts: The same for the answer.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_tps: float
    decode_tps: float
    peak_memory_bytes: int
    max_tokens: int
    reasoning_tokens: int = 0
    no_answer: str | None = None
    notes: tuple[str, ...] = ()
    time_queued: float = 0.0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculation_speedup: float | None = None
    prompt_experts: ExpertStatistics | None = None
    answer_experts: ExpertStatistics | None = None


class Clock:
    """Times and memory of one request, from its prompt's first chunk on.

    num_cached_tokens: of the prompt, from a prefix cache. experts: counts what is read from disk.
    speculation: the acceptance so far, if a draft is used.
    """

    def __init__(
        self,
        request: Request,
        num_cached_tokens: int,
        lease: LimitsLease,
        experts: CountsExpertReads | None = None,
        time_queued: float = 0.0,
    ) -> None:
        self._time_queued = time_queued
        self._request, self._lease = request, lease
        self._num_cached_tokens = num_cached_tokens
        self._num_answer_tokens = 0
        self.speculation = Counts()
        self._started = self._first = self._last = time.perf_counter()
        self._num_tokens = 0
        self._counted = experts
        # Before the prompt, and between prompt and answer.
        self._experts = [] if experts is None else [experts.statistics()]

    def prompt_is_done(self) -> None:
        """What is read from now on is for the answer; at the first token, where nobody has said so before."""
        if self._counted is not None and len(self._experts) == 1:
            self._experts.append(self._counted.statistics())

    def token_arrived(self) -> None:
        """One more token is on the host."""
        self._last = time.perf_counter()
        if self._num_tokens == 0:
            self._first = self._last
            self.prompt_is_done()
        self._num_tokens += 1

    def token_is_answer(self) -> None:
        """The last token belongs to the answer, not to reasoning, calls or headers."""
        self._num_answer_tokens += 1

    def statistics(self, finish_reason: str, ended_in: str | None) -> Statistics:
        """The statistics at the end of the request. ended_in: see `TextStream.ended_in`."""
        request, num_prompt_tokens = self._request, len(self._request.prompt_tokens)
        prefill, decode = self._first - self._started, self._last - self._first
        experts: dict[str, ExpertStatistics] = {}
        if self._counted is not None:
            start, first, last = *self._experts, self._counted.statistics()
            experts = {"prompt_experts": first.since(start), "answer_experts": last.since(first)}
        return Statistics(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=self._num_tokens,
            time_to_first_token=prefill,
            prefill_tps=(num_prompt_tokens - self._num_cached_tokens) / prefill if prefill else 0.0,
            decode_tps=(self._num_tokens - 1) / decode if decode else 0.0,
            peak_memory_bytes=self._lease.peak_memory_bytes(),
            max_tokens=request.limit,
            reasoning_tokens=self._num_tokens - self._num_answer_tokens,
            no_answer=no_answer(request, ended_in, finish_reason, self._num_tokens),
            notes=(*request.notes, *self._lease.notes),
            time_queued=self._time_queued,
            cached_tokens=self._num_cached_tokens,
            drafted_tokens=self.speculation.drafted,
            accepted_tokens=self.speculation.accepted,
            speculation_speedup=self.speculation.speedup,
            **experts,
        )


def no_answer(request: Request, ended_in: str | None, finish_reason: str, num_tokens: int) -> str | None:
    """Why there is no answer, and what to change, in a sentence; None where there is one."""
    if ended_in is None:
        return None
    if ended_in != REASONING and finish_reason == "stop":
        return f"The model called {ended_in} and wrote no answer: om.Chat runs tools, om.stream_generate shows calls."
    what = "Reasoning" if ended_in == REASONING else f"A call of {ended_in}"
    if finish_reason == "stop":
        return f"The model ended after {num_tokens:,} tokens of reasoning, without an answer: ask again, or in other words."
    remedy = {
        "max_tokens": f"raise max_tokens above {request.limit}, or leave it out",
        "context": "shorten the prompt, or load the model with a larger context_length",
        "memory": "load the model with a larger memory_limit, or shorten the prompt",
    }[request.limited_by]
    limit = {"max_tokens": "", "context": " that the context had room for", "memory": " that the memory had room for"}
    return (
        f"{what} used up all {num_tokens:,} tokens{limit[request.limited_by]}, and no answer came: {remedy}; or let it "
        'think less with reasoning_effort="low".'
    )
