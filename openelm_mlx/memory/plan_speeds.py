"""What a plan says of speed: decoding, a prompt, and what is read of experts that are on disk. No arrays.

Rates of chips and machines are in rates.py; here they meet a model's weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from ..specs import ModelSpec
from .cache_bytes import kv_cache_bytes
from .machine import Machine
from .plan_types import MemoryPlan, Weights
from .rates import SpeedRange, prefill_seconds, rates_of, streamed_seconds
from .together import ExpertReads

# A request by which chunks are weighed against slots where experts are on disk; and what is assumed of a machine of which
# it is not known: bytes and tokens a second.
USUAL_PROMPT, USUAL_ANSWER = 2048, 256
ASSUMED_DISK, ASSUMED_PREFILL, ASSUMED_PREFILL_ON_CPU = 3e9, 300.0, 20.0
# Real routers come back to experts: the demo's choices, stretched to the released models' experts, miss 0.6 to 0.9 times as
# often as if every expert were equally likely (docs/streaming.md).
SKEWED_READS = 0.6
# Rows that have chosen the same expert may each read it. On an H200 unsorted products of 2 to 32 rows of the 20b took at
# most 1.4 times what their different experts would, by the time of one row.
READ_AGAIN = 1.5


@final
class Speeds:
    """Of a model on a machine. itemsize: bytes of a number in its keys and values."""

    def __init__(self, spec: ModelSpec, weights: Weights, machine: Machine, itemsize: int) -> None:
        self.spec, self.weights, self.machine, self.itemsize = spec, weights, machine, itemsize
        layer = spec.layers[0]
        self.num_experts, self.per_token = layer.num_experts, layer.experts_per_token
        self.rates = rates_of(machine, spec, self._dense_bits())

    def with_speeds(self, plan: MemoryPlan) -> MemoryPlan:
        """A plan with its `decode`, `decode_at_start` and `prefill` (memory/rates.py)."""
        rates = self.rates
        if rates is None:
            return plan
        basis = rates.basis if plan.expert_slots is None or rates.basis == "measured" else "no run"
        slow_disk, fast_disk = self._disk()
        prompt, chunk = plan.context_length, min(plan.prefill_chunk, plan.context_length)
        found = prefill_seconds(self.spec, rates, prompt, chunk, self._touched_bytes(chunk))
        prefill = None
        if found is not None:
            # Computed and read at the same time.
            reads = prompt / chunk * (0.0 if plan.expert_slots is None else self._read_bytes(plan.expert_slots, chunk))
            slow, fast = max(found[0], reads / slow_disk), max(found[1], reads / fast_disk)
            prefill = SpeedRange.of(prompt / slow, prompt / fast, prompt, basis)
        decode, at_start = (self.decode(plan, tokens, plan.batch_size)[0] for tokens in (plan.context_length, 0))
        return replace(plan, decode=decode, decode_at_start=at_start, prefill=prefill)

    def decode(self, plan: MemoryPlan, tokens: int, rows: int) -> tuple[SpeedRange | None, SpeedRange | None]:
        """Tokens a second of each of so many requests with so many tokens each, and of all together; None: not known.

        A step of all of them reads the weights once; of experts that several rows have chosen, some more often. Many rows
        take as long as their products do.
        """
        rates = self.rates
        if rates is None:
            return None, None
        layers, is_streamed = len(self.spec.layers), plan.expert_slots is not None
        basis = rates.basis if not is_streamed or rates.basis == "measured" else "no run"
        cached = kv_cache_bytes(self.spec, tokens, self.itemsize, rows, plan.kv_bits)
        touched, experts = self._touched_bytes(rows), self._touched_experts(rows)
        most = touched + (min(rows * self.per_token, READ_AGAIN * experts) - experts) * self.weights.slot
        slow, fast = (
            rates.decode_seconds(layers, each, cached) / factor
            for each, factor in ((most, rates.low), (touched, rates.high))
        )
        if rows > 1 and rates.products is not None:
            operations = 2 * rows * self.spec.num_active_parameters()
            slow, fast = max(slow, operations / rates.products[0]), max(fast, operations / rates.products[1])
        if is_streamed:
            read = self._read_bytes(plan.expert_slots or 0, rows)
            slow_disk, fast_disk = self._disk()
            slow += read / slow_disk + streamed_seconds(layers)
            fast += SKEWED_READS * read / fast_disk
        return (
            SpeedRange.of(1 / slow, 1 / fast, tokens, basis),
            SpeedRange.of(rows / slow, rows / fast, tokens, basis),
        )

    def reads(self, plan: MemoryPlan, rows: int) -> ExpertReads:
        """What a step reads of experts that are on disk."""
        touched, slots = self._touched_experts(rows), plan.expert_slots or 0
        read = self._read_bytes(slots, rows)
        slow, fast = (None, None)
        if self.machine.ssd is not None:
            slow, fast = read / self.machine.ssd[0], SKEWED_READS * read / self.machine.ssd[1]
        return ExpertReads(rows, touched, touched * (1 - slots / self.num_experts), int(read), slow, fast)

    def usual_seconds(self, plan: MemoryPlan) -> float:
        """Seconds of requests of usual lengths, as many as are at work at once, as far as they depend on how memory is
        shared by chunks and slots.

        A chunk is read and computed at the same time; every expert is equally likely. Rates that are not known are assumed:
        they only weigh a prompt against its answer.
        """
        prompt = min(plan.context_length, USUAL_PROMPT)
        chunk = min(plan.prefill_chunk, prompt)
        slots = plan.expert_slots or 0
        disk = self.machine.ssd_bandwidth or ASSUMED_DISK
        rate = self._prefill_rate() or (ASSUMED_PREFILL_ON_CPU if self.machine.backend == "cpu" else ASSUMED_PREFILL)
        read = self._read_bytes(slots, chunk) / disk
        prompts = plan.batch_size * prompt / chunk * max(read, chunk / rate)
        return prompts + USUAL_ANSWER * self._read_bytes(slots, plan.batch_size) / disk

    def _read_bytes(self, slots: int, chunk: int = 1) -> float:
        """Expert bytes that so many tokens at once read from disk, every expert being equally likely: more than a real
        model's routing.
        """
        return self._touched_experts(chunk) * (1 - slots / self.num_experts) * self.weights.slot

    def _disk(self) -> tuple[float, float]:
        return self.machine.ssd or (ASSUMED_DISK, ASSUMED_DISK)

    def _touched_bytes(self, tokens: int) -> float:
        """Bytes of weights that so many tokens at once are computed with, every expert being equally likely."""
        return self.weights.dense - self.weights.untied_embedding + self._touched_experts(tokens) * self.weights.slot

    def _touched_experts(self, tokens: int) -> float:
        """How many different experts of a layer so many tokens choose, every one being equally likely."""
        return self.num_experts * (1 - (1 - self.per_token / self.num_experts) ** tokens) if self.num_experts else 0.0

    def _prefill_rate(self) -> float | None:
        products = None if self.rates is None else self.rates.products
        return None if products is None else sum(products) / 2 / (2 * self.spec.num_active_parameters())

    def _dense_bits(self) -> int:
        """Of how many bits, by their bytes, the parts are that are not experts."""
        spec = self.spec
        experts = sum(layer.num_experts * layer.parameters_per_expert(spec.hidden_size) for layer in spec.layers)
        each = 8 * (self.weights.dense - self.weights.adapters) / max(1, spec.num_parameters() - experts)
        return min((32, 16, 8, 6, 5, 4), key=lambda bits: abs(bits + (0.5 if bits < 16 else 0) - each))
