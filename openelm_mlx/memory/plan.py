"""What loading and running a model will take, from its shapes and its files' headers alone: pure arithmetic, no arrays.

What a plan says of speed is in plan_speeds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..specs import ModelSpec
from .admission import MOST_REQUESTS
from .cache_bytes import kv_cache_bytes, most_that
from .machine import Machine, wired_limit_advice
from .plan_speeds import Speeds
from .plan_types import Change, MemoryPlan, PlanRequest, Weights
from .scratch import logits_bytes, scratch_bytes
from .together import LENGTHS, SHORT, Fit, Mixture, Together

# The interpreter, MLX and the library, with the pages of their code that a run comes to touch (some 4 MB more than after
# loading); a tokenizer takes some five times its file (measured on Linux, docs/memory.md). With a GPU there are its libraries,
# too, of which nothing was measured on a Mac.
PROCESS_BYTES, PROCESS_BYTES_ON_CPU = 110_000_000, 63_000_000
TOKENIZER_FACTOR = 5
# Freed buffers that MLX keeps for the next pass, on GPUs; on the CPU they are given back (decoding/prefill.py).
CACHE_LIMIT_BYTES = 256 * 2**20
CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
DEFAULT_CHUNK = 512
# A chunk is as long as a prompt is fast with, unless computing would take more than this share of weights and cache; no
# shorter than this for that alone. Where experts are read from disk another rule holds: `Speeds.usual_seconds`.
CHUNK_SHARE, SHORT_CHUNK, SHORT_CHUNK_ON_CUDA = 0.07, 64, 32
# A context that nobody asked for is not paid for in advance beyond this; where several requests at once have no room for
# so much each, not beyond the next.
USUAL_CONTEXT, SHORTER_CONTEXTS = 8192, (4096, 2048)
# What a prefix cache keeps when nobody says (decoding/prefix_cache.py).
KEPT_BYTES = 1_000_000_000
# What the system's file cache and macOS keep when experts are read through it and nobody set a limit.
LEFT_TO_FILES = 6_000_000_000
# From this share of the working set on a model is wired. One that took 89 % of it was 40 times slower unwired
# (vmlx-swift#418); one that is far below has room, and wiring was reported to stop some Macs (mlx#3186).
WIRED_FROM = 0.8


def make_plan(
    source: str,
    spec: ModelSpec,
    weights: Weights,
    machine: Machine,
    request: PlanRequest,
    itemsize: int = 2,
    packed: Callable[[], Weights] | None = None,
    with_requests: bool = False,
) -> MemoryPlan:
    """The plan for a model on a machine. with_requests: also what it says of several requests at once.

    itemsize: bytes of a number that the model computes with. packed: gives the weights with dense_bits=8,
    where no bits were asked for. What the request leaves open is chosen: the context (the model's own, at most 8,192 unless
    more was asked for, and less where several requests at once have no room for so much each), the chunk (as long as a
    prompt is fast with, smaller where memory is short), and, when the weights do not fit whole and can be read in place,
    how many experts stay in memory. Nothing that was asked for is changed: a plan that cannot keep to it does not fit.
    """
    planner = _Planner(source, spec, weights, machine, request, itemsize, packed)
    plan = planner.best()
    if with_requests:
        plan = replace(plan, requests=planner.together(plan))
    return plan if plan.fits else replace(plan, changes=tuple(planner.changes(plan)), advice=planner.advice(plan))


class _Planner:
    def __init__(
        self,
        source: str,
        spec: ModelSpec,
        weights: Weights,
        machine: Machine,
        request: PlanRequest,
        itemsize: int,
        packed: Callable[[], Weights] | None = None,
    ) -> None:
        self.packed = packed
        self.source, self.spec, self.weights, self.machine = source, spec, weights, machine
        self.request, self.itemsize = request, itemsize
        self.limit = machine.available_bytes if request.memory_limit is None else request.memory_limit
        self.is_gpu = machine.backend != "cpu"
        self.short_chunk = SHORT_CHUNK_ON_CUDA if machine.backend == "cuda" else SHORT_CHUNK
        calibration = machine.calibration
        self.scratch_factor = 1.0 if calibration is None else calibration.scratch.get(spec.family, 1.0)
        self.process = process_bytes(machine) + TOKENIZER_FACTOR * weights.tokenizer
        layer = spec.layers[0]
        self.num_experts, self.per_token = layer.num_experts, layer.experts_per_token
        self.speeds = Speeds(spec, weights, machine, itemsize)

    def best(self) -> MemoryPlan:
        """The first plan that fits, from the one that costs nothing on; the last one when none does."""
        contexts = self._contexts()
        if self.request.expert_slots is None:
            for context in contexts:
                for chunk in self._chunks(context):
                    plan = self.plan(context, chunk, None, with_limits=False)
                    if plan.fits:
                        return self.plan(context, chunk, None)
            if not (self.weights.can_stream and self.weights.slot):
                return self.plan(contexts[0], self._chunks(contexts[0])[-1], None)
        plans = (self._streamed(context) for context in contexts)
        first = next(plans)
        return first if first.fits else next((plan for plan in plans if plan.fits), first)

    def _contexts(self) -> list[int]:
        """The contexts to try: what was asked for alone, else what one request is given, and less for each of several."""
        if self.request.context_length is not None:
            return [self.request.context_length]
        usual = min(self.spec.context_length, USUAL_CONTEXT)
        shorter = [each for each in SHORTER_CONTEXTS if each < usual] if self.request.batch_size > 1 else []
        return [usual, *shorter]

    def _streamed(self, context: int) -> MemoryPlan:
        """Of the plans that leave experts on disk and fit, the one by which a usual request takes least; or the smallest.

        A longer chunk takes memory that slots could have, so that answers read more; but each chunk of a prompt reads all
        experts that are not there.
        """
        plans = []
        for chunk in [self.request.prefill_chunk] if self.request.prefill_chunk else CHUNKS:
            slots = self.request.expert_slots or self._most_slots(context, chunk)
            plans.append(self.plan(context, chunk, slots, with_limits=False))
        best = min((plan for plan in plans if plan.fits), key=self.speeds.usual_seconds, default=plans[-1])
        return self.plan(context, best.prefill_chunk, best.expert_slots)

    def _chunks(self, context: int) -> list[int]:
        """The chunks to try with everything in memory, from the one that costs nothing on."""
        if self.request.prefill_chunk:
            return [self.request.prefill_chunk]
        longest = next(
            each
            for each in CHUNKS
            if each == self.short_chunk or ((each <= DEFAULT_CHUNK or self.is_gpu) and self._is_light(context, each))
        )
        return [each for each in CHUNKS if each <= longest]

    def _is_light(self, context: int, chunk: int) -> bool:
        # On CUDA the scores of a chunk beside others are up to the same block's, however short it is: those of one alone.
        requests = 1 if self.machine.backend == "cuda" else None
        plan = self.plan(context, chunk, None, with_limits=False)
        taken, least = (
            self.plan(context, each, None, with_limits=False, batch_size=requests).scratch_bytes
            for each in (chunk, self.short_chunk)
        )
        return taken <= max(CHUNK_SHARE * (plan.weights_bytes + plan.kv_cache_bytes), least)

    def _most_slots(self, context: int, chunk: int) -> int:
        """How many experts a layer fit beside everything else, at least those of one token."""
        limit = self.limit
        if self.request.memory_limit is None:
            limit = min(limit, max(limit // 2, self.machine.memory_bytes - LEFT_TO_FILES))
        fit = most_that(
            lambda slots: self.plan(context, chunk, slots, with_limits=False).process_bytes <= limit,
            self.num_experts - 1,
        )
        return max(self.per_token, fit)

    def plan(
        self,
        context: int,
        chunk: int,
        slots: int | None,
        kv_bits: int | None = None,
        with_limits: bool = True,
        batch_size: int | None = None,
    ) -> MemoryPlan:
        kv_bits = self.request.kv_bits if kv_bits is None else kv_bits
        batch_size = self.request.batch_size if batch_size is None else batch_size
        kv = kv_cache_bytes(self.spec, context, self.itemsize, batch_size, kv_bits)
        scratch = scratch_bytes(
            self.spec, chunk, context, self.itemsize, batch_size, self.machine.backend, kv_bits, slots
        )
        scratch = int(scratch * self.scratch_factor) + self.weights.adapter_scratch * min(chunk, batch_size * context)
        scratch += self.weights.widened
        weights = self.weights_bytes(slots)
        total = weights + kv + scratch
        cache_limit = self._cache_limit(batch_size)
        overhead = self.process + cache_limit
        process = max(total, self.weights.loading if slots is None else 0) + overhead
        plan = MemoryPlan(
            source=self.source, fits=process <= self.limit, weights_bytes=weights, kv_cache_bytes=kv, scratch_bytes=scratch,
            total_bytes=total, process_bytes=process, budget_bytes=max(0, self.limit - overhead),
            context_length=context, max_context_length=0, batch_size=batch_size, prefill_chunk=chunk,
            kv_bits=kv_bits, expert_slots=slots, dense_bits=self.request.dense_bits,
            wired_limit_bytes=self._wired(total), cache_limit_bytes=cache_limit,
            memory_limit=self.limit, machine=self.machine, family=self.spec.family, adapter_bytes=self.weights.adapters,
            adapter_scratch=self.weights.adapter_scratch, widened_bytes=self.weights.widened,
        )  # fmt: skip
        if not with_limits:
            return plan
        return replace(self.speeds.with_speeds(plan), max_context_length=self._longest(plan), least_bytes=self._least())

    def _cache_limit(self, batch_size: int) -> int:
        """Of freed buffers that serve the next step: the logits of many rows are large."""
        return max(CACHE_LIMIT_BYTES, logits_bytes(self.spec, batch_size)) if self.is_gpu else 0

    def _wired(self, total: int) -> int:
        """What of `total` macOS is not to page out: all or nothing."""
        is_near = total >= WIRED_FROM * self.machine.working_set_bytes
        wanted = is_near if self.request.wire is None else self.request.wire
        return total if wanted and self.machine.backend == "metal" else 0

    def weights_bytes(self, slots: int | None) -> int:
        if slots is None:
            return self.weights.dense + self.num_experts * self.weights.slot
        return self.weights.dense - self.weights.embedding + slots * self.weights.slot

    def _longest(self, plan: MemoryPlan) -> int:
        return most_that(lambda n: self._again(plan, context=n).fits, self.spec.context_length)

    def _again(self, plan: MemoryPlan, context: int | None = None, batch_size: int | None = None) -> MemoryPlan:
        """The same plan for other requests."""
        context = plan.context_length if context is None else context
        batch_size = plan.batch_size if batch_size is None else batch_size
        return self.plan(context, plan.prefill_chunk, plan.expert_slots, plan.kv_bits, False, batch_size)

    def _least(self) -> int:
        slots = self.per_token if self.weights.can_stream and self.weights.slot else None
        return self.plan(min(self.spec.context_length, 256), CHUNKS[-1], slots, with_limits=False).process_bytes

    def together(self, plan: MemoryPlan) -> Together:
        """What a plan says of several requests at once."""
        num_requests = plan.batch_size
        lengths = dict.fromkeys(min(each, self.spec.context_length) for each in LENGTHS)
        others = min(SHORT, plan.max_context_length)
        mixture = None
        if num_requests > 1 and others:
            longest = most_that(lambda n: self._fits_beside(plan, n, others), self.spec.context_length)
            mixture = Mixture(longest, num_requests - 1, others)
        each, in_all = self.speeds.decode(plan, plan.context_length, num_requests) if plan.fits else (None, None)
        alone = self.speeds.decode(plan, plan.context_length, 1)[0] if plan.fits else None
        is_streamed = plan.fits and plan.expert_slots is not None
        return Together(
            num_requests, plan.max_context_length, tuple(self._fit(plan, length) for length in lengths), mixture,
            each, in_all, alone, self.speeds.reads(plan, num_requests) if is_streamed else None,
            self.speeds.reads(plan, 1) if is_streamed else None,
            min(KEPT_BYTES, max(0, plan.memory_limit - plan.process_bytes)),
        )  # fmt: skip

    def _fit(self, plan: MemoryPlan, length: int) -> Fit:
        most = most_that(lambda n: self._again(plan, length, n).fits, MOST_REQUESTS)
        return Fit(length, most, *self.speeds.decode(plan, length, most)) if most else Fit(length, 0)

    def _fits_beside(self, plan: MemoryPlan, longest: int, others: int) -> bool:
        """Whether one request of so many tokens fits beside all others with so many each."""
        long, short = (self._again(plan, each).kv_cache_bytes // plan.batch_size for each in (longest, others))
        # Computing is planned for as if all were the long one.
        most = self._again(plan, longest)
        used = most.process_bytes - most.kv_cache_bytes + long + (plan.batch_size - 1) * short
        return used <= self.limit

    def changes(self, plan: MemoryPlan) -> Iterator[Change]:
        """What would make it fit: each alone, the cheapest first."""
        request = self.request
        if request.prefill_chunk is not None and request.prefill_chunk > CHUNKS[-1]:
            for chunk in (each for each in CHUNKS if each < request.prefill_chunk):
                other = self.plan(plan.context_length, chunk, plan.expert_slots, with_limits=False)
                if other.fits:
                    yield Change(f"prefill_chunk={chunk}", "a slower prompt", other.total_bytes)
                    break
        if plan.kv_bits is None and all(layer.head_dim % 32 == 0 for layer in self.spec.layers):
            other = self.plan(plan.context_length, plan.prefill_chunk, plan.expert_slots, 8, with_limits=False)
            if other.fits:
                yield Change("kv_bits=8", "keys and values are rounded to 8 bits", other.total_bytes)
        longest, each = plan.max_context_length, " each" if plan.batch_size > 1 else ""
        if longest >= 256:
            other = self.plan(longest, plan.prefill_chunk, plan.expert_slots, with_limits=False)
            yield Change(
                f"context_length={longest}", f"at most {longest:,} tokens of prompt and answer{each}", other.total_bytes
            )
        fewer = most_that(lambda n: self._again(plan, batch_size=n).fits, plan.batch_size - 1)
        if fewer:
            what = "one request at a time" if fewer == 1 else f"at most {fewer:,} requests at once"
            yield Change(f"batch_size={fewer}", what, self._again(plan, batch_size=fewer).total_bytes)
        packed = None if self.packed is None else self.packed()
        if packed is not None and packed.dense < self.weights.dense:
            planner = _Planner(
                self.source, self.spec, packed, self.machine, replace(request, dense_bits=8), self.itemsize
            )
            other = planner.plan(plan.context_length, plan.prefill_chunk, plan.expert_slots, with_limits=False)
            if other.fits:
                yield Change("dense_bits=8", "dense matrices are rounded to 8 bits", other.total_bytes)
        if request.expert_slots is not None and request.expert_slots > self.per_token:
            slots = self._most_slots(plan.context_length, plan.prefill_chunk)
            other = self.plan(plan.context_length, plan.prefill_chunk, slots, with_limits=False)
            if other.fits:
                yield Change(f"expert_slots={slots}", "more experts are read from disk", other.total_bytes)

    def advice(self, plan: MemoryPlan) -> str | None:
        return wired_limit_advice(self.machine, plan.process_bytes) if self.request.memory_limit is None else None


def process_bytes(machine: Machine) -> int:
    """What the process takes beside MLX's memory and any model's tokenizer."""
    calibration = machine.calibration
    if calibration is not None and calibration.process_bytes is not None:
        return calibration.process_bytes
    return PROCESS_BYTES_ON_CPU if machine.backend == "cpu" else PROCESS_BYTES
