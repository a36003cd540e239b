"""MLX's process-wide settings, managed in one place: the wired limit, the cache limit and the peak counter.

A request holds a lease of them while it generates (`generating`). They are changed only while the GPU is idle and restored
when the last request ends, however it ends. A value that the program itself has set is left alone and reported.
The wired limit stays longer: from a model's first request until the model is deleted. Each change of it moves every buffer
into Metal's residency set or out of it, and macOS 26 was reported to panic when that was done for every request, with two
requests running (mlx#3186).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import mlx.core as mx

# The larger of these always stays unwired: Macs that wired their whole working set froze or restarted (vmlx-swift#421).
UNWIRED_BYTES = 4_000_000_000
UNWIRED_SHARE = 0.25


def wired_limit(wanted: int, device_info: Mapping[str, Any]) -> int:
    """How many of the `wanted` bytes may be wired on the device; 0 if MLX cannot wire memory there.

    A limit above `max_recommended_working_set_size` is an error in MLX, and one near the whole memory takes it from
    the rest of the system.
    """
    recommended, memory = device_info.get("max_recommended_working_set_size"), device_info.get("memory_size")
    if not recommended or not memory:
        return 0
    return max(0, min(wanted, recommended, memory - int(max(UNWIRED_BYTES, UNWIRED_SHARE * memory))))


class PlannedLimits(Protocol):
    """What the settings follow from: a `MemoryPlan`, or training's."""

    @property
    def wired_limit_bytes(self) -> int:
        """0: nothing is wired."""

    @property
    def cache_limit_bytes(self) -> int:
        """0: MLX's own limit stays."""


class LimitsLease:
    """One request's hold on the process-wide settings, from `generating`.

    notes: sentences about settings that the program had set itself and that were left alone.
    """

    def __init__(self, limits: ProcessLimits, plan: PlannedLimits | None, stream: Any) -> None:
        self.plan, self.stream, self.thread = plan, stream, threading.get_ident()
        self.notes: list[str] = []
        # High-water marks: of the request, and since `lap`.
        self.peak = self.lap_peak = 0
        self._limits = limits

    def peak_memory_bytes(self) -> int:
        """MLX's peak memory since the request began."""
        self._limits.read_peak()
        return self.peak

    def lap(self) -> int:
        """The peak memory since the last call (or the beginning); starts a new count."""
        return self._limits.lap(self)


class Setting:
    """One process-wide number that a single MLX call sets, returning the previous value.

    is_default: whether a value found there is MLX's own default. is_costly: reading it is expensive, since it has to be set;
    so the program's own value is read only once.
    """

    def __init__(
        self, name: str, call: Callable[[int], int], is_default: Callable[[int], bool], is_costly: bool = False
    ) -> None:
        self.name, self._call, self._is_default, self._is_costly = name, call, is_default, is_costly
        self.ours: int | None = None
        self._original = 0
        self._theirs: int | None = None

    def hold(self, value: int) -> str | None:
        """Set `value`, unless the program has set its own: then that stays, and a sentence about it is returned."""
        if value == self.ours:
            return None
        if self._theirs is not None and self._is_costly:
            return self._left_as(self._theirs, value)
        found = self._call(value)
        if found == self.ours or (self.ours is None and self._is_default(found)):
            self._original = found if self.ours is None else self._original
            self.ours = value
            return None
        self._call(found)
        self.ours, self._theirs = None, found
        return self._left_as(found, value)

    def _left_as(self, found: int, value: int) -> str:
        return f"The {self.name} of {found:,} bytes that this program set was left as it is; the plan's is {value:,} bytes."

    def put_back(self) -> None:
        """Restore the previous value, unless the program has set something else meanwhile."""
        if self.ours is None:
            return
        found = self._call(self._original)
        if found != self.ours:
            self._call(found)
        self.ours = None


