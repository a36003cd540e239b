"""Which requests may run beside each other in a plan's memory: the arithmetic of admission, without arrays.

An engine asks before it admits a request and every so many tokens afterwards. What is counted is what is in use now
(weights, caches, prompts that are kept for later ones), what the requests' caches will grow by, and the pass that computes
their next tokens. Who goes on is decided by age: kept prompts give way first, then the youngest requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..checks import size
from ..errors import MemoryLimitError
from .cache_bytes import CacheBytes, Growth, most_that
from .plan_types import MemoryPlan
from .scratch import PassPart, logits_bytes, parts_bytes

# Chunks of a prompt are not made smaller than this: each reads all weights once more.
LEAST_CHUNK = 16
# Room for an answer is made for this many tokens at once.
TOKENS_AT_ONCE = 64
# No plan speaks of more requests at once.
MOST_REQUESTS = 4096


class RequestMemory(NamedTuple):
    """A request as admission sees it.

    num_tokens: in its cache now, 0 before its first chunk. reserved: how many tokens it may come to have before it is asked
    for again, prompt and answer. places: what its full layers have room for, where that is not what a cache of `num_tokens`
    has: one that was rewound has more, and 0 is one that has none of its own yet, such as a fork before its first token.
    snapshots: how many of its rings it may still take, where it is to be kept for prompts that begin alike
    (decoding/prefix_cache.py). caches: of another kind than the others'.
    """

    num_tokens: int
    reserved: int
    places: int | None = None
    snapshots: int = 0
    caches: CacheBytes | None = None

    @property
    def most(self) -> int:
        """Tokens that it comes to have."""
        return max(self.reserved, self.num_tokens)


@dataclass(frozen=True)
class Admission:
    """The memory of several requests of one model. Bytes; a limit of None refuses nothing.

    limit: what may be in use at once, as MLX counts it (`MemoryPlan.budget_bytes`). caches: of one request. chunk: of a
    prompt, in the plan. weights: what is in use when no request is there. scratch_factor: of what a pass takes by its
    shapes; `seen` gives another one where it was more. adapter_scratch: of adapters, for each token of a pass.
    slots: how many of a layer's experts are in memory, None: all of them. widened: of a pass, see `Weights`.
    """

    limit: int | None
    caches: CacheBytes
    backend: str
    chunk: int
    weights: int = 0
    scratch_factor: float = 1.0
    adapter_scratch: int = 0
    slots: int | None = None
    widened: int = 0

    @classmethod
    def of(cls, plan: MemoryPlan | None, caches: CacheBytes, backend: str, chunk: int = 512) -> Admission:
        """By the plan that a model was loaded with; None refuses nothing. backend, chunk: where no plan says them."""
        if plan is None or plan.machine is None:
            return cls(None if plan is None else plan.budget_bytes, caches, backend, chunk)
        calibration = plan.machine.calibration
        factor = 1.0 if calibration is None else calibration.scratch.get(plan.family, 1.0)
        return cls(
            plan.budget_bytes, caches, plan.machine.backend, plan.prefill_chunk, plan.weights_bytes, factor,
            plan.adapter_scratch, plan.expert_slots, plan.widened_bytes,
        )  # fmt: skip

    # --- what something takes ---

    def kv_bytes(self, num_tokens: int) -> int:
        """Of the caches of one request that has grown to `num_tokens`."""
        return self.caches.total(num_tokens)

    def pass_bytes(self, rows: Sequence[int], chunk: int = 0, offset: int = 0) -> int:
        """Of one pass: a token behind each of `rows` cached ones, `chunk` tokens of a prompt after `offset`."""
        parts = [self.part(1, cached) for cached in rows]
        return self.parts_bytes([*parts, self.part(chunk, offset)] if chunk else parts, len(rows))

    def parts_bytes(self, parts: Sequence[PassPart], num_logits: int) -> int:
        """Of one pass of these parts, and of `num_logits` rows of logits."""
        scratch = parts_bytes(self.caches.spec, parts, self.caches.itemsize, self.backend, self.slots)
        beside = self.adapter_scratch * sum(part.length * part.number for part in parts) + self.widened
        return int(self.scratch_factor * max(scratch, logits_bytes(self.caches.spec, max(1, num_logits)))) + beside

    def part(self, length: int, cached: int, caches: CacheBytes | None = None) -> PassPart:
        """A request's part of a pass: `length` tokens after `cached` ones."""
        caches = self.caches if caches is None else caches
        return PassPart(length, cached, caches.layers, caches.kv_bits)

    def growth(self, requests: Sequence[RequestMemory]) -> Growth:
        """What the requests' caches grow by until they have what is reserved for them; snapshots are a part of it."""
        more = copied = 0
        for each in requests:
            caches = self.caches if each.caches is None else each.caches
            places = caches.places(each.num_tokens) if each.places is None else each.places
            growth = caches.growth(places, each.most)
            more, copied = more + growth.more + each.snapshots * caches.rings, max(copied, growth.copied)
            if not places:  # chunk by chunk
                copied = max(copied, caches.copied_while_growing(each.most))
        return Growth(more, copied)

    def needed(self, in_use: int, requests: Sequence[RequestMemory], chunk: int = 0) -> int:
        """The most that will be in use while the requests come to have what is reserved for them.

        in_use: now, the caches of those that are at work included. chunk: of the longest ones' prompts. Caches are expected
        to be grown before a pass, one layer after the other (`reserve`).
        """
        growth = self.growth(requests)
        ordered = sorted(requests, key=lambda each: each.most)
        rows = [self.part(1, each.most, each.caches) for each in ordered]
        computing = self.parts_bytes(rows, len(rows))
        if chunk and rows:
            for at, each in reversed(list(enumerate(ordered))):  # prompts that are shorter than the chunk share it
                piece = min(chunk, each.most)
                rows[at] = self.part(piece, each.most - piece, each.caches)
                chunk -= piece
                if not chunk:
                    break
            computing = max(computing, self.parts_bytes(rows, len(rows) - 1))
        return in_use + growth.more + max(growth.copied, computing)

    # --- what fits ---

    def shortage(self, in_use: int, requests: Sequence[RequestMemory], chunk: int = 0) -> int:
        """By how many bytes `needed` is above the limit; 0 when it fits."""
        return 0 if self.limit is None else max(0, self.needed(in_use, requests, chunk) - self.limit)

    def fits(
        self,
        in_use: int,
        running: Sequence[RequestMemory],
        new: RequestMemory | None = None,
        kept: int = 0,
        chunk: int = LEAST_CHUNK,
    ) -> bool:
        """Whether the requests fit beside each other, and `new` beside them, once kept prompts of `kept` bytes are gone.

        chunk: the least that a prompt is read in, while memory is short.
        """
        requests = running if new is None else [*running, new]
        return self.shortage(in_use - kept, requests, chunk) == 0

    def longest(self, in_use: int, running: Sequence[RequestMemory], request: RequestMemory, kept: int = 0) -> int:
        """How many tokens, prompt and answer, a request may come to have beside those at work; 0 when it has no room."""
        most = self.caches.spec.context_length
        if self.limit is None:
            return most
        return most_that(lambda n: self.fits(in_use, running, request._replace(reserved=n), kept), most)

    def most_requests(self, num_tokens: int, most: int = MOST_REQUESTS) -> int:
        """How many requests of `num_tokens` tokens each fit at once beside the weights, at most `most`."""
        if self.limit is None:
            return most
        new = RequestMemory(0, num_tokens)
        return most_that(lambda n: self.shortage(self.weights, [new] * n, self.chunk) == 0, most)

    def check(self, num_prompt_tokens: int, max_tokens: int, in_use: int | None = None) -> None:
        """Raise MemoryLimitError for a request that can never fit, not even alone, with what would.

        in_use: without any request and kept prompt; the weights when it is None.
        """
        in_use = self.weights if in_use is None else in_use
        wanted = num_prompt_tokens + max_tokens
        least = min(LEAST_CHUNK, num_prompt_tokens)
        if self.limit is None or not self.shortage(in_use, [RequestMemory(0, wanted)], least):
            return
        kv = self.kv_bytes(wanted)
        needed = self.needed(in_use, [RequestMemory(0, wanted)], least)
        longest = self.longest(in_use, [], RequestMemory(0, 0))
        raise MemoryLimitError(
            f"A prompt of {num_prompt_tokens:,} tokens and an answer of up to {max_tokens:,} can never fit into the memory, "
            f"not even alone: {size(in_use)} are in use, the keys and values of {wanted:,} tokens take {size(kv)} and "
            f"computing takes {size(needed - in_use - kv)}, together {size(needed)} of the {size(self.limit)} allowed; "
            f"{what_fits(num_prompt_tokens, longest)}, or raise memory_limit (--memory-limit)."
        )


def what_fits(num_prompt_tokens: int, most: int) -> str:
    """Where `most` tokens of prompt and answer fit, that as advice: a clause."""
    if most > num_prompt_tokens:
        return f"with a prompt of {num_prompt_tokens:,} tokens, max_tokens={most - num_prompt_tokens} fits"
    return f"a prompt and an answer of {most:,} tokens together fit" if most > 1 else "not one token fits"
