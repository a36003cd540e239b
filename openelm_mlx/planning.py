"""A plan for a source - a folder, a file, a repository - before a tensor of it is read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .adapters import Adapters, given_adapters, planned_bytes
from .arguments import NAME, checked_call
from .checkpoint.layouts import Contents
from .checkpoint.released import write_released_headers
from .checks import whole_number
from .errors import CheckpointError, HubError, SettingError
from .experts.residency import checked_slots
from .files import hears_the_disk, shown
from .link.forecast import SeveralPlan, checked_link, forecast, machines_of
from .link.spread import parse_counts, spread_over
from .memory.admission import MOST_REQUESTS
from .memory.calibration import calibrated
from .memory.machine import Machine, find_mac, this_machine
from .memory.plan import make_plan
from .memory.plan_types import MemoryPlan, PlanRequest, Weights
from .memory.presets import PRESETS, preset_bits
from .memory.sizes import parse_memory
from .memory.variants import variants_of
from .models.low_rank import Adapter
from .parallel.shares import FORMS, plan_of_share, shared_placement
from .placement import Placement, dense_packing, dense_packings, packed_weights, parse_dtype
from .sources import Source, SourceName, repository
from .specs import checked_kv_bits

# Said where there are no variants.
ALL_PACKED = "no preset rounds anything, because all matrices of this source are packed already"


@hears_the_disk(CheckpointError)
@checked_call("om.plan", mac=NAME, revision=NAME)
def plan(
    source: SourceName,
    *,
    memory_limit: int | str | None = None,
    context_length: int | None = None,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    kv_bits: int | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    expert_slots: int | None = None,
    dtype: str | mx.Dtype | None = None,
    mac: str | None = None,
    machine: Machine | None = None,
    revision: str | None = None,
    adapter: Adapters | None = None,
) -> MemoryPlan:
    """What a model would take, whether it fits, with which settings, how long a context, and how fast.

    From headers and config alone: of a repository nothing else is fetched, and nothing at all of Apple's and
    OpenAI's when the Hub is out of reach.

    Args:
        memory_limit: Bytes or "10GB", MLX's memory with its buffer cache and the process's own; what the
            machine has when it is None.
        batch_size: So many requests at once, each with its own keys and values, by one pass over all of them for
            every token. `requests` of the plan says how many of which length fit at once, how long each may be,
            and how fast they would be, one by one and together.
        mac: A Mac such as "M4 Pro 24GB" instead of this machine.

    The other arguments are those of `load` and `stream_generate`. The plan's `variants` are the same source with
    each preset, and none where its matrices are packed already, as `note` says then.

    Raises SettingError for a value out of its range, and what opening the source raises; a plan that does not
    fit is no error.
    """
    if not isinstance(machine, (Machine, type(None))):
        raise SettingError(f"machine is {shown(machine)}: give a Machine, or the name of a Mac as mac.")
    here = find_mac(mac) if mac is not None else machine or this_machine()
    looked_at, bits = Planned.look(source, revision, dtype).with_adapters(adapter), preset_bits(preset, dense_bits)
    options: dict[str, Any] = {
        "memory_limit": memory_limit, "context_length": context_length, "batch_size": batch_size,
        "prefill_chunk": prefill_chunk, "kv_bits": kv_bits, "expert_slots": expert_slots,
    }  # fmt: skip
    found = looked_at.plan(here, dense_bits=bits, with_requests=True, **options)
    if not looked_at.has_plain_matrices:
        return found
    others = {each.dense_bits: each.dense_bits for each in PRESETS.values()} | {bits: bits}
    plans = [found if each == bits else looked_at.plan(here, dense_bits=each, **options) for each in others]
    return replace(found, variants=variants_of(plans))


def plans_on(
    machines: Sequence[Machine],
    source: SourceName,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    as_released: bool = False,
    adapter: Adapters | None = None,
    **options: Any,
) -> list[MemoryPlan]:
    """`plan` for several machines, with all of its other arguments and without variants; the source is looked at once.

    as_released: a repository of Apple's or OpenAI's by the sizes it was released with, the Hub is not asked.
    """
    looked_at = Planned.look(source, revision, dtype, as_released).with_adapters(adapter)
    bits = preset_bits(preset, dense_bits)
    return [looked_at.plan(machine, dense_bits=bits, **options) for machine in machines]


def plan_several(
    source: SourceName,
    macs: str | Sequence[str],
    link: str = "thunderbolt",
    layers: str | Sequence[int] | None = None,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preset: str | None = None,
    dense_bits: int | None = None,
    adapter: Adapters | None = None,
    as_released: bool = False,
    **options: Any,
) -> SeveralPlan:
    """A model over several Macs: which layers lie where, how fast that is, and whether one of them would do better.

    Args:
        macs: "M4 Pro 48GB, M4 Pro 48GB", or a list; the first is the one at which the user sits.
        link: "thunderbolt", "ethernet" or "wifi".
        layers: How many each gets; None: the fastest is filled first.

    The other arguments are those of `plan`; as_released: see `plans_on`. Raises SettingError for a Mac that is unknown and for
    layers that do not add up, MemoryLimitError, with how much is missing, where the Macs do not hold it.
    """
    between, machines = checked_link(link), machines_of(macs)
    counts, bits = parse_counts(layers), preset_bits(preset, dense_bits)
    looked_at = Planned.look(source, revision, dtype, as_released).with_adapters(adapter)
    request = checked_request(looked_at.contents, dense_bits=bits, **options)
    placement = Placement.of(looked_at.contents, looked_at.dtype, dense_packing(bits), on_cpu=False)
    more = planned_bytes(looked_at.contents.spec, looked_at.adapters, "metal")
    parts = spread_over(str(source), placement, machines, request, counts, adapter_bytes=more)
    weights, spec = placement.weights(looked_at.folder), looked_at.contents.spec
    alone = [looked_at.plan(each, dense_bits=bits, **options) for each in dict.fromkeys(machines)]
    short = _too_small_shares(str(source), placement, machines, request, looked_at.folder)
    return forecast(str(source), spec, weights, parts, alone, between, short)


def _too_small_shares(
    source: str, placement: Placement, machines: Sequence[Machine], request: PlanRequest, folder: Path | None
) -> dict[str, MemoryPlan]:
    """Of the forms that share each layer, those which the Macs have no memory for: the first Mac's plan that does not fit."""
    found: dict[str, MemoryPlan] = {}
    for form in FORMS:
        for rank, machine in enumerate(machines):
            try:
                own = shared_placement(placement, form, rank, len(machines))
            except SettingError:  # it cannot be divided, which the forecast says
                break
            limit = request.memory_limit if rank == 0 else None
            plan = plan_of_share(source, own, machine, replace(request, memory_limit=limit, expert_slots=None), folder)
            if not plan.fits:
                found[form] = plan
                break
    return found


