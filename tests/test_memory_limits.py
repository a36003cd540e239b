"""The process-wide settings against a made-up device that notes every call: who sets what, when, and who puts it back."""

import gc
import threading

import mlx.core as mx
import pytest
from conftest import random_model

from openelm_mlx.generate import stream_generate
from openelm_mlx.memory import limits
from openelm_mlx.memory.limits import ProcessLimits, wired_limit
from openelm_mlx.memory.plan_types import MemoryPlan

GB = 10**9
MAC_16 = {"device_name": "Apple M4", "max_recommended_working_set_size": 12_713_115_648, "memory_size": 16 * 2**30}
DEFAULT_CACHE = 16 * GB


def plan(wired: int = 8 * GB, cache: int = GB // 4, budget: int = 12 * GB) -> MemoryPlan:
    sizes = {"weights_bytes": 0, "kv_cache_bytes": 0, "scratch_bytes": 0, "total_bytes": 0, "process_bytes": 0}
    return MemoryPlan(
        "test", True, **sizes, budget_bytes=budget, context_length=1, max_context_length=1, batch_size=1,
        prefill_chunk=1, wired_limit_bytes=wired, cache_limit_bytes=cache,
    )  # fmt: skip


class FakeMLX:
    """MLX's process-wide numbers; `calls` has every one that changes something or waits, in order."""

    def __init__(self, wired=0, cache=DEFAULT_CACHE, info=MAC_16):
        self.wired, self.cache, self.info = wired, cache, info
        self.active = self.peak = 0
        self.calls = []

    def set_wired_limit(self, value):
        assert value <= self.info["max_recommended_working_set_size"], "MLX raises here"
        self.calls.append(("wired", value))
        self.wired, before = value, self.wired
        return before

    def set_cache_limit(self, value):
        self.calls.append(("cache", value))
        self.cache, before = value, self.cache
        return before

    def synchronize(self, stream):
        self.calls.append(("synchronize", stream))

    def allocate(self, n):
        self.active += n
        self.peak = max(self.peak, self.active)

    def free(self, n):
        self.active -= n

    def reset_peak_memory(self):
        self.peak = 0  # as MLX does: not the active amount

    def get_peak_memory(self):
        return self.peak

    def get_active_memory(self):
        return self.active

    def get_memory_limit(self):
        return DEFAULT_CACHE

    def device_info(self):
        return self.info

    def default_device(self):
        return "gpu"

    def default_stream(self, device):
        assert device == "gpu"
        return f"stream of {threading.get_ident()}"


HERE = f"stream of {threading.get_ident()}"


# --- how much may be wired --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted_gb", "recommended_gb", "memory_gb", "wired_gb"),
    [(3, 5.7, 8, 3), (5, 5.7, 8, 4), (9, 12.7, 17.2, 9), (13, 12.7, 17.2, 12.7), (13, 12.9, 16, 12), (20, 50, 48, 20),
     (40, 40.2, 48, 36), (100, 115.4, 137, 100), (115, 120, 137, 102.75), (5, 5, 3, 0)],
)  # fmt: skip
def test_no_more_than_needed_than_recommended_and_than_leaves_a_quarter(wanted_gb, recommended_gb, memory_gb, wired_gb):
    info = {"max_recommended_working_set_size": int(recommended_gb * GB), "memory_size": int(memory_gb * GB)}
    assert wired_limit(int(wanted_gb * GB), info) == pytest.approx(wired_gb * GB, abs=1)


@pytest.mark.parametrize("info", [mx.device_info(), {"total_memory": 80 * GB, "free_memory": GB}])
def test_where_nothing_is_wired(info):
    if "max_recommended_working_set_size" not in info:
        assert wired_limit(GB, info) == 0


# --- one request ------------------------------------------------------------------------------------------------------


