"""The models of a server: which names there are, which of them are in memory, and who uses them now.

Everything here belongs to the event loop's thread, so that there are no locks. Loading a model, and giving it back, are
done in threads of their own, one model at a time. Read `acquire` first, then `_load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final

from ..errors import UserError
from ..models.adapter_sets import NO_ADAPTER
from .failures import ApiError
from .loading import Loaded, Loader, in_thread
from .log import log
from .names import Names
from .settings import ServedModel, ServerSettings

if TYPE_CHECKING:
    from ..decoding.prefix_cache import PrefixCache
    from ..engine.many import Engine
    from ..memory.plan_types import MemoryPlan
    from ..models import Model
    from ..text.tokenizer import Tokenizer

State = Literal["unloaded", "loading", "ready", "failed"]

# Seconds after which a client that was refused because of a model's loading may ask again.
RETRY_AFTER_LOADING = 10
# Seconds between two looks at who is idle, and who has died.
LOOK_EVERY = 1.0
# A dead engine's requests have all been told; whoever still holds a lease of it by then has lost it.
DEAD_LEASES_WAIT = 10.0


@dataclass(frozen=True)
class ModelCard:
    """A model as `/v1/models` shows it."""

    id: str
    created: int
    owned_by: str
    state: State


@final
class Lease:
    """A model in use: it stays in memory until the lease is released, at the latest by the end of its `async with` block.

    name: the model's own, whatever alias a request used. adapter: the name of the one that a request means; "none" for the
    model itself, where it has any.
    """

    def __init__(self, registry: Registry, name: str, loaded: Loaded) -> None:
        self.name = name
        self.adapter: str | None = None
        self._registry: Registry = registry
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
            loaded.last_used = self._registry.now()
            self._registry.something_changed()

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
class _Slot:
    """One name.

    waiting: who is told when it is in memory. is_preloaded: it is loaded although nobody waits. needs_memory: others are in
    use that would have to leave first. is_leaving: another model needs its memory.
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


class _Unwanted(Exception):
    """Everybody who had asked for a model has gone."""


