"""Which layers of a model lie on which machine, each part within that machine's own plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checkpoint.parts import layer_of
from ..checks import is_whole, size
from ..errors import MemoryLimitError, SettingError
from ..files import shown
from ..memory.cache_bytes import CacheBytes
from ..memory.machine import Machine
from ..memory.plan import SHORT_CHUNK, make_plan
from ..memory.plan_types import MemoryPlan, PlanRequest
from ..memory.rates import rates_of
from ..memory.split import Room, missing_bytes, split_evenly, split_layers
from ..placement import Placement
from ..specs import ModelSpec

# A plan may need a little more than the sum of its layers, and then the layers are divided once more.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Part:
    """What one machine has: layers start ... stop - 1, and the first one embedding and head."""

    start: int
    stop: int
    machine: Machine
    placement: Placement
    plan: MemoryPlan

    @property
    def spec(self) -> ModelSpec:
        return self.placement.contents.spec

    def layer_bytes(self) -> list[int]:
        """Bytes of what belongs to no layer, and of each layer."""
        sizes = _bytes_by_layer(self.placement)
        return [sizes[-1], *(sizes[i] for i in range(len(self.spec.layers)))]


def spread_over(
    source: str,
    placement: Placement,
    machines: Sequence[Machine],
    request: PlanRequest,
    counts: Sequence[int] | None = None,
    needs_fit: bool = True,
    adapter_bytes: tuple[int, int] = (0, 0),
    limits: Sequence[int | None] | None = None,
) -> list[Part]:
    """The parts of a model on these machines, this one first.

    placement: of the whole model. request: its memory limit is the first machine's. counts: how many layers each gets; None
    chooses. needs_fit: False gives parts that do not fit, too. adapter_bytes: what adapters take, and for each token of a
    pass, as if each machine had them whole. limits: the other machines' memory limits, in bytes. Raises SettingError for
    counts that do not add up, and MemoryLimitError where all machines together have too little.
    """
    spec = placement.contents.spec
    if len(machines) > len(spec.layers):
        raise SettingError(
            f"{source} has {len(spec.layers)} layers, too few for {len(machines)} machines: give fewer workers."
        )
    # A memory limit is of the machine on which it was given.
    others = [None] * (len(machines) - 1) if limits is None else limits
    requests = [request, *(replace(request, memory_limit=each) for each in others)]
    if counts is not None:
        parts = _parts(
            source, placement, machines, requests, checked_counts(counts, spec, len(machines)), adapter_bytes
        )
        if needs_fit:
            _check(source, parts)
        return parts
    layers, kept = _layer_bytes(placement, request)
    rooms = [
        _room(source, placement, machine, wanted, adapter_bytes)
        for machine, wanted in zip(machines, requests, strict=True)
    ]
    parts = []
    for _ in range(_ATTEMPTS):
        found = split_layers(layers, kept, rooms)
        if found is None:
            if needs_fit and not placement.weights().can_stream:
                raise _too_little(source, machines, layers, kept, rooms)
            found = split_evenly(layers, kept, rooms)
            parts = _parts(source, placement, machines, requests, found, adapter_bytes)
            break
        parts = _parts(source, placement, machines, requests, found, adapter_bytes)
        tight = [i for i, part in enumerate(parts) if not part.plan.fits or part.plan.expert_slots is not None]
        if not tight or request.expert_slots is not None:
            break
        for i in tight:  # as full as it can be by the sum of its layers, and that was too much
            least = layers[parts[i].stop - 1] // 2
            rooms[i] = replace(rooms[i], nbytes=rooms[i].nbytes - max(least, 1))
    if needs_fit:
        _check(source, parts)
    return parts


def checked_counts(counts: Sequence[int], spec: ModelSpec, num_machines: int) -> tuple[int, ...]:
    """How many layers each machine gets. Raises SettingError where they do not add up to the model's."""
    total = len(spec.layers)
    if any(not is_whole(each) or each < 1 for each in counts):
        raise SettingError(f"layers is {shown(list(counts))}: give each machine at least one layer.")
    if len(counts) != num_machines:
        raise SettingError(
            f"layers has {len(counts)} numbers for {num_machines} machines: give one for this machine, and one for each other."
        )
    if sum(counts) != total:
        raise SettingError(
            f"layers is {','.join(map(str, counts))}, together {sum(counts)}, and the model has {total} layers: give numbers "
            "that add up to it."
        )
    return tuple(counts)


