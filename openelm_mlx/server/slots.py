"""One model of a server: whether it is in memory, who waits for it, and the leases of those who use it.

Which of them are to be in memory is the registry's to decide. Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

from .failures import ApiError
from .settings import ServedModel

if TYPE_CHECKING:
    from ..decoding.prefix_cache import PrefixCache
    from ..engine.many import Engine
    from ..memory.plan_types import MemoryPlan
    from ..models import Model
    from ..text.tokenizer import Tokenizer
    from .loading import Loaded

State = Literal["unloaded", "loading", "ready", "failed"]


@dataclass(frozen=True)
class ModelCard:
    """A model as `/v1/models` shows it."""

    id: str
    created: int
    owned_by: str
    state: State


class LeaseOwner(Protocol):
    """Who is told when a lease ends; the registry."""

    def now(self) -> float:
        """By the clock that `Loaded.last_used` has."""

    def something_changed(self) -> None:
        """A lease has ended."""


@final
class Lease:
    """A model in use: it stays in memory until the lease is released, at the latest by the end of its `async with` block.

    name: the model's own, whatever alias a request used. adapter: the name of the one that a request means; "none" for the
    model itself, where it has any.
    """

    def __init__(self, lender: LeaseOwner, name: str, loaded: Loaded) -> None:
        self.name = name
        self.adapter: str | None = None
        self._lender = lender
        self._loaded: Loaded | None = loaded
        self._loop = asyncio.get_running_loop()
        loaded.num_leases += 1

    @property
    def engine(self) -> Engine:
        return self._held.engine

    @property
    def model(self) -> Model:
        return self._held.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._held.tokenizer

    @property
    def prefix_cache(self) -> PrefixCache:
        """Of all requests to this model."""
        return self._held.prefix_cache

    @property
    def plan(self) -> MemoryPlan | None:
        return self._held.plan

    def release(self) -> None:
        """The model may be given back. May be called again."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.num_leases -= 1
            loaded.last_used = self._lender.now()
            self._lender.something_changed()

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_loaded", None) is not None:  # forgotten; perhaps in another thread
            with contextlib.suppress(RuntimeError):  # of a loop that has been closed
                self._loop.call_soon_threadsafe(self.release)

    @property
    def _held(self) -> Loaded:
        assert self._loaded is not None, "the lease has been released"
        return self._loaded


@dataclass
class Slot:
    """The place of one model.

    waiting: who is told when it is in memory. is_preloaded: it is loaded although nobody waits. needs_memory: others are in
    use that would have to leave first. is_leaving: another model needs its memory. dead: engines that have died, and hold
    their memory still.
    """

    served: ServedModel
    state: State = "unloaded"
    loaded: Loaded | None = None
    dead: list[Loaded] = field(default_factory=list)
    waiting: deque[asyncio.Future[Lease]] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    is_leaving: bool = False
    is_preloaded: bool = False
    needs_memory: bool = False
    failure: str | None = None
    progress: tuple[int, int] | None = None
    began: float = 0.0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return self.is_preloaded or any(not each.done() for each in self.waiting)

    @property
    def has_died(self) -> bool:
        """Whether its engine has, and nobody has noticed yet."""
        return self.loaded is not None and self.loaded.failure is not None

    def hand_out(self, lender: LeaseOwner) -> None:
        """Everybody who waited gets a lease at once: nobody can take the model away between."""
        assert self.loaded is not None
        for waiter in self._take_waiting():
            waiter.set_result(Lease(lender, self.served.name, self.loaded))

    def refuse(self, make_error: Callable[[], ApiError]) -> None:
        """Everybody who waited gets an error."""
        for waiter in self._take_waiting():
            waiter.set_exception(make_error())

    def _take_waiting(self) -> list[asyncio.Future[Lease]]:
        found = [waiter for waiter in self.waiting if not waiter.done()]
        self.waiting.clear()
        return found

    def note_progress(self, done: int, total: int) -> None:
        """Called by a download, from its thread."""
        self.progress = (done, total)

    def card(self, name: str) -> ModelCard:
        """The model by one of its names."""
        return ModelCard(name, self.served.created, self.served.owned_by, self.state)

    def status(self, now: float) -> dict[str, Any]:
        """How it is, as `/health` shows it. now: by the clock that `began` has."""
        found: dict[str, Any] = {"id": self.served.name, "state": self.state}
        if self.failure is not None:
            found["error"] = self.failure
        if self.state == "loading":
            found["seconds"] = round(now - self.began, 1)
            if self.progress is not None:
                found["downloaded"], found["total"] = self.progress
        loaded = self.loaded
        if loaded is None:
            return found
        engine, plan = loaded.engine, loaded.plan
        found |= {
            "running": engine.num_running, "waiting": engine.num_waiting, "held_bytes": engine.held_bytes,
            "kept_bytes": loaded.prefix_cache.nbytes, "family": loaded.model.spec.family,
            "context_length": loaded.model.context_length, "has_chat": loaded.tokenizer is not None,
        }  # fmt: skip
        if plan is not None:
            found["plan"] = {
                "weights_bytes": plan.weights_bytes, "kv_cache_bytes": plan.kv_cache_bytes,
                "scratch_bytes": plan.scratch_bytes, "total_bytes": plan.total_bytes, "memory_limit": plan.memory_limit,
                "context_length": plan.context_length, "max_context_length": plan.max_context_length,
                "expert_slots": plan.expert_slots,
            }  # fmt: skip
        return found