@final
class Registry:
    """The models that the settings name; none of them is in memory before `start`, or before somebody asks for it.

        async with await registry.acquire("openai/gpt-oss-20b") as lease:
            handle = lease.engine.submit(messages, prefix_cache=lease.prefix_cache)

    loader, clock: can be injected.
    """

    def __init__(self, settings: ServerSettings, loader: Loader | None = None, clock: Any = time.monotonic) -> None:
        self.settings = settings
        self._names = Names(settings.models, settings.aliases)
        self._slots = {each.name: _Slot(each) for each in settings.models}
        self._loader = Loader(settings) if loader is None else loader
        self._clock = clock
        self._turn = asyncio.Lock()
        self._changed: asyncio.Event = asyncio.Event()
        self._is_closing = False
        self._housekeeping: asyncio.Task[None] | None = None
        # Nothing is loaded before this is done. Loading imports much, and two threads that import packages whose modules
        # need each other may find them half made.
        self.load_after: asyncio.Future[Any] | None = None
        # Why the first model cannot be served, if it is the only one.
        self.startup_failure: asyncio.Future[str] | None = None

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self) -> list[ModelCard]:
        """All models, in the order of the command line, then their adapters, and the aliases that somebody has asked for."""
        cards = [self._card(name, slot) for name, slot in self._slots.items()]
        cards += [self._card(name, self._slots[model]) for name, (model, _) in self._names.adapters.items()]
        return cards + [self._card(alias, self._slot(name)) for alias, name in self._names.aliases.items()]

    def card(self, name: str) -> ModelCard:
        """The card of one model or alias. Raises ApiError, a 404."""
        return self._card(name, self._slot(name))

    def resolve(self, name: str) -> str:
        """The model's own name. Raises ApiError, a 404."""
        return self._slot(name).served.name

    def _card(self, name: str, slot: _Slot) -> ModelCard:
        return ModelCard(name, slot.served.created, slot.served.owned_by, slot.state)

    def _slot(self, name: str) -> _Slot:
        return self._found(name)[0]

    def _found(self, name: str) -> tuple[_Slot, str | None]:
        found = self._names.find(name)
        if found is None:
            known = ", ".join(self._slots)
            raise ApiError(
                404, f"There is no model {name[:200]!r} here: this server has {known}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        return self._slots[found[0]], found[1]

    # --- how it is ----------------------------------------------------------------------------------------------------

    def health(self) -> Literal["ok", "loading", "failed", "dead"]:
        """Whether requests can be answered.

        dead: an engine has died, and is not replaced yet. failed: nothing is in memory, and the last model that was asked for
        could not be loaded; the next request tries again. loading: nothing is in memory yet.
        """
        slots = list(self._slots.values())
        if any(slot.dead or (slot.loaded is not None and slot.loaded.failure is not None) for slot in slots):
            return "dead"
        states = {slot.state for slot in slots}
        if "ready" in states:
            return "ok"
        return "loading" if "loading" in states else "failed" if "failed" in states else "ok"

    def status(self) -> dict[str, Any]:
        """Every model with its state, plan and load, and the memory; sizes in bytes."""
        import mlx.core as mx

        plans = [loaded.plan for loaded in self._all_loaded()]
        limit = max(
            (plan.memory_limit for plan in plans if plan is not None),
            default=self.settings.load_options.get("memory_limit"),
        )
        return {
            "models": [self._status_of(name, slot) for name, slot in self._slots.items()],
            "aliases": dict(self._names.aliases),
            "memory": {
                "used_bytes": mx.get_active_memory(),
                "cached_bytes": mx.get_cache_memory(),
                "limit_bytes": limit or 0,
            },
        }

    def _status_of(self, name: str, slot: _Slot) -> dict[str, Any]:
        found: dict[str, Any] = {"id": name, "state": slot.state}
        if slot.failure is not None:
            found["error"] = slot.failure
        if slot.state == "loading":
            found["seconds"] = round(self._clock() - slot.began, 1)
            if slot.progress is not None:
                found["downloaded"], found["total"] = slot.progress
        loaded = slot.loaded
        if loaded is not None:
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

    # --- using a model ------------------------------------------------------------------------------------------------

    async def acquire(self, name: str) -> Lease:
        """The model of that name, in memory until the lease is released; loaded first, where it is not there.

        Raises ApiError: 404 for an unknown name; 503, with a time after which to ask again, when it cannot be loaded, or
        when that takes longer than a request waits.
        """
        slot, adapter = self._found(name)
        lease = await self._acquired(slot)
        lease.adapter = adapter or (NO_ADAPTER if slot.served.adapters else None)
        return lease

    async def _acquired(self, slot: _Slot) -> Lease:
        if self._is_closing:
            raise _closing()
        if slot.loaded is not None and slot.loaded.failure is not None:
            self._bury(slot)
        if slot.loaded is not None and not slot.is_leaving:
            return Lease(self, slot.served.name, slot.loaded)
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        slot.waiting.append(waiter)
        self._begin_loading(slot)
        try:
            await asyncio.wait([waiter], timeout=self.settings.load_wait)
        except asyncio.CancelledError:
            self._forget(slot, waiter)
            raise
        if not waiter.done():
            self._forget(slot, waiter)
            raise ApiError(
                503, f"{slot.served.name} is not in memory yet: {self._why_not(slot)}. Ask again in a while.",
                "server_error", code="model_loading", retry_after=RETRY_AFTER_LOADING,
            )  # fmt: skip
        return waiter.result()

    def _forget(self, slot: _Slot, waiter: asyncio.Future[Lease]) -> None:
        """Whoever waited has gone."""
        if waiter.done():
            if not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            return
        waiter.cancel()
        with contextlib.suppress(ValueError):
            slot.waiting.remove(waiter)
        self.something_changed()

    def _why_not(self, slot: _Slot) -> str:
        if slot.needs_memory:
            return "others are being used, and there is no memory for one more"
        if slot.state != "loading":
            return "another one is being loaded"
        if slot.progress is None:
            return "it is being loaded"
        done, total = slot.progress
        return f"{100 * done // max(1, total)} % of it have been downloaded"

    # --- loading ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with the first model, and look after idle ones. Within the event loop; may be called again."""
        if self._housekeeping is not None:
            return
        self.startup_failure = asyncio.get_running_loop().create_future()
        self._housekeeping = asyncio.create_task(self._look_after())
        for slot in list(self._slots.values())[:1]:
            slot.is_preloaded = True
            self._begin_loading(slot)

    async def close(self) -> None:
        """Give everything back. Who waits is told, and running requests end."""
        self._is_closing = True
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        if self._housekeeping is not None:
            tasks.append(self._housekeeping)
        for slot in self._slots.values():
            slot.is_preloaded = False
            self._tell(slot, _closing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self._slots.values():
            await self._give_back(slot)

    async def __aenter__(self) -> Registry:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _begin_loading(self, slot: _Slot) -> None:
        if slot.task is None or slot.task.done():
            slot.task = asyncio.create_task(self._load(slot))

    async def _load(self, slot: _Slot) -> None:
        """Bring a model into memory, and hand it to whoever waits; those who wait are told what went wrong."""
        try:
            async with self._turn:
                if slot.loaded is not None:  # it was to leave for another model, and has stayed
                    self._hand_out(slot)
                    return
                slot.state, slot.began, slot.progress = "loading", self._clock(), None
                if self.load_after is not None:
                    await asyncio.wait([self.load_after])
                await self._bury_dead(slot)
                name = slot.served.name
                prepared = await in_thread(partial(self._loader.prepare, slot.served, partial(_note, slot)))
                await self._make_room(slot, prepared.plan)
                slot.loaded = await in_thread(partial(self._loader.read, slot.served, prepared))
                del prepared
                slot.loaded.last_used = self._clock()
                slot.state, slot.failure, slot.is_preloaded = "ready", None, False
                self._share_memory()
                log.info("%s is loaded (%.1f s)", name, self._clock() - slot.began)
                self._hand_out(slot)
        except _Unwanted:
            slot.state = "unloaded"
        except asyncio.CancelledError:
            slot.state = "unloaded"
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, those who wait are told)
            self._failed(slot, error)

    def _failed(self, slot: _Slot, error: Exception) -> None:
        name = slot.served.name
        is_users = isinstance(error, UserError)
        reason = str(error) if is_users else f"{type(error).__name__}: {error}"
        if not is_users:
            log.error("%s could not be loaded", name, exc_info=error)
        else:
            log.error("%s could not be loaded: %s", name, reason)
        slot.state, slot.failure = "failed", reason
        first = next(iter(self._slots.values()))
        if self.startup_failure is not None and not self.startup_failure.done() and slot is first:
            self.startup_failure.set_result(reason)
        slot.is_preloaded = False
        self._tell(slot, lambda: ApiError(
            503, f"{name} could not be loaded: {reason}", "server_error", code="model_load_failed",
            retry_after=RETRY_AFTER_LOADING,
        ))  # fmt: skip

    def _hand_out(self, slot: _Slot) -> None:
        """Everybody who waited gets a lease at once: nobody can take the model away between."""
        assert slot.loaded is not None
        while slot.waiting:
            waiter = slot.waiting.popleft()
            if not waiter.done():
                waiter.set_result(Lease(self, slot.served.name, slot.loaded))

    def _tell(self, slot: _Slot, make_error: Any) -> None:
        while slot.waiting:
            waiter = slot.waiting.popleft()
            if not waiter.done():
                waiter.set_exception(make_error())

    # --- memory -------------------------------------------------------------------------------------------------------

    async def _make_room(self, slot: _Slot, plan: MemoryPlan | None) -> None:
        """Give back the least recently used models until this one fits beside the others. Raises _Unwanted."""
        try:
            while True:
                if not slot.is_wanted:
                    raise _Unwanted
                self._changed.clear()
                victims = self._victims(slot, plan)
                for each in self._slots.values():
                    each.is_leaving = each in victims
                idle = [each for each in victims if each.loaded is not None and not each.loaded.num_leases]
                if not victims:
                    break
                for each in idle:
                    log.info("%s is given back: %s needs its memory", each.served.name, slot.served.name)
                    await self._give_back(each)
                if not idle:
                    slot.needs_memory = True
                    await self._changed.wait()
        finally:
            slot.needs_memory = False
            for each in self._slots.values():
                each.is_leaving = False
                if each.waiting and each is not slot:
                    self._wake(each)
        await in_thread(partial(self._loader.forget_kept, plan, self._all_loaded()))

    def _wake(self, slot: _Slot) -> None:
        """Who waited because the model was to leave gets it, if it has stayed."""
        if slot.loaded is not None and slot.state == "ready":
            self._hand_out(slot)
        else:
            self._begin_loading(slot)

    def _victims(self, slot: _Slot, plan: MemoryPlan | None) -> list[_Slot]:
        """Who has to leave so that a model of this plan fits: those not in use first, the least recently used first."""
        others = [each for each in self._slots.values() if each.loaded is not None and each is not slot]
        others.sort(
            key=lambda each: (each.loaded.num_leases > 0, each.loaded.last_used) if each.loaded else (False, 0.0)
        )
        victims: list[_Slot] = []
        while others and not self._loader.fits(plan, [each.loaded for each in others if each.loaded is not None]):
            victims.append(others.pop(0))
        return victims

    async def _give_back(self, slot: _Slot) -> None:
        """A model leaves the memory."""
        loaded, slot.loaded = slot.loaded, None
        await self._bury_dead(slot)
        if loaded is not None:
            slot.state = "unloaded"
            self._share_memory()
            await in_thread(partial(self._loader.give_back, loaded.emptied()))

    def _share_memory(self) -> None:
        """Tell every engine of the others' needs."""
        self._loader.share(self._all_loaded())

    def _all_loaded(self) -> list[Loaded]:
        return [slot.loaded for slot in self._slots.values() if slot.loaded is not None]

    # --- looking after them -------------------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self.look_after()
            except Exception:  # noqa: BLE001  (the next look may do better)
                log.exception("looking after the models failed")

    async def look_after(self) -> None:
        """Replace engines that have died, and give back models that nobody has used for long."""
        for slot in self._slots.values():
            if slot.loaded is not None and slot.loaded.failure is not None:
                self._bury(slot)
                slot.is_preloaded = True
                self._begin_loading(slot)
            elif self._is_idle(slot):
                async with self._turn:
                    if self._is_idle(slot):
                        log.info("%s is given back: nobody has used it for a while", slot.served.name)
                        await self._give_back(slot)

    def _is_idle(self, slot: _Slot) -> bool:
        loaded, keep_alive = slot.loaded, self.settings.keep_alive
        if loaded is None or loaded.num_leases or keep_alive is None or slot.waiting:
            return False
        return bool(self._clock() - loaded.last_used >= keep_alive)

    def _bury(self, slot: _Slot) -> None:
        """An engine has died: nobody gets it any more."""
        assert slot.loaded is not None
        log.error("the engine of %s has died and is started anew: %s", slot.served.name, slot.loaded.failure)
        slot.failure = slot.loaded.failure
        slot.dead.append(slot.loaded)
        slot.loaded, slot.state = None, "failed"

    async def _bury_dead(self, slot: _Slot) -> None:
        while slot.dead:
            until = self._clock() + DEAD_LEASES_WAIT
            while slot.dead[0].num_leases and self._clock() < until:
                self._changed.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.1)
            await in_thread(partial(self._loader.give_back, slot.dead.pop(0).emptied()))

    def something_changed(self) -> None:
        """A lease has ended, or nobody waits for a model any more."""
        self._changed.set()

    def now(self) -> float:
        """By the registry's clock."""
        return float(self._clock())


def _note(slot: _Slot, done: int, total: int) -> None:
    """Called by a download, from its thread."""
    slot.progress = (done, total)


def _closing() -> ApiError:
    return ApiError(
        503, "The server is being shut down.", "server_error", code="shutting_down", retry_after=RETRY_AFTER_LOADING
    )