def parse_counts(text: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """Numbers of layers from "20,16", or as they are. Raises SettingError."""
    if text is None:
        return None
    if not isinstance(text, str):
        if not isinstance(text, Sequence) or not all(is_whole(each) for each in text):
            raise SettingError(f"layers is {shown(text)}: give a number for each machine, such as (20, 16).")
        return tuple(int(each) for each in text)
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise SettingError(f"layers is {shown(text)}: give a number for each machine, such as 20,16.") from None


def _parts(
    source: str,
    placement: Placement,
    machines: Sequence[Machine],
    requests: Sequence[PlanRequest],
    counts: Sequence[int],
    adapter_bytes: tuple[int, int],
) -> list[Part]:
    parts, start = [], 0
    for machine, wanted, count in zip(machines, requests, counts, strict=True):
        stop = start + count
        part = placement.part(start, stop)
        spec = part.contents.spec
        name = f"{source}, layers {start} to {stop - 1}"
        weights = part.weights().with_adapters(*adapter_bytes)
        plan = make_plan(name, spec, weights, machine, wanted, part.dtype.size)
        parts.append(Part(start, stop, machine, part, plan))
        start = stop
    return parts


def _layer_bytes(placement: Placement, request: PlanRequest) -> tuple[list[int], int]:
    """Bytes of each layer with its keys and values, and of what belongs to no layer."""
    spec, sizes = placement.contents.spec, _bytes_by_layer(placement)
    length = min(spec.context_length, 8192) if request.context_length is None else request.context_length
    caches = (
        CacheBytes(
            replace(spec, layers=(layer,)), placement.dtype.size, request.kv_bits if layer.window is None else None
        )
        for layer in spec.layers
    )
    kv = [request.batch_size * max(each.rings, each.total(length)) for each in caches]
    return [sizes[i] + kv[i] for i in range(len(spec.layers))], sizes[-1]


def _bytes_by_layer(placement: Placement) -> Counter[int]:
    """Layer -> bytes of its parameters; -1: of those that belong to none."""
    sizes: Counter[int] = Counter()
    for each in placement.decisions:
        number = layer_of(each.parameter.name)
        sizes[-1 if number is None else number] += each.nbytes
    return sizes


def _room(
    source: str, placement: Placement, machine: Machine, request: PlanRequest, adapter_bytes: tuple[int, int]
) -> Room:
    """What a machine has for layers, beside its process and what computing takes at least."""
    spec, weights = placement.contents.spec, placement.weights()
    chunk = request.prefill_chunk or SHORT_CHUNK
    lean = make_plan(source, spec, weights, machine, replace(request, prefill_chunk=chunk), placement.dtype.size)
    overhead = lean.process_bytes - lean.weights_bytes - lean.kv_cache_bytes
    rates = rates_of(machine, spec, request.dense_bits)
    nbytes = lean.memory_limit - overhead - adapter_bytes[0]
    if rates is None:
        return Room(nbytes, 0.0, 1e-11 if machine.bandwidth is None else 1 / machine.bandwidth)
    return Room(nbytes, rates.layer_seconds, 1 / rates.weights)


def _check(source: str, parts: Sequence[Part]) -> None:
    short = next((part for part in parts if not part.plan.fits), None)
    if short is not None:
        missing = sum(max(0, part.plan.process_bytes - part.plan.memory_limit) for part in parts)
        raise MemoryLimitError(
            f"{short.plan.source} on {short.machine.name}: {short.plan.arithmetic()} are {size(short.plan.process_bytes)}, and "
            f"{size(short.plan.memory_limit)} are allowed there; {size(missing)} are missing on all machines together: give "
            "other layers, a shorter context_length, or one more worker."
        )


def _too_little(
    source: str, machines: Sequence[Machine], layers: Sequence[int], kept: int, rooms: Sequence[Room]
) -> MemoryLimitError:
    missing = missing_bytes(layers, kept, rooms)
    have = " + ".join(
        f"{size(max(0, room.nbytes))} on {machine.name}" for room, machine in zip(rooms, machines, strict=True)
    )
    what = f"{size(missing)} are missing" if missing else "no division into whole layers fits"
    return MemoryLimitError(
        f"{source} needs {size(sum(layers) + kept)} for its layers with their keys and values, and these machines have {have}: "
        f"{what}; add a worker, or give dense_bits=8 or a shorter context_length."
    )
