"""A model over several machines, from the addresses to the chain of its layers: what loading needs to know of it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.parts import identity
from ..checks import is_number
from ..errors import SettingError
from ..files import shown
from ..hub.names import Progress
from ..memory.machine import Machine
from ..memory.plan_types import MemoryPlan, PlanRequest
from ..models.low_rank import Adapter
from ..placement import Placement
from ..runtime import runtime_of
from ..sources import DEMOS, Source
from ..specs import ModelSpec
from .adapter_parts import KeptAdapter, adapter_part, packed_adapter
from .addresses import Address, parse_workers
from .chain import Chain
from .reading import SharedProgress
from .secret import read_secret
from .spread import Part, parse_counts, spread_over
from .team import Team

if TYPE_CHECKING:
    from ..models import Model


# Seconds.
SHORTEST_DEADLINE, LONGEST_DEADLINE = 0.2, 3600.0


@dataclass(frozen=True)
class WorkerSettings:
    """What `load` was given of other machines, checked. counts: layers of each machine. deadline: seconds."""

    addresses: Sequence[Address]
    secret_file: str | os.PathLike[str] | None
    counts: tuple[int, ...] | None
    deadline: float


@dataclass
class Several:
    """Who has what of `source`. parts: of each machine, this one's first. plan: this machine's, with a chunk that suits all."""

    source: Source
    team: Team
    chain: Chain
    parts: Sequence[Part]
    plan: MemoryPlan
    _finalizer: Any = None

    @property
    def own(self) -> Part:
        return self.parts[0]

    def _share(self, progress: Progress) -> Progress:
        """Have the workers' progress added to this machine's; gives what this machine's is told to."""
        shared = SharedProgress(progress, len(self.parts))
        for number, member in enumerate(self.team.members, 1):
            member.peer.progress = shared.of(number)
        return shared.of(0)

    def read(self, read_own: Callable[[Progress], Model], progress: Progress | None) -> Model:
        """The whole model. `read_own` reads this machine's part, and says how far it is; the workers read theirs meanwhile."""
        told = None if progress is None else self._share(progress)

        def read_and_receive(receive_available: Callable[[], None]) -> Model:
            def update(done: int, total: int) -> None:
                if told is not None:
                    told(done, total)
                receive_available()

            return read_own(update)

        model = self.chain.read(read_and_receive)
        self._attach(model)
        return model

    def _attach(self, model: Model) -> None:
        """This machine's part, read, becomes the whole model, whose other layers are on the workers."""
        model.is_followed = True
        # Requests keep their keys and values apart: the workers' are, too.
        model.choices = replace(model.choices, slots=False)
        runtime = runtime_of(model)
        runtime.remote, runtime.others = self.chain, self
        self.chain.adapters = model.adapters
        self.team.has_read()
        self.close_with(model)

    def give_adapter(self, name: str, adapter: Adapter, is_planned: bool) -> tuple[Adapter, KeptAdapter]:
        """Have each worker serve its part of an adapter; gives this machine's, and what keeps theirs there.

        is_planned: the workers' plans count it already. Raises the error of a worker that has no room for it.
        """
        number = self.chain.new_number()
        messages = [
            packed_adapter(name, number, adapter_part(adapter, part.start, part.stop), is_planned)
            for part in self.parts[1:]
        ]
        self.chain.give_adapter(number, messages)
        return adapter_part(adapter, self.own.start, self.own.stop), KeptAdapter(self.chain, number)

    def close_with(self, model: Model) -> None:
        """Let the workers go when nobody has `model` any more; no longer with the one that was named before."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(model, self.team.close)


def checked_workers(
    workers: str | Sequence[str] | None, secret_file: str | os.PathLike[str] | None, layers: Any, deadline: float
) -> WorkerSettings | None:
    """What was asked for; None without workers. Raises SettingError, also for what is given without them."""
    if not is_number(deadline) or not SHORTEST_DEADLINE <= deadline <= LONGEST_DEADLINE:
        raise SettingError(
            f"worker_timeout is {shown(deadline)}: give seconds, from {SHORTEST_DEADLINE:g} to {LONGEST_DEADLINE:,g}."
        )
    if workers is None:
        for name, value in (("secret_file", secret_file), ("layers", layers)):
            if value is not None:
                raise SettingError(f"{name} is for other machines, and there are none: give workers, or leave it out.")
        return None
    counts = parse_counts(layers)
    return WorkerSettings(parse_workers(workers), secret_file, counts, deadline)


def spread_out(
    opened: Source,
    placement: Placement,
    request: PlanRequest,
    settings: WorkerSettings,
    machine: Machine,
    adapter_bytes: tuple[int, int] = (0, 0),
) -> Several:
    """Meet the workers, decide who gets which layers, and have each of them check its own copy and its own memory.

    placement: of the whole model. machine: this one. Raises WorkerError, SettingError, CheckpointError and MemoryLimitError.
    """
    secret = None if settings.secret_file is None else read_secret(settings.secret_file)
    team = Team(settings.addresses, secret, settings.deadline)
    try:
        machines = [machine, *(each.machine for each in team.members)]
        parts = spread_over(
            opened.name, placement, machines, request, settings.counts, adapter_bytes=adapter_bytes,
            limits=[each.memory_limit for each in team.members],
        )  # fmt: skip
        _check_kv_bits(request.kv_bits, parts[0].spec)
        plan = parts[0].plan
        common = {
            "name": opened.name, "demo": opened.name if opened.name in DEMOS else None, "repo": opened.repo,
            "revision": opened.revision, "identity": identity(opened.checkpoint, opened.config),
            "dtype": str(placement.dtype).removeprefix("mlx.core."), "dense_bits": request.dense_bits,
            "kv_bits": request.kv_bits, "context_length": plan.context_length, "batch_size": request.batch_size,
            "expert_slots": request.expert_slots, "prefill_chunk": request.prefill_chunk,
            "adapter_bytes": adapter_bytes, "longest": request.context_length or opened.spec.context_length,
        }  # fmt: skip
        wanted = [
            {**common, "start": part.start, "stop": part.stop, "is_followed": part is not parts[-1],
             "kv_bits": request.kv_bits if _has_full_attention(part.spec) else None}
            for part in parts[1:]
        ]  # fmt: skip
        chain = team.form([part.spec for part in parts[1:]], wanted)
        chunk = min([plan.prefill_chunk, *(int(each.plan["prefill_chunk"]) for each in team.members)])
        return Several(opened, team, chain, parts, replace(plan, prefill_chunk=chunk))
    except BaseException:
        team.close()
        raise


def _has_full_attention(spec: ModelSpec) -> bool:
    return any(layer.window is None for layer in spec.layers)


def _check_kv_bits(kv_bits: int | None, spec: ModelSpec) -> None:
    if kv_bits == 8 and not _has_full_attention(spec):
        raise SettingError(
            f"kv_bits=8 is for layers that keep all keys, and of the {len(spec.layers)} on this machine none does: give it one "
            "more, layers=2,..."
        )
