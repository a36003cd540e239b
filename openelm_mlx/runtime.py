"""What belongs to a running model besides its weights: its memory plan, expert residency and compiled pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .experts.residency import Residency
from .memory.plan_types import MemoryPlan
from .models.adapter_sets import AdaptersForm
from .models.low_rank import Adapter
from .models.parallel import MachineGroup
from .models.remote import RemoteLayers
from .sources import Source
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .models import Model


@dataclass
class Traced:
    """Compiled pieces of a model's step, by kind, form and adapters, and what they were traced with.

    weights: the model's modules and their arrays at that time. version: changes once one of them has been replaced.
    """

    pieces: dict[tuple[type, bool, AdaptersForm], Any] = field(default_factory=dict)
    weights: list[Any] = field(default_factory=list)
    version: int = 0


class OtherMachines(Protocol):
    """Where a model's other layers are, as one: what is put beside the model goes to all of them (link/several.py)."""

    @property
    def source(self) -> Source:
        """The whole model, of which each machine has a part."""

    def give_adapter(self, name: str, adapter: Adapter, is_planned: bool) -> tuple[Adapter, Any]:
        """Have each machine put its part of an adapter beside its layers; gives this machine's, and what keeps the others.

        is_planned: the plans of all machines count it already. Raises MemoryLimitError where one has no room.
        """


@dataclass
class Runtime:
    """One for each model; `runtime_of` finds it.

    plan: the memory plan that loading followed; None where nothing was planned, so no request is refused for memory.
    residency: reads experts that are not in memory; None when all are. failure: why the model has to be loaded again, if it
    has. tokenizer: the one it was loaded with, for comparing two models. remote: the layers that other machines have; others:
    these machines. group: the machines that share every layer of it, where there are any.
    """

    plan: MemoryPlan | None = None
    residency: Residency | None = None
    failure: str | None = None
    tokenizer: Tokenizer | None = None
    traced: Traced = field(default_factory=Traced)
    remote: RemoteLayers | None = None
    others: OtherMachines | None = None
    group: MachineGroup | None = None


def runtime_of(model: Model) -> Runtime:
    """The runtime of a model; made empty on first use for a model that was not loaded from a source."""
    if model.runtime is None:
        model.runtime = Runtime()
    runtime: Runtime = model.runtime
    return runtime