def test_set_while_idle_and_put_back():
    mlx, the_plan = FakeMLX(), plan()
    limits = ProcessLimits(mlx)
    with limits.generating(the_plan):
        assert mlx.calls == [("synchronize", HERE), ("wired", 8 * GB), ("cache", GB // 4)]
        mlx.calls.clear()
    assert mlx.calls == [("synchronize", HERE), ("cache", DEFAULT_CACHE)]
    del the_plan
    assert mlx.calls[2:] == [("wired", 0)]


def test_a_model_is_wired_once_however_many_requests_it_has():
    mlx, the_plan, another = FakeMLX(), plan(wired=6 * GB), plan(wired=3 * GB)
    limits = ProcessLimits(mlx)
    for _ in range(20):
        with limits.generating(the_plan):
            assert mlx.wired == 6 * GB
    assert [call for call in mlx.calls if call[0] == "wired"] == [("wired", 6 * GB)]
    with limits.generating(another):
        assert mlx.wired == 9 * GB
    del the_plan
    assert mlx.wired == 3 * GB
    with limits.generating(another):
        pass
    del another
    assert [value for call, value in mlx.calls if call == "wired"] == [6 * GB, 9 * GB, 3 * GB, 0]


def test_a_plan_that_wires_nothing_touches_no_wired_limit():
    mlx = FakeMLX()
    with ProcessLimits(mlx).generating(plan(wired=0)):
        pass
    assert {call for call, _ in mlx.calls} == {"synchronize", "cache"}


def test_a_model_that_goes_while_another_thread_is_at_work_is_unwired_later():
    mlx, first, second = FakeMLX(), plan(wired=6 * GB), plan(wired=3 * GB)
    limits = ProcessLimits(mlx)
    with limits.generating(first):
        pass
    in_thread, go_on = threading.Event(), threading.Event()

    def other():
        with limits.generating(second):
            in_thread.set()
            go_on.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert in_thread.wait(60)
    del first
    assert mlx.wired == 9 * GB, "the GPU may be at work"
    go_on.set()
    thread.join()
    assert mlx.wired == 3 * GB


def test_put_back_after_an_error_also_of_the_gpu():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)

    def fail(stream):
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    def break_down():
        with limits.generating(plan()):
            mlx.synchronize = fail
            raise KeyError("x")

    with pytest.raises(KeyError):
        break_down()
    assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)


def test_put_back_when_a_generator_is_closed_or_abandoned():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)

    def tokens():
        with limits.generating(plan()):
            yield 1
            yield 2

    for end in ("close", "abandon"):
        stream = tokens()
        assert mlx.wired == 0, "nothing is set before the first token is asked for"
        next(stream)
        assert mlx.wired == 8 * GB
        if end == "close":
            stream.close()
        del stream
        gc.collect()
        assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)


def test_without_a_plan_or_a_mac_nothing_is_set():
    for mlx, the_plan in ((FakeMLX(), None), (FakeMLX(info={"device_name": "AMD"}), plan())):
        with ProcessLimits(mlx).generating(the_plan) as held:
            assert held.notes == []
        assert mlx.calls == []
    mlx = FakeMLX(info={"total_memory": 80 * GB})  # CUDA: a cache limit, nothing to wire
    with ProcessLimits(mlx).generating(plan()):
        pass
    assert mlx.calls[:2] == [("synchronize", HERE), ("cache", GB // 4)]
    assert mlx.cache == DEFAULT_CACHE


# --- several ----------------------------------------------------------------------------------------------------------


def test_two_models_nested_and_interleaved():
    """Both are wired as long as they are there, and neither puts back what the other needs, in whichever order they end."""
    first, second = plan(wired=6 * GB, cache=GB), plan(wired=3 * GB, cache=2 * GB)
    for end_first in (True, False):
        mlx = FakeMLX()
        limits = ProcessLimits(mlx)
        one, other = limits.generating(first), limits.generating(second)
        one.__enter__()
        other.__enter__()
        assert (mlx.wired, mlx.cache) == (9 * GB, 2 * GB)
        (one if end_first else other).__exit__(None, None, None)
        assert (mlx.wired, mlx.cache) == (9 * GB, 2 * GB if end_first else GB)
        (other if end_first else one).__exit__(None, None, None)
        assert (mlx.wired, mlx.cache) == (9 * GB, DEFAULT_CACHE)
        for i, (call, _) in enumerate(mlx.calls):
            if call == "wired":
                assert mlx.calls[i - 1][0] == "synchronize"


def test_two_requests_to_one_model_wire_it_once():
    mlx, the_plan = FakeMLX(), plan()
    limits = ProcessLimits(mlx)
    with limits.generating(the_plan):
        mlx.calls.clear()
        with limits.generating(the_plan):
            pass
        assert mlx.calls == [], "nothing changes, so nobody has to wait"


def test_nothing_changes_while_another_thread_may_have_work_on_the_gpu():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)
    in_thread, go_on = threading.Event(), threading.Event()

    def other():
        with limits.generating(plan(wired=3 * GB)):
            in_thread.set()
            go_on.wait(60)

    with limits.generating(plan()):
        thread = threading.Thread(target=other)
        thread.start()
        assert in_thread.wait(60)
        assert mlx.wired == 8 * GB
        calls = list(mlx.calls)
    assert mlx.calls == calls, "the other one is still at work"
    go_on.set()
    thread.join()
    assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)
    waited = {stream for call, stream in mlx.calls[len(calls) :] if call == "synchronize"}
    assert waited == {HERE, f"stream of {thread.ident}"}, "for the work of both"


def test_many_threads_leave_everything_as_it_was():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)

    def work(i):
        for _ in range(50):
            with limits.generating(plan(wired=(i + 1) * GB)):
                assert mlx.wired >= 0

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with limits.generating(plan()):
        assert mlx.wired == 8 * GB
    assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)


