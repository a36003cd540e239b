"""From `load(..., parallel=...)` to a model that computes its share: what loading needs to know of the other machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import mlx.core as mx

from .. import __version__
from ..checkpoint.parts import identity
from ..errors import SettingError
from ..memory.machine import Machine
from ..memory.plan_types import MemoryPlan, PlanRequest
from ..models.parallel import keep_experts, share_experts, share_tensors
from ..placement import Placement
from ..runtime import runtime_of
from ..sources import Source
from .group import Group, joined
from .shares import EXPERTS, checked_form, layer_shares, plan_of_share, shared_placement

if TYPE_CHECKING:
    from ..models import Model

_ALIKE = {
    "version": "another version of openelm_mlx: install the same one on all of them.",
    "files": "other files of the model: give all of them the same ones, at the same revision.",
    "options": "other options: start all of them with the same command.",
    "dtype": 'the model in another type: give dtype="bfloat16", or another one that all of them can have.',
}


_NOT_WITH = {
    "workers": "workers have whole layers, and parallel shares each layer; leave one of the two out.",
    "expert_slots": "machines that share a model have all of it in memory; leave one of the two out.",
    "adapter": "an adapter fits the whole matrices; merge it into a copy of the model first (`openelm_mlx convert`).",
}


P = ParamSpec("P")
R = TypeVar("R")


def sharing_group(parallel: object) -> Group | None:
    """The machines to share a model with; None where nobody asked. Raises SettingError and WorkerError."""
    if parallel is None:
        return None
    checked_form(parallel)
    return joined()


def check_together(options: Mapping[str, object]) -> None:
    """Raise SettingError for options, by name, that do not go with `parallel` and are not None."""
    for name, reason in _NOT_WITH.items():
        if options.get(name) is not None:
            raise SettingError(f"parallel= and {name}= do not go together: {reason}")


def agreeing(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which has a keyword `parallel`; with it an error of one machine is raised on all of them.

    What does not go with it is refused before the machines are connected.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        parallel = options.get("parallel")
        if parallel is None:
            return function(*args, **options)
        checked_form(parallel)
        check_together(options)
        with joined().agreeing_on_errors():
            return function(*args, **options)

    return call


@dataclass
class Shared:
    """One machine's share of a model. placement, plan: of the share."""

    form: str
    group: Group
    placement: Placement
    plan: MemoryPlan
    _experts: tuple[int, int]

    def make_room(self, model: Model) -> None:
        """Leave room for this machine's share alone in a model whose weights have not been read."""
        if self.form == EXPERTS:
            keep_experts(model, *self._experts)

    def read(self, read_own: Callable[[], Model]) -> Model:
        """The whole model. `read_own` reads this machine's share of the weights, the others read theirs meanwhile."""
        with self.group.agreeing_on_errors():
            model = read_own()
        if self.form == EXPERTS:
            share_experts(model, *self._experts, self.group.total)
        else:
            share_tensors(model, self.group.is_first, self.group.total)
        for layer in model.layers:  # some were made anew; see `read_model`
            mx.eval(layer.prepare_constants())
        self.attach(model)
        return model

    def attach(self, model: Model) -> None:
        """Have requests on the model agree with the other machines. Nothing is compiled, and none is beside another."""
        model.choices = replace(model.choices, compiled_step=False, slots=False)
        runtime_of(model).group = self.group


def share_out(
    opened: Source, placement: Placement, request: PlanRequest, form: str, group: Group, machine: Machine
) -> Shared:
    """Decide what this machine has, check that the others have the same model, and plan with the smallest chunk of all.

    placement: of the whole model. Raises SettingError where the model cannot be divided, and MemoryLimitError.
    """
    group.agreed(
        {
            "version": __version__,
            "files": identity(opened.checkpoint, opened.config),
            "options": [form, request.context_length, request.batch_size, request.kv_bits, request.dense_bits],
            "dtype": str(placement.dtype),
        },
        _ALIKE,
    )
    spec = placement.contents.spec
    experts = layer_shares(spec, placement.packings, form, group.rank, group.size)[0].experts
    own = shared_placement(placement, form, group.rank, group.size)
    with group.agreeing_on_errors():
        plan = plan_of_share(opened.name, own, machine, request, opened.folder)
        if not plan.fits:
            raise plan.refusal()
    least = group.least(lambda: plan.prefill_chunk)
    return Shared(form, group, own, replace(plan, prefill_chunk=least), experts)