@dataclass(frozen=True)
class Planned:
    """A source that was looked at, to be planned on any machine and with any bits. folder: where a tokenizer may be. note:
    what has to be said of how its contents are known.
    """

    source: str
    contents: Contents
    dtype: mx.Dtype | None
    folder: Path | None = None
    note: str | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @classmethod
    def look(
        cls, source: SourceName, revision: str | None, dtype: str | mx.Dtype | None, as_released: bool = False
    ) -> Planned:
        """At headers and config. Raises what opening a source raises."""
        wanted_type = parse_dtype(dtype)
        released = released_contents(str(source)) if as_released else None
        contents, folder, note = _looked_at(source, revision) if released is None else (released, None, None)
        return cls(str(source), contents, wanted_type, folder, note)

    def with_adapters(self, given: Adapters | None) -> Planned:
        """The same with adapters beside it, which are read: they are small. Raises what reading them raises."""
        spec = self.contents.spec
        return replace(self, adapters=given_adapters(given, spec))

    @cached_property
    def has_plain_matrices(self) -> bool:
        """Whether there is anything for `dense_bits` to pack."""
        return bool(dense_packings(self.contents, dense_packing(8)))

    def plan(self, machine: Machine, dense_bits: int | None, with_requests: bool = False, **options: Any) -> MemoryPlan:
        """The plan on a machine."""
        contents, on_cpu = self.contents, machine.backend == "cpu"
        request = checked_request(contents, dense_bits=dense_bits, **options)
        weights, itemsize = self._weights(dense_bits, on_cpu)
        packed = partial(self._packed_weights, on_cpu) if dense_bits is None else None
        noted = calibrated(replace(machine, notes=(*machine.notes, self.note)) if self.note else machine)
        made = make_plan(self.source, contents.spec, weights, noted, request, itemsize, packed, with_requests)
        return made if self.has_plain_matrices else replace(made, note=ALL_PACKED)

    def _weights(self, dense_bits: int | None, on_cpu: bool) -> tuple[Weights, int]:
        """What the weights take, and bytes of a number that is computed with: the same on every machine of a kind."""
        dense, known = dense_packing(dense_bits), self._known_weights
        key = dense_bits, on_cpu
        if key not in known:
            placement = Placement.of(self.contents, self.dtype, dense, on_cpu)
            known[key] = self._beside(placement.weights(self.folder), on_cpu), placement.dtype.size
        return known[key]

    def _packed_weights(self, on_cpu: bool) -> Weights:
        return self._beside(packed_weights(self.contents, self.dtype, on_cpu, self.folder), on_cpu)

    def _beside(self, weights: Weights, on_cpu: bool) -> Weights:
        return weights.with_adapters(*planned_bytes(self.contents.spec, self.adapters, "cpu" if on_cpu else "metal"))

    @cached_property
    def _known_weights(self) -> dict[tuple[int | None, bool], tuple[Weights, int]]:
        return {}


@hears_the_disk(CheckpointError)
def _looked_at(source: SourceName, revision: str | None) -> tuple[Contents, Path | None, str | None]:
    """What a source holds, where a tokenizer may be, and what has to be said of how that is known."""
    try:
        opened = Source.open(source, revision, headers_only=True)
    except HubError as error:
        repo, wanted = repository(source, revision) or (str(source), revision)
        contents = released_contents(repo) if wanted is None else None
        if contents is None:
            raise
        return (
            contents,
            None,
            f"these are the sizes that {source} was released with; of its files nothing is known: {error}",
        )
    return opened.contents, opened.folder, None


def released_contents(name: str) -> Contents | None:
    """What a repository of Apple's OpenELM or OpenAI's gpt-oss holds, without asking for it; None for another name.

    From the released shapes, by way of files that have headers and nothing else.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "headers"
        return Source.open(folder).contents if write_released_headers(folder, name) else None


def checked_request(contents: Contents, memory_limit: int | str | None = None, **options: Any) -> PlanRequest:
    """The `PlanRequest` of these fields, with every number in its range. Raises SettingError."""
    spec, request = contents.spec, PlanRequest(**options)
    bounds = {"context_length": spec.context_length, "batch_size": MOST_REQUESTS, "prefill_chunk": 2**20}
    for name, most in bounds.items():
        value = getattr(request, name)
        if value is not None or name == "batch_size":
            whole_number(name, value, high=most)
    if request.expert_slots is not None:
        checked_slots(spec, request.expert_slots)
    return replace(request, memory_limit=parse_memory(memory_limit), kv_bits=checked_kv_bits(spec, request.kv_bits))
