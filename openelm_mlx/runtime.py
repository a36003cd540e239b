"""What a model has beyond its weights while it runs: its plan, what reads its experts, what was traced for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .experts.residency import Residency
from .memory.plan_types import MemoryPlan
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .models import Model


@dataclass
class Traced:
    """Compiled pieces of a model's step, by kind and form, and what they were traced with.

    weights: the model's modules and their arrays then. version: another number once one of them has been replaced.
    """

    pieces: dict[tuple[type, bool], Any] = field(default_factory=dict)
    weights: list[Any] = field(default_factory=list)
    version: int = 0


@dataclass
class Runtime:
    """One for each model; `runtime_of` finds it.

    plan: the memory plan that loading followed; None where nothing was planned, and nothing is refused. residency: what
    reads experts that are not in memory; None when all are. failure: why the model must be loaded again, once it must.
    tokenizer: what the model's tokens mean, where it was loaded with one; for comparing two models.
    """

    plan: MemoryPlan | None = None
    residency: Residency | None = None
    failure: str | None = None
    tokenizer: Tokenizer | None = None
    traced: Traced = field(default_factory=Traced)


def runtime_of(model: Model) -> Runtime:
    """The runtime of a model; an empty one for a model that nobody loaded, when it is first asked for."""
    if model.runtime is None:
        model.runtime = Runtime()
    runtime: Runtime = model.runtime
    return runtime
