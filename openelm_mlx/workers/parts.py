"""The layers that a worker has: of which checkpoint, checked, planned and read. Never of a path that the other side names."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import mlx.core as mx

from ..checkpoint.parts import identity
from ..checks import is_whole
from ..decoding.pieces import forget_other_adapters
from ..errors import CheckpointError, UserError, WorkerError
from ..experts.residency import Streaming
from ..files import one_line
from ..hub import is_repo_name
from ..hub.cache import RepoCache
from ..memory.calibration import calibrated
from ..memory.choices import stored_choices
from ..memory.machine import own_machine
from ..memory.plan import make_plan
from ..memory.plan_types import MemoryPlan, PlanRequest
from ..models.adapter_sets import Served
from ..placement import Placement, dense_packing, parse_dtype
from ..runtime import runtime_of
from ..sources import DEMOS, Source
from ..weights import read_model

if TYPE_CHECKING:
    from ..models import Model

# What the first machine says of the layers that it wants; two requests with the same values want the same.
_ASKED = (
    "identity", "start", "stop", "is_followed", "dtype", "dense_bits", "kv_bits", "context_length", "batch_size",
    "expert_slots", "prefill_chunk", "longest", "adapter_bytes",
)  # fmt: skip


@dataclass
class PlannedPart:
    """Layers that fit. key: what was asked for. longest: the context length that caches are made for."""

    key: tuple[str, ...]
    source: Source
    placement: Placement
    plan: MemoryPlan
    is_followed: bool
    longest: int


@final
class Parts:
    """The one part of a model that a worker has at a time. It stays until another one is asked for.

    given: what it was started with; None: demos, and repositories in the Hugging Face cache. memory_limit: in bytes, None:
    what the machine has.
    """

    def __init__(self, given: Source | None, memory_limit: int | None) -> None:
        self._given, self.memory_limit = given, memory_limit
        self.planned: PlannedPart | None = None
        self.model: Model | None = None

    def prepare(self, asked: Mapping[str, Any]) -> PlannedPart:
        """Find and plan what is asked for. Raises WorkerError, CheckpointError or MemoryLimitError, with the next step."""
        key = tuple(str(asked.get(name)) for name in _ASKED)
        if self.planned is not None and self.planned.key == key:
            return self.planned
        self.forget()
        source = self._found(asked)
        start, stop = asked.get("start"), asked.get("stop")
        num_layers = len(source.spec.layers)
        if not (is_whole(start) and is_whole(stop) and 0 < start < stop <= num_layers):
            raise WorkerError(f"There are no layers {start!r} to {stop!r} of {num_layers}.")
        dense = dense_packing(asked.get("dense_bits"))
        part = Placement.of(source.contents, parse_dtype(asked.get("dtype")), dense).part(start, stop)
        request = PlanRequest(
            memory_limit=self.memory_limit,
            context_length=asked.get("context_length"),
            batch_size=asked.get("batch_size") or 1,
            prefill_chunk=asked.get("prefill_chunk"),
            kv_bits=asked.get("kv_bits"),
            dense_bits=asked.get("dense_bits"),
            expert_slots=asked.get("expert_slots"),
        )
        name = f"{source.name}, layers {start} to {stop - 1}"
        machine = calibrated(own_machine())
        weights = part.weights().with_adapters(*(int(each) for each in asked.get("adapter_bytes") or (0, 0)))
        plan = make_plan(name, part.contents.spec, weights, machine, request, part.dtype.size)
        if not plan.fits:
            raise plan.refusal()
        longest = asked.get("longest")
        if not is_whole(longest):
            raise WorkerError(f"There is no context of {longest!r} tokens.")
        self.planned = PlannedPart(key, source, part, plan, bool(asked.get("is_followed")), longest)
        return self.planned

    def read(self, progress: Callable[[int, int], None]) -> Model:
        """The planned layers, read where they have not been yet."""
        planned = self.planned
        if planned is None:
            raise WorkerError("Nothing has been prepared to be read.")
        if self.model is None:
            slots, checkpoint = planned.plan.expert_slots, planned.source.checkpoint
            streaming = None if slots is None else Streaming(planned.placement.contents, checkpoint, slots)
            model = read_model(planned.placement, checkpoint, streaming, stored_choices(), progress)
            model.is_followed = planned.is_followed
            model.context_length = planned.longest
            self.model = model
        runtime_of(self.model).plan = planned.plan
        return self.model

    def forget_adapters(self) -> None:
        """Give back what a first machine has had put beside the layers, which stay."""
        if self.model is not None and self.planned is not None:
            self.model.adapters.served = Served()
            forget_other_adapters(self.model)
            runtime_of(self.model).plan = self.planned.plan
            gc.collect()  # compiled pieces and their model know each other
            mx.clear_cache()

    def forget(self) -> None:
        """Give the memory back."""
        if self.planned is not None:
            self.planned = self.model = None
            gc.collect()
            mx.clear_cache()

    def _found(self, asked: Mapping[str, Any]) -> Source:
        """This machine's own copy of the checkpoint, with the same headers."""
        source = self._given if self._given is not None else _named(asked)
        if identity(source.checkpoint, source.config) != asked.get("identity"):
            raise CheckpointError(
                f"{source.name} here is another model than {_name_there(asked)} on the first machine: its config, its files' "
                "headers or its weights differ; copy or download the same one to both."
            )
        return source


def _named(asked: Mapping[str, Any]) -> Source:
    """What a worker without a model of its own serves: by a demo's or a repository's name."""
    demo, repo, revision = (asked.get(name) for name in ("demo", "repo", "revision"))
    if isinstance(demo, str) and demo in DEMOS:
        return Source.open(demo)
    if isinstance(repo, str) and is_repo_name(repo):
        return _cached(repo, revision if isinstance(revision, str) else None)
    raise WorkerError(
        f"{_name_there(asked)} is a folder or file of the first machine, and this worker serves demos and what is in its "
        "Hugging Face cache: start it with --model and this machine's own copy."
    )


def _cached(repo: str, revision: str | None) -> Source:
    """A repository of the Hugging Face cache; the network is not used."""
    cache = RepoCache.of(repo)
    for each in (revision, "main"):
        commit = None if each is None else cache.commit(each)
        if commit is not None and cache.snapshot(commit).is_dir():
            found = Source.open(cache.snapshot(commit))
            return Source(repo, repo, found.path, found.folder, found.config, found.checkpoint, found.contents, repo)
    raise WorkerError(
        f"{repo} is not in this machine's Hugging Face cache: download it there with `hf download {repo}`, or start the "
        "worker with --model FOLDER."
    )


def _name_there(asked: Mapping[str, Any]) -> str:
    return one_line(str(asked.get("name")))


def error_header(error: UserError) -> dict[str, Any]:
    """An error for the first machine."""
    return {"op": "error", "kind": type(error).__name__, "message": str(error)}
