"""What loading and running a model will take, from its shapes and its files' headers alone: pure arithmetic, no arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..checks import is_number
from ..errors import SettingError
from ..files import shown
from ..specs import ModelSpec, kv_capacity
from .machine import Machine, wired_limit_advice
from .plan_types import Change, MemoryPlan, PlanRequest, Weights
from .rates import SpeedRange, prefill_seconds, rates_of, streamed_seconds
from .scratch import scratch_bytes

# The interpreter, MLX and the library; a tokenizer takes some five times its file (measured on Linux, docs/memory.md).
# With a GPU there are its libraries, too, of which nothing was measured on a Mac.
PROCESS_BYTES, PROCESS_BYTES_ON_CPU = 110_000_000, 57_000_000
TOKENIZER_FACTOR = 5
# Freed buffers that MLX keeps for the next pass, on GPUs; on the CPU they are given back (decoding/prefill.py).
CACHE_LIMIT_BYTES = 256 * 2**20
CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
DEFAULT_CHUNK = 512
# A chunk is as long as a prompt is fast with, unless computing would take more than this share of weights and cache; no
# shorter than this for that alone. Where experts are read from disk another rule holds: `_Planner.usual_seconds`.
CHUNK_SHARE, SHORT_CHUNK, SHORT_CHUNK_ON_CUDA = 0.07, 64, 32
# A context that nobody asked for is not paid for in advance beyond this.
USUAL_CONTEXT = 8192
# A request by which chunks are weighed against slots where experts are on disk; and what is assumed of a machine of which
# it is not known: bytes and tokens a second.
USUAL_PROMPT, USUAL_ANSWER = 2048, 256
ASSUMED_DISK, ASSUMED_PREFILL, ASSUMED_PREFILL_ON_CPU = 3e9, 300.0, 20.0
# Real routers come back to experts: the demo's choices, stretched to the released models' experts, miss 0.6 to 0.9 times as
# often as if every expert were equally likely (docs/streaming.md).
SKEWED_READS = 0.6
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
) -> MemoryPlan:
    """The plan for a model on a machine.

    itemsize: bytes of a number that the model computes with. packed: gives the weights with dense_bits=8,
    where no bits were asked for. What the request leaves open is chosen: the context (the
    model's own, at most 8,192 unless more was asked for), the chunk (as long as a prompt is fast with, smaller where memory
    is short), and, when the weights do not fit whole and can be read in place, how many experts stay in memory. Nothing
    that was asked for is changed: a plan that cannot keep to it does not fit.
    """
    planner = _Planner(source, spec, weights, machine, request, itemsize, packed)
    plan = planner.best()
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
        self.cache_limit = CACHE_LIMIT_BYTES if self.is_gpu else 0
        process = PROCESS_BYTES if self.is_gpu else PROCESS_BYTES_ON_CPU
        calibration = machine.calibration
        self.scratch_factor = 1.0 if calibration is None else calibration.scratch.get(spec.family, 1.0)
        if calibration is not None and calibration.process_bytes is not None:
            process = calibration.process_bytes
        self.overhead = process + TOKENIZER_FACTOR * weights.tokenizer + self.cache_limit
        layer = spec.layers[0]
        self.num_experts, self.per_token = layer.num_experts, layer.experts_per_token
        self.rates = rates_of(machine, spec, self._dense_bits())

    def best(self) -> MemoryPlan:
        """The first plan that fits, from the one that costs nothing on; the last one when none does."""
        request = self.request
        context = request.context_length or min(self.spec.context_length, USUAL_CONTEXT)
        if request.expert_slots is None:
            for chunk in self._chunks(context):
                plan = self.plan(context, chunk, None)
                if plan.fits:
                    return plan
            if not (self.weights.can_stream and self.weights.slot):
                return plan
        return self._streamed(context)

    def _streamed(self, context: int) -> MemoryPlan:
        """Of the plans that leave experts on disk and fit, the one by which a usual request takes least; or the smallest.

        A longer chunk takes memory that slots could have, so that answers read more; but each chunk of a prompt reads all
        experts that are not there.
        """
        plans = []
        for chunk in [self.request.prefill_chunk] if self.request.prefill_chunk else CHUNKS:
            slots = self.request.expert_slots or self._most_slots(context, chunk)
            plans.append(self.plan(context, chunk, slots, with_limits=False))
        best = min((plan for plan in plans if plan.fits), key=self.usual_seconds, default=plans[-1])
        return self.plan(context, best.prefill_chunk, best.expert_slots)

    def usual_seconds(self, plan: MemoryPlan) -> float:
        """Seconds of a request of usual lengths, as far as they depend on how memory is shared by chunks and slots.

        A chunk is read and computed at the same time; every expert is equally likely. Rates that are not known are assumed:
        they only weigh a prompt against its answer.
        """
        prompt = min(plan.context_length, USUAL_PROMPT)
        chunk = min(plan.prefill_chunk, prompt)
        slots = plan.expert_slots or 0
        disk = self.machine.ssd_bandwidth or ASSUMED_DISK
        rate = self._prefill_rate() or (ASSUMED_PREFILL if self.is_gpu else ASSUMED_PREFILL_ON_CPU)
        read = self._read_bytes(slots, chunk) / disk
        return prompt / chunk * max(read, chunk / rate) + USUAL_ANSWER * self._read_bytes(slots) / disk

    def _read_bytes(self, slots: int, chunk: int = 1) -> float:
        """Expert bytes that so many tokens at once read from disk, every expert being equally likely: more than a real
        model's routing.
        """
        return self._touched_experts(chunk) * (1 - slots / self.num_experts) * self.weights.slot

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
        plan, least = (self.plan(context, each, None, with_limits=False) for each in (chunk, self.short_chunk))
        most = CHUNK_SHARE * (plan.weights_bytes + plan.kv_cache_bytes)
        return plan.scratch_bytes <= max(most, least.scratch_bytes)

    def _most_slots(self, context: int, chunk: int) -> int:
        """How many experts a layer fit beside everything else, at least those of one token."""
        limit = self.limit
        if self.request.memory_limit is None:
            limit = min(limit, max(limit // 2, self.machine.memory_bytes - LEFT_TO_FILES))
        room = limit - self.plan(context, chunk, 0, with_limits=False).process_bytes
        return min(self.num_experts - 1, max(self.per_token, room // max(1, self.weights.slot)))

    def plan(
        self, context: int, chunk: int, slots: int | None, kv_bits: int | None = None, with_limits: bool = True
    ) -> MemoryPlan:
        kv_bits = self.request.kv_bits if kv_bits is None else kv_bits
        kv = kv_cache_bytes(self.spec, context, self.itemsize, self.request.batch_size, kv_bits)
        scratch = scratch_bytes(
            self.spec, chunk, context, self.itemsize, self.request.batch_size, self.machine.backend, kv_bits
        )
        scratch = int(scratch * self.scratch_factor)
        weights = self.weights_bytes(slots)
        total = weights + kv + scratch
        process = max(total, self.weights.loading if slots is None else 0) + self.overhead
        plan = MemoryPlan(
            source=self.source, fits=process <= self.limit, weights_bytes=weights, kv_cache_bytes=kv, scratch_bytes=scratch,
            total_bytes=total, process_bytes=process, budget_bytes=max(0, self.limit - self.overhead),
            context_length=context, max_context_length=0, batch_size=self.request.batch_size, prefill_chunk=chunk,
            kv_bits=kv_bits, expert_slots=slots, dense_bits=self.request.dense_bits,
            wired_limit_bytes=self._wired(total), cache_limit_bytes=self.cache_limit if self.is_gpu else 0,
            memory_limit=self.limit, machine=self.machine, family=self.spec.family,
        )  # fmt: skip
        if not with_limits:
            return plan
        return replace(self.with_speeds(plan), max_context_length=self._longest(plan), least_bytes=self._least())

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
        low, high = 0, self.spec.context_length + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.plan(middle, plan.prefill_chunk, plan.expert_slots, plan.kv_bits, with_limits=False).fits
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _least(self) -> int:
        slots = self.per_token if self.weights.can_stream and self.weights.slot else None
        return self.plan(min(self.spec.context_length, 256), CHUNKS[-1], slots, with_limits=False).process_bytes

    def with_speeds(self, plan: MemoryPlan) -> MemoryPlan:
        """A plan with its `decode`, `decode_at_start` and `prefill` (memory/rates.py)."""
        rates = self.rates
        if rates is None:
            return plan
        basis = rates.basis if plan.expert_slots is None or rates.basis == "measured" else "no run"
        slow_disk, fast_disk = self.machine.ssd or (ASSUMED_DISK, ASSUMED_DISK)
        read = 0.0 if plan.expert_slots is None else self._read_bytes(plan.expert_slots, plan.batch_size)
        wait = 0.0 if plan.expert_slots is None else streamed_seconds(len(self.spec.layers))

        def decode(tokens: int) -> SpeedRange:
            cached = kv_cache_bytes(self.spec, tokens, self.itemsize, plan.batch_size, plan.kv_bits)
            seconds = rates.decode_seconds(len(self.spec.layers), self._touched_bytes(plan.batch_size), cached)
            slow = seconds / rates.low + read / slow_disk + wait
            fast = seconds / rates.high + SKEWED_READS * read / fast_disk
            return SpeedRange.of(1 / slow, 1 / fast, tokens, basis)

        prompt, chunk = plan.context_length, min(plan.prefill_chunk, plan.context_length)
        found = prefill_seconds(self.spec, rates, prompt, chunk, self._touched_bytes(chunk))
        prefill = None
        if found is not None:
            # Computed and read at the same time.
            reads = prompt / chunk * (0.0 if plan.expert_slots is None else self._read_bytes(plan.expert_slots, chunk))
            slow, fast = max(found[0], reads / slow_disk), max(found[1], reads / fast_disk)
            prefill = SpeedRange.of(prompt / slow, prompt / fast, prompt, basis)
        return replace(plan, decode=decode(plan.context_length), decode_at_start=decode(0), prefill=prefill)

    def _touched_bytes(self, tokens: int) -> float:
        """Bytes of weights that so many tokens at once are computed with, every expert being equally likely."""
        return self.weights.dense - self.weights.looked_up + self._touched_experts(tokens) * self.weights.slot

    def _touched_experts(self, tokens: int) -> float:
        return self.num_experts * (1 - (1 - self.per_token / self.num_experts) ** tokens) if self.num_experts else 0.0

    def _prefill_rate(self) -> float | None:
        products = None if self.rates is None else self.rates.products
        return None if products is None else sum(products) / 2 / (2 * self.spec.num_active_parameters())

    def _dense_bits(self) -> int:
        """Of how many bits, by their bytes, the parts are that are not experts."""
        spec = self.spec
        experts = sum(layer.num_experts * layer.parameters_per_expert(spec.hidden_size) for layer in spec.layers)
        each = 8 * self.weights.dense / max(1, spec.num_parameters() - experts)
        return min((32, 16, 8, 6, 5, 4), key=lambda bits: abs(bits + (0.5 if bits < 16 else 0) - each))

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
        longest = plan.max_context_length
        if longest >= 256:
            other = self.plan(longest, plan.prefill_chunk, plan.expert_slots, with_limits=False)
            yield Change(
                f"context_length={longest}", f"at most {longest:,} tokens of prompt and answer", other.total_bytes
            )
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


def kv_cache_bytes(
    spec: ModelSpec, num_tokens: int, itemsize: int, batch_size: int = 1, kv_bits: int | None = None
) -> int:
    """Bytes allocated for keys and values once `num_tokens` are cached: places in steps, rings whole."""
    places = kv_capacity(num_tokens, spec.context_length)
    return batch_size * sum(
        layer.kv_bytes_per_token(itemsize) * layer.window
        if layer.window is not None
        else layer.kv_bytes_per_token(itemsize, kv_bits) * places
        for layer in spec.layers
    )


_LETTERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# A number without a unit below this is not a number of bytes that anybody means.
FEWEST_BARE_BYTES = 2**20


def parse_size(value: int | float | str, name: str) -> int:
    """Bytes from a number or text: "10GB", "10G" and "10g" are 10 times 10^9, "1.5 GiB" 1.5 times 2^30.

    name: of the setting, for the SettingError that anything else raises; so does a number without a unit that is too small
    to be meant in bytes.
    """
    number: float | None = None
    unit = ""
    if is_number(value) and not abs(value) >= 2**63:  # a number that is too large may be none that a float holds
        number = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(
            r"\s*(\d+(?:\.\d*)?|\.\d+)\s*((?:([kmgt])(i?)b?)|b|bytes?)?\s*", value, re.IGNORECASE | re.ASCII
        )
        if match is not None:
            unit, power = match[2] or "", _LETTERS[(match[3] or "").lower()]
            number = float(match[1]) * (1024 if match[4] else 1000) ** power
    if number is None or not 1 <= number < 2**63:
        raise SettingError(f'{name} is {shown(value)}: give bytes above 0, or text such as "8GB" or "1.5GiB".')
    if not unit and number < FEWEST_BARE_BYTES:
        raise SettingError(f'{name} is {shown(value)}, which means {number:,g} bytes: did you mean "{number:g}GB"?')
    return int(number)


def parse_memory(value: int | str | None) -> int | None:
    """Bytes of a memory limit, as `parse_size` reads them; None for None. Raises SettingError."""
    return None if value is None else parse_size(value, "memory_limit")