class ProcessLimits:
    """The leases of all requests, and the settings that follow. `mlx` and the device's facts can be injected.

    Two models are both wired; a change waits while another thread may have work on the GPU. Every method may be called from
    any thread, and by the garbage collector in the middle of another one.
    """

    def __init__(self, mlx: Any = mx, device_info: Mapping[str, Any] | None = None) -> None:
        self._mlx, self._device_info = mlx, device_info
        self._wired = Setting("wired limit", mlx.set_wired_limit, lambda found: found == 0, is_costly=True)
        # On a GPU MLX's default cache limit is its memory limit, which is practically none; the CPU's is small enough.
        self._cache = Setting("cache limit", mlx.set_cache_limit, lambda found: found == mlx.get_memory_limit())
        self._holders: list[LimitsLease] = []
        # Bytes to wire for each plan that had a request and whose model still exists.
        self._wired_bytes: dict[int, int] = {}
        self._streams: list[Any] = []  # streams that may still run work started under the current settings
        self._lock = threading.RLock()
        self._is_settling = self._is_stale = False
        self._peak = 0

    @contextmanager
    def generating(self, plan: PlannedLimits | None) -> Iterator[LimitsLease]:
        """Hold the settings that `plan` asks for (None: only the peak counter) until the block is left."""
        lease = LimitsLease(self, plan, self._mlx.default_stream(self._mlx.default_device()))
        try:
            with self._lock:
                self.read_peak()
                self._mlx.reset_peak_memory()
                lease.peak = lease.lap_peak = self._mlx.get_active_memory()
                self._holders.append(lease)
                self._note_wiring(plan)
            self._settle()
            yield lease
        finally:
            with self._lock:
                self.read_peak()
                if lease in self._holders:
                    self._holders.remove(lease)
            self._settle()

    def _note_wiring(self, plan: PlannedLimits | None) -> None:
        if plan is not None and plan.wired_limit_bytes and id(plan) not in self._wired_bytes:
            self._wired_bytes[id(plan)] = plan.wired_limit_bytes
            # At the end of the process the system frees everything anyway.
            weakref.finalize(plan, self._forget_wiring, id(plan)).atexit = False

    def _forget_wiring(self, plan_id: int) -> None:
        with self._lock:
            del self._wired_bytes[plan_id]
        self._settle()

    def read_peak(self) -> int:
        """The peak memory since the process began, as far as counted; every lease's mark is raised to it."""
        with self._lock:
            peak = self._mlx.get_peak_memory()
            self._peak = max(self._peak, peak)
            for lease in self._holders:
                lease.peak, lease.lap_peak = max(lease.peak, peak), max(lease.lap_peak, peak)
            return self._peak

    def lap(self, lease: LimitsLease) -> int:
        """See `LimitsLease.lap`."""
        with self._lock:
            self.read_peak()
            lap_peak = lease.lap_peak
            self._mlx.reset_peak_memory()
            lease.lap_peak = self._mlx.get_active_memory()
            return lap_peak

    def _settle(self) -> None:
        """Apply the settings of the current leases, repeated until they match."""
        with self._lock:
            self._is_stale = True
            if self._is_settling:
                return  # called by a finalizer inside the loop below, which repeats then
            self._is_settling = True
            try:
                while self._is_stale:
                    self._is_stale = False
                    self._settle_once()
            finally:
                self._is_settling = False

    def _settle_once(self) -> None:
        self._streams += [lease.stream for lease in self._holders if lease.stream not in self._streams]
        if any(lease.thread != threading.get_ident() for lease in self._holders):
            return
        wired, cache = self._wanted()
        if (wired, cache) == (self._wired.ours, self._cache.ours) or not self._is_idle():
            return
        for setting, value in ((self._wired, wired), (self._cache, cache)):
            if value is None:
                setting.put_back()
            elif (note := setting.hold(value)) is not None and self._holders:
                self._holders[-1].notes.append(note)

    def _wanted(self) -> tuple[int | None, int | None]:
        """The wired limit of all models and the cache limit of the running ones; None if nothing is to be set."""
        caches = [lease.plan.cache_limit_bytes for lease in self._holders if lease.plan is not None]
        if not caches and not self._wired_bytes:
            return None, None
        info = self._mlx.device_info() if self._device_info is None else self._device_info
        # The CPU's default cache limit is only a few megabytes.
        has_gpu = "memory_size" in info or "total_memory" in info
        wired, cache = wired_limit(sum(self._wired_bytes.values()), info), max(caches, default=0) if has_gpu else 0
        return wired or None, cache or None

    def _is_idle(self) -> bool:
        """Wait until the GPU has finished our work. False if this thread cannot know that."""
        for stream in self._streams:
            try:
                self._mlx.synchronize(stream)
            except RuntimeError as error:
                if "no stream" in str(error).lower():
                    return False
                # Failed work has ended too.
        self._streams = [lease.stream for lease in self._holders]
        return True


_process_limits = ProcessLimits()
_of_thread = threading.local()


def generating(plan: PlannedLimits | None) -> AbstractContextManager[LimitsLease]:
    """A context in which the process's settings are those of `plan`; gives a `LimitsLease`. See `ProcessLimits.generating`."""
    if threading.current_thread() is not threading.main_thread() and not hasattr(_of_thread, "streams"):
        _of_thread.streams = _ThreadStreams()
    return _process_limits.generating(plan)


class _ThreadStreams:
    """Goes when its thread ends, and takes the thread's streams along."""

    def __del__(self) -> None:
        end_streams()


def end_streams() -> None:
    """End this thread's streams, before the thread ends itself.

    Each has a thread of its own. MLX would end those only while the process ends, which it often aborts.
    """
    with suppress(RuntimeError):  # of work that had failed
        mx.synchronize()
    mx.clear_streams()


def peak_memory_bytes() -> int:
    """MLX's peak memory since the process began.

    Requests reset MLX's own counter (`mx.get_peak_memory`) when they begin; this one covers all of them.
    """
    return _process_limits.read_peak()
