"""What a plan is asked, and what it says: what is wanted, the bytes of a model's weights, and the plan itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checks import size
from ..errors import MemoryLimitError
from .machine import Machine
from .rates import SpeedRange
from .together import Together
from .variant import Variant


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's parameters as they will be in memory.

    dense: all but the experts' packed matrices. slot: one expert in every layer. embedding: of `dense`, what may stay on
    disk while experts do. can_stream: whether experts can be read from the files as they are. tokenizer: of its file.
    loading: the most that is in memory until all are read, cast, packed or unpacked; 0: no more than that. untied_embedding: of
    `dense`, an embedding that is no head as well: a token reads one row of it. adapters: of `dense`, what stands beside the
    weights themselves. adapter_scratch: what these take while they compute, for each token of a pass. widened: the copies in
    float32 of one layer's experts that MLX's CPU backend computes with, where they are not packed and have 16 bits.
    """

    dense: int
    slot: int = 0
    embedding: int = 0
    can_stream: bool = False
    tokenizer: int = 0
    loading: int = 0
    untied_embedding: int = 0
    adapters: int = 0
    adapter_scratch: int = 0
    widened: int = 0

    def with_adapters(self, nbytes: int, scratch: int) -> Weights:
        """The same with adapters beside them, which stay in memory, and take `scratch` bytes for each token of a pass."""
        if not nbytes:
            return self
        loading = self.loading + nbytes if self.loading else 0
        return replace(self, dense=self.dense + nbytes, adapters=nbytes, adapter_scratch=scratch, loading=loading)


@dataclass(frozen=True)
class PlanRequest:
    """What is wanted of a plan; None leaves it to the plan. batch_size: how many requests are at work at once."""

    memory_limit: int | None = None
    context_length: int | None = None
    batch_size: int = 1
    prefill_chunk: int | None = None
    kv_bits: int | None = None
    dense_bits: int | None = None
    expert_slots: int | None = None
    wire: bool | None = None


@dataclass(frozen=True)
class Change:
    """A setting that makes a model fit which does not, and what it costs."""

    setting: str
    cost: str
    total_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a model will take on a machine, and the settings to run it with. All sizes in bytes.

    total_bytes: what MLX's peak should be; process_bytes: the whole process's; budget_bytes: what MLX may use of what was
    allowed (the rest is the process's own and MLX's buffer cache). max_context_length: the longest that fits with these
    settings. kv_bits: None, or 8 on the full-attention layers. expert_slots: None when every expert is in memory, else
    how many a layer. dense_bits: None, or the bits that dense parts are quantized to as they are read. decode, prefill:
    predicted speeds with the whole context in use, decode_at_start with an empty one; None where the machine's rates are
    not known. decode_tps, prefill_tps: their middles. changes: what would make it fit, where it does not. least_bytes: the
    smallest memory limit that can be kept with these dense_bits and kv_bits. variants: the same with each preset, where
    there is something to choose. note: what has to be said of the source itself. batch_size: how many requests may be at work
    at once, each as long as context_length; max_context_length and decode are each one's then. requests: what `om.plan` says
    of several at once. adapter_bytes: of the weights, adapters beside them; adapter_scratch: of
    scratch_bytes, what they take for each token of a pass; widened_bytes: of scratch_bytes, see `Weights`.
    """

    source: str
    fits: bool
    weights_bytes: int
    kv_cache_bytes: int
    scratch_bytes: int
    total_bytes: int
    process_bytes: int
    budget_bytes: int
    context_length: int
    max_context_length: int
    batch_size: int
    prefill_chunk: int
    kv_bits: int | None = None
    expert_slots: int | None = None
    dense_bits: int | None = None
    wired_limit_bytes: int = 0  # what macOS is asked not to page out; 0: nothing
    cache_limit_bytes: int = 0
    prefill: SpeedRange | None = None
    decode: SpeedRange | None = None
    decode_at_start: SpeedRange | None = None
    memory_limit: int = 0
    machine: Machine | None = None
    changes: tuple[Change, ...] = ()
    least_bytes: int = 0
    advice: str | None = None
    family: str = ""
    variants: tuple[Variant, ...] = ()
    note: str | None = None
    requests: Together | None = None
    adapter_bytes: int = 0
    adapter_scratch: int = 0
    widened_bytes: int = 0

    @property
    def decode_tps(self) -> float | None:
        """Tokens a second of decoding, the middle of the range."""
        return None if self.decode is None else self.decode.middle

    @property
    def prefill_tps(self) -> float | None:
        """Tokens a second of a prompt, the middle of the range."""
        return None if self.prefill is None else self.prefill.middle

    def as_dict(self) -> dict[str, Any]:
        """The plan for machines."""
        return {
            **{name: value.as_dict() if isinstance(value, SpeedRange) else value for name, value in vars(self).items()},
            "decode_tps": self.decode_tps,
            "prefill_tps": self.prefill_tps,
            "machine": None if self.machine is None else asdict(self.machine),
            "changes": [vars(change) for change in self.changes],
            "variants": [each.as_dict() for each in self.variants],
            "requests": None if self.requests is None else self.requests.as_dict(),
        }

    def refusal(self) -> MemoryLimitError:
        """The error for a plan that does not fit: the arithmetic, and what would."""
        options = "; ".join(f"{change.setting} ({change.cost})" for change in self.changes)
        what = (
            f"It would fit with {options}."
            if options
            else f"With these settings it needs a memory limit of at least {size(self.least_bytes)}."
        )
        return MemoryLimitError(
            f"{self.source} does not fit: {self.arithmetic()} are {size(self.process_bytes)}, and "
            f"{size(self.memory_limit)} are allowed. {what}" + (f" Or: {self.advice}" if self.advice else "")
        )

    def arithmetic(self) -> str:
        """The sum as a phrase."""
        requests = f"{self.batch_size:,} requests of " if self.batch_size > 1 else ""
        return (
            f"weights {size(self.weights_bytes)}, keys and values of {requests}{self.context_length:,} tokens "
            f"{size(self.kv_cache_bytes)}, computing {size(self.scratch_bytes)}, the process and MLX's buffer cache "
            f"{size(self.process_bytes - self.total_bytes)}"
        )