def test_a_stream_that_cannot_be_waited_for_is_left_to_the_next_request():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)
    hold = limits.generating(plan())
    hold.__enter__()

    def not_here(stream):
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    mlx.synchronize = not_here
    hold.__exit__(None, None, None)
    assert mlx.wired == 8 * GB
    del mlx.synchronize
    with limits.generating(plan(wired=GB)):
        assert mlx.wired == GB
    assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)


def test_a_request_collected_in_the_middle_of_a_change():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)
    abandoned = limits.generating(plan(wired=5 * GB))
    abandoned.__enter__()
    real = mlx.set_wired_limit

    def collects(value):
        mlx.set_wired_limit = real
        limits._wired._call = real
        abandoned.__exit__(None, None, None)
        return real(value)

    limits._wired._call = collects
    with limits.generating(plan(wired=2 * GB)):
        assert mlx.wired == 2 * GB
    assert (mlx.wired, mlx.cache) == (0, DEFAULT_CACHE)


# --- what the program has set itself ----------------------------------------------------------------------------------


def test_a_program_s_own_limits_stay_and_are_reported():
    mlx = FakeMLX(wired=10 * GB, cache=3 * GB)
    limits = ProcessLimits(mlx)
    with limits.generating(plan()) as held:
        assert (mlx.wired, mlx.cache) == (10 * GB, 3 * GB)
        assert len(held.notes) == 2
        assert "wired limit of 10,000,000,000 bytes that this program set was left" in held.notes[0]
        assert "plan's is 8,000,000,000" in held.notes[0]
        assert "cache limit of 3,000,000,000" in held.notes[1]
    assert (mlx.wired, mlx.cache) == (10 * GB, 3 * GB)


def test_what_a_program_sets_between_two_tokens_stays():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)
    with limits.generating(plan()):
        mlx.set_wired_limit(5 * GB)
        with limits.generating(plan(wired=GB)) as inner:
            assert mlx.wired == 5 * GB
            assert "5,000,000,000" in inner.notes[0]
    assert (mlx.wired, mlx.cache) == (5 * GB, DEFAULT_CACHE)


def test_what_a_program_sets_last_stays_after_the_request():
    mlx = FakeMLX()
    with ProcessLimits(mlx).generating(plan()):
        mlx.set_wired_limit(5 * GB)
        mlx.set_cache_limit(2 * GB)
    assert (mlx.wired, mlx.cache) == (5 * GB, 2 * GB)


# --- the peak ---------------------------------------------------------------------------------------------------------


def test_a_peak_belongs_to_its_request():
    mlx = FakeMLX()
    limits = ProcessLimits(mlx)
    mlx.allocate(10)  # loading
    mlx.free(7)
    with limits.generating(None) as one:
        assert one.peak_memory_bytes() == 3
        mlx.allocate(2)
        with limits.generating(None) as other:
            mlx.allocate(1)
            mlx.free(3)
            assert other.peak_memory_bytes() == 6
        mlx.allocate(1)
        assert one.peak_memory_bytes() == 6, "what the other one took was in use at the same time"
    assert other.peak_memory_bytes() == 6
    mlx.allocate(50)
    mlx.free(50)
    assert one.peak_memory_bytes() == 6, "after its end nothing counts"
    with limits.generating(None) as one:
        assert one.peak_memory_bytes() == 4
    assert limits.read_peak() == 54


def test_laps_count_anew_and_the_peak_goes_on():
    mlx = FakeMLX()
    with ProcessLimits(mlx).generating(None) as held:
        mlx.allocate(9)
        mlx.free(5)
        assert held.lap() == 9
        mlx.allocate(1)
        mlx.free(1)
        assert held.lap() == 5
        assert held.lap() == 4
        assert held.peak_memory_bytes() == 9


def test_statistics_have_the_request_s_own_peak():
    model = random_model(context_length=2000)

    def peak(length):
        gc.collect()
        held_by_others = mx.get_active_memory()  # models that other tests keep
        *_, last = stream_generate(model, None, [3] * length, max_tokens=2)
        return last.statistics.peak_memory_bytes - held_by_others

    small = peak(5)
    assert peak(1500) > 2 * small
    assert peak(5) < 2 * small, "though MLX's counter had been higher"
    assert limits.peak_memory_bytes() >= 2 * small


def test_the_real_calls_exist():
    """On this machine's MLX, whatever its backend: the limits's own calls go through."""
    before = mx.set_cache_limit(10**8), mx.set_wired_limit(0)
    mx.set_cache_limit(before[0])
    with ProcessLimits(mx).generating(plan(wired=10**6)) as held:
        assert held.peak_memory_bytes() >= 0
    after = mx.set_cache_limit(before[0]), mx.set_wired_limit(before[1])
    assert after == before
