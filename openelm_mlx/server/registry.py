"""The models of a server: by which names requests find them, and which of them are in memory when.

Everything here belongs to the event loop's thread, so that there are no locks. Loading a model, and giving it back, are
done in threads of their own, one model at a time. Read `acquire` first, then `_load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final

from ..errors import UserError
from ..models.adapter_sets import NO_ADAPTER
from .failures import ApiError
from .loading import Loaded, Loader, in_thread
from .log import log
from .names import Names
from .settings import ServerSettings
from .slots import Lease, ModelCard, Slot

if TYPE_CHECKING:
    from ..memory.plan_types import MemoryPlan

# Seconds after which a client that was refused because of a model's loading may ask again.
RETRY_AFTER_LOADING = 10
# Seconds between two looks at who is idle, and who has died.
LOOK_EVERY = 1.0
# A dead engine's requests have all been told; whoever still holds a lease of it by then has lost it.
DEAD_LEASES_WAIT = 10.0


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
        self._slots = {each.name: Slot(each) for each in settings.models}
        self._loader = Loader(settings) if loader is None else loader
        self._clock = clock
        self._turn = asyncio.Lock()
        self._changed: asyncio.Event = asyncio.Event()
        self._is_closing = False
        self._housekeeping: asyncio.Task[None] | None = None
        # Nothing is loaded before this is done. Loading imports much, and two threads that import packages whose modules
        # need each other may find them half made.
        self.load_after: asyncio.Future[Any] | None = None
        # Why the first model could not be loaded.
        self.startup_failure: asyncio.Future[str] | None = None

    @property
    def _first(self) -> Slot:
        """The model that is loaded at the start."""
        return next(iter(self._slots.values()))

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self) -> list[ModelCard]:
        """All models, in the order of the command line, then their adapters, and the aliases that somebody has asked for."""
        cards = [slot.card(name) for name, slot in self._slots.items()]
        cards += [self._slots[model].card(name) for name, (model, _) in self._names.adapters.items()]
        return cards + [self._slot(name).card(alias) for alias, name in self._names.aliases.items()]

    def card(self, name: str) -> ModelCard:
        """The card of one model or alias. Raises ApiError, a 404."""
        return self._slot(name).card(name)

    def _slot(self, name: str) -> Slot:
        return self._found(name)[0]

    def _found(self, name: str) -> tuple[Slot, str | None]:
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
        if any(slot.dead or slot.has_died for slot in slots):
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
            "models": [slot.status(self._clock()) for slot in self._slots.values()],
            "aliases": dict(self._names.aliases),
            "memory": {
                "used_bytes": mx.get_active_memory(),
                "cached_bytes": mx.get_cache_memory(),
                "limit_bytes": limit or 0,
            },
        }

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

    async def _acquired(self, slot: Slot) -> Lease:
        if self._is_closing:
            raise _closing()
        if slot.has_died:
            self._retire_engine(slot)
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

    def _forget(self, slot: Slot, waiter: asyncio.Future[Lease]) -> None:
        """Whoever waited has gone."""
        if waiter.done():
            if not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            return
        waiter.cancel()
        with contextlib.suppress(ValueError):
            slot.waiting.remove(waiter)
        self.something_changed()

    def _why_not(self, slot: Slot) -> str:
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
        self._housekeeping = asyncio.create_task(self._maintain())
        self._first.is_preloaded = True
        self._begin_loading(self._first)

    async def close(self) -> None:
        """Give everything back. Who waits is told, and running requests end."""
        self._is_closing = True
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        if self._housekeeping is not None:
            tasks.append(self._housekeeping)
        for slot in self._slots.values():
            slot.is_preloaded = False
            slot.refuse(_closing)
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

    def _begin_loading(self, slot: Slot) -> None:
        if slot.task is None or slot.task.done():
            slot.task = asyncio.create_task(self._load(slot))

    async def _load(self, slot: Slot) -> None:
        """Bring a model into memory, and hand it to whoever waits; those who wait are told what went wrong."""
        try:
            async with self._turn:
                if slot.loaded is not None:  # it was to leave for another model, and has stayed
                    slot.hand_out(self)
                    return
                slot.state, slot.began, slot.progress = "loading", self._clock(), None
                if self.load_after is not None:
                    await asyncio.wait([self.load_after])
                await self._close_retired(slot)
                name = slot.served.name
                prepared = await in_thread(partial(self._loader.prepare, slot.served, slot.note_progress))
                await self._make_room(slot, prepared.plan)
                slot.loaded = await in_thread(partial(self._loader.read, slot.served, prepared))
                del prepared
                slot.loaded.last_used = self._clock()
                slot.state, slot.failure, slot.is_preloaded = "ready", None, False
                self._share_memory()
                log.info("%s is loaded (%.1f s)", name, self._clock() - slot.began)
                slot.hand_out(self)
        except _Unwanted:
            slot.state = "unloaded"
        except asyncio.CancelledError:
            slot.state = "unloaded"
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, those who wait are told)
            self._failed(slot, error)

    def _failed(self, slot: Slot, error: Exception) -> None:
        name = slot.served.name
        is_users = isinstance(error, UserError)
        reason = str(error) if is_users else f"{type(error).__name__}: {error}"
        if not is_users:
            log.error("%s could not be loaded", name, exc_info=error)
        else:
            log.error("%s could not be loaded: %s", name, reason)
        slot.state, slot.failure = "failed", reason
        if self.startup_failure is not None and not self.startup_failure.done() and slot is self._first:
            self.startup_failure.set_result(reason)
        slot.is_preloaded = False
        slot.refuse(lambda: ApiError(
            503, f"{name} could not be loaded: {reason}", "server_error", code="model_load_failed",
            retry_after=RETRY_AFTER_LOADING,
        ))  # fmt: skip

    # --- memory -------------------------------------------------------------------------------------------------------

    async def _make_room(self, slot: Slot, plan: MemoryPlan | None) -> None:
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

    def _wake(self, slot: Slot) -> None:
        """Who waited because the model was to leave gets it, if it has stayed."""
        if slot.loaded is not None and slot.state == "ready":
            slot.hand_out(self)
        else:
            self._begin_loading(slot)

    def _victims(self, slot: Slot, plan: MemoryPlan | None) -> list[Slot]:
        """Who has to leave so that a model of this plan fits: those not in use first, the least recently used first."""
        holders = {each.loaded: each for each in self._slots.values() if each.loaded is not None and each is not slot}
        others = sorted(holders, key=lambda loaded: (loaded.num_leases > 0, loaded.last_used))
        victims = []
        while others and not self._loader.fits(plan, others):
            victims.append(holders[others.pop(0)])
        return victims

    async def _give_back(self, slot: Slot) -> None:
        """A model leaves the memory."""
        loaded, slot.loaded = slot.loaded, None
        await self._close_retired(slot)
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

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self.replace_and_unload()
            except Exception:  # noqa: BLE001  (the next look may do better)
                log.exception("looking after the models failed")

    async def replace_and_unload(self) -> None:
        """Replace engines that have died, and give back models that nobody has used for long."""
        for slot in self._slots.values():
            if slot.has_died:
                self._retire_engine(slot)
                slot.is_preloaded = True
                self._begin_loading(slot)
            elif self._is_idle(slot):
                async with self._turn:
                    if self._is_idle(slot):
                        log.info("%s is given back: nobody has used it for a while", slot.served.name)
                        await self._give_back(slot)

    def _is_idle(self, slot: Slot) -> bool:
        loaded, keep_alive = slot.loaded, self.settings.keep_alive
        if loaded is None or loaded.num_leases or keep_alive is None or slot.waiting:
            return False
        return bool(self._clock() - loaded.last_used >= keep_alive)

    def _retire_engine(self, slot: Slot) -> None:
        """An engine has died: nobody gets it any more."""
        assert slot.loaded is not None
        log.error("the engine of %s has died and is started anew: %s", slot.served.name, slot.loaded.failure)
        slot.failure = slot.loaded.failure
        slot.dead.append(slot.loaded)
        slot.loaded, slot.state = None, "failed"

    async def _close_retired(self, slot: Slot) -> None:
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


def _closing() -> ApiError:
    return ApiError(
        503, "The server is being shut down.", "server_error", code="shutting_down", retry_after=RETRY_AFTER_LOADING
    )
