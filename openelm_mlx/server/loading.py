"""What is done with a model in threads of their own: it is planned, read and given back.

The arithmetic of several models in one memory is here, too: every model's plan was made for the whole of the memory, and
an engine counts what it may use by itself. Beside others it is told what those may still need (`OtherModels`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final

from ..errors import EngineClosedError

if TYPE_CHECKING:
    from ..decoding.prefix_cache import PrefixCache
    from ..engine.many import Engine
    from ..hub import Progress
    from ..loading import Prepared
    from ..memory.plan_types import MemoryPlan
    from ..models import Model
    from ..text.tokenizer import Tokenizer
    from .settings import ServedModel, ServerSettings

T = TypeVar("T")

# The name of threads that load, and that nobody waits for when the server ends.
THREAD = "openelm_mlx loading"


@final
class Loaded:
    """A model in memory, with its engine. last_used: by the registry's clock. num_leases: who uses it now."""

    def __init__(
        self, name: str, model: Model, tokenizer: Tokenizer | None, engine: Engine, prefix_cache: PrefixCache
    ) -> None:
        self.name = name
        self.last_used = 0.0
        self.num_leases = 0
        self._parts: tuple[Model, Tokenizer | None, Engine, PrefixCache] | None = (
            model, tokenizer, engine, prefix_cache,
        )  # fmt: skip

    @property
    def model(self) -> Model:
        return self._there[0]

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._there[1]

    @property
    def engine(self) -> Engine:
        return self._there[2]

    @property
    def prefix_cache(self) -> PrefixCache:
        return self._there[3]

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan that it was loaded by."""
        from ..runtime import runtime_of

        return runtime_of(self.model).plan

    @property
    def failure(self) -> str | None:
        """Why it has to be loaded again, if it has to."""
        from ..runtime import runtime_of

        error = self.engine.failure
        return runtime_of(self.model).failure if error is None else f"{type(error).__name__}: {error}"

    def emptied(self) -> Loaded:
        """All that it holds, held by another: whoever still has this one keeps nothing in memory."""
        there, self._parts = self._there, None
        return Loaded(self.name, *there)

    @property
    def _there(self) -> tuple[Model, Tokenizer | None, Engine, PrefixCache]:
        if self._parts is None:
            raise EngineClosedError(f"{self.name} has been given back: ask again.")
        return self._parts


@final
class OtherModels:
    """The other models' part of the memory, as one engine sees it. Read by the engine's thread."""

    def __init__(self, others: Sequence[Loaded], extra: int) -> None:
        self._engines = [each.engine for each in others]
        plans = [each.plan for each in others]
        self._needs = [0 if plan is None else plan.kv_cache_bytes for plan in plans]
        self._always = extra + sum(0 if plan is None else plan.scratch_bytes for plan in plans)
        self._takes = extra + sum(0 if plan is None else plan.total_bytes for plan in plans)
        self.stores: Sequence[PrefixCache] = [each.prefix_cache for each in others]

    def takes(self) -> int:
        """All bytes that they may use: weights, requests and computing."""
        return self._takes

    def reserved(self) -> int:
        """Of those, what is not in use now."""
        held = (max(0, need - engine.held_bytes) for need, engine in zip(self._needs, self._engines, strict=True))
        return self._always + sum(held)

    def are_computing(self) -> bool:
        """Whether what is seen of MLX's memory may be theirs."""
        return any(engine.num_running for engine in self._engines)


class Loader:
    """Loads and gives back models as the settings say. Every method may be slow, and is called from a thread of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        import mlx.core as mx

        self._settings = settings
        # What the program had in memory before, and keeps.
        self._others = mx.get_active_memory()

    def prepare(self, served: ServedModel, progress: Progress) -> Prepared:
        """The model's plan, for all the memory that this process may use, and all else but its tensors."""
        from ..loading import prepare
        from ..memory.machine import own_machine

        options: dict[str, Any] = {**self._settings.load_options, **served.options}
        return prepare(served.source, progress=progress, machine=own_machine(), **options)

    def read(self, served: ServedModel, prepared: Prepared) -> Loaded:
        """The model with its tensors, and an engine that answers."""
        from ..decoding.prefix_cache import PrefixCache
        from ..engine.many import Engine

        model, tokenizer = prepared.read()
        engine = Engine(model, tokenizer, self._settings.max_running, self._settings.max_waiting)
        return Loaded(served.name, model, tokenizer, engine, PrefixCache())

    def give_back(self, loaded: Loaded) -> None:
        """End the engine and free all of its memory. `loaded` must be the only one who has it."""
        from ..memory.machine import give_back_freed

        engine, prefix_cache = loaded.engine, loaded.prefix_cache
        engine.close()
        prefix_cache.clear()
        loaded.emptied()
        del engine, prefix_cache
        gc.collect()  # compiled pieces and their model know each other
        give_back_freed()

    def fits(self, plan: MemoryPlan | None, others: Sequence[Loaded]) -> bool:
        """Whether a model of this plan fits beside the others, each with the requests that its plan speaks of."""
        plans = [each.plan for each in others if each.plan is not None]
        if plan is None or not plans:
            return True
        needed = plan.process_bytes + sum(each.total_bytes + own_bytes(each) for each in plans)
        return self._others + needed <= plan.memory_limit

    def forget_kept(self, plan: MemoryPlan | None, others: Sequence[Loaded]) -> None:
        """Forget kept prefixes of others until there is room for the weights of a model of this plan."""
        import mlx.core as mx

        if plan is None:
            return
        for store in (each.prefix_cache for each in others):
            while mx.get_active_memory() + plan.total_bytes > plan.budget_bytes and store.forget_oldest():
                mx.clear_cache()

    def share(self, loaded: Sequence[Loaded]) -> None:
        """Tell each engine of the others."""
        for each in loaded:
            others = [other for other in loaded if other is not each]
            extra = sum(own_bytes(other.plan) for other in others if other.plan is not None)
            each.engine.share_memory(OtherModels(others, extra) if others else None)


def own_bytes(plan: MemoryPlan) -> int:
    """What a model takes beside MLX's memory: its tokenizer. The process and MLX's buffer cache are there once for all."""
    from ..memory.plan import process_bytes

    shared = plan.cache_limit_bytes + (0 if plan.machine is None else process_bytes(plan.machine))
    return max(0, plan.memory_limit - plan.budget_bytes - shared)


async def in_thread(work: Callable[[], T], uses_mlx: bool = True) -> T:
    """What `work` gives, computed in a new thread, whose streams of MLX end with it if it uses MLX.

    The thread is not waited for when the task is cancelled, and its result is dropped then.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as failure:  # noqa: BLE001  (whoever waits is told)
            # The frames of its traceback would keep what was read so far.
            error = failure.with_traceback(None) if uses_mlx else failure
        if uses_mlx:
            from ..memory.limits import end_streams

            end_streams()
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    return await future


def is_still_loading() -> bool:
    """Whether a thread is at work that cannot be stopped: the process must not take itself apart under it."""
    return any(thread.name == THREAD for thread in threading.enumerate())
