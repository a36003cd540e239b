"""A constraint's work on the host, in an engine: however long it takes, nobody else waits for it."""

import threading
import time

import pytest
from short_demos import short_demo
from test_engine_many import seen

import openelm_mlx as om
from openelm_mlx.decoding.constraint import PlainConstraint
from openelm_mlx.errors import EngineClosedError

REGEX = "[a-z ]{5,20}"


@pytest.fixture(scope="module")
def demo():
    return om.load(short_demo("demo-openelm"), dtype="float32")


class Gate:
    """A mask that does not come before it is let through. has_come: somebody waits for one."""

    def __init__(self, monkeypatch, num_free: int) -> None:
        self.let_through, self.has_come, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._left = num_free
        self.stuck = []
        real = PlainConstraint.mask

        def mask(constraint):
            with self._lock:
                self._left -= 1
                is_stuck = self._left < 0 and len(self.stuck) < self.most
                if is_stuck:
                    self.stuck.append(constraint)
            if is_stuck:
                self.has_come.set()
                assert self.let_through.wait(120)
            return real(constraint)

        self.most = 1
        monkeypatch.setattr(PlainConstraint, "mask", mask)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch, 3)
    yield gate
    gate.let_through.set()


@pytest.mark.slow
def test_nobody_waits_for_a_slow_mask(demo, gate):
    """Whoever runs beside it, comes after it, or has a constraint of its own."""
    model, tokenizer = demo
    plain, own = {"max_tokens": 12}, {"max_tokens": 12, "regex": "(one|two)( three)*"}
    gate.most = 0
    expected = [seen(om.stream_generate(model, tokenizer, "A river", **each)) for each in (plain, own)]
    slow_one = seen(om.stream_generate(model, tokenizer, "A banjo is", max_tokens=12, regex=REGEX))
    gate.most = 1
    with om.Engine(model, tokenizer) as engine:
        slow = engine.submit("A banjo is", max_tokens=12, regex=REGEX)
        assert gate.has_come.wait(60)
        assert seen(engine.submit("A river", **plain)) == expected[0]
        assert seen(engine.submit("A river", **own)) == expected[1]
        assert not slow.is_done
        gate.let_through.set()
        assert seen(slow) == slow_one


@pytest.mark.parametrize("how", ["cancel", "drop"])
def test_a_request_is_given_up_in_the_middle_of_a_slow_mask(demo, gate, how):
    model, tokenizer = demo
    with om.Engine(model, tokenizer, max_running=1) as engine:
        slow = engine.submit("A banjo is", max_tokens=12, regex=REGEX)
        assert gate.has_come.wait(60)
        if how == "cancel":
            slow.cancel()
            list(slow)
        else:
            del slow
        assert len(list(engine.submit("A river", max_tokens=4))) == 4
        assert engine.num_running == 0
        assert engine._runner.memory.held_bytes == 0


def test_an_engine_is_closed_in_the_middle_of_a_slow_mask(demo, gate):
    model, tokenizer = demo
    engine = om.Engine(model, tokenizer)
    slow = engine.submit("A banjo is", max_tokens=12, regex=REGEX)
    assert gate.has_come.wait(60)
    engine.close()
    assert not gate.let_through.is_set()
    with pytest.raises(EngineClosedError):
        list(slow)


@pytest.mark.slow
def test_who_gives_way_is_not_waited_for(demo, gate):
    """Where the youngest has a slow mask, the one before it gives way."""
    model, tokenizer = demo
    sampling = om.SamplingParams(logit_bias={each: -float("inf") for each in tokenizer.eos_tokens})
    with om.Engine(model, tokenizer) as engine:
        first, second = (engine.submit("A river", max_tokens=100, sampling=sampling) for _ in range(2))
        next(first), next(second)
        slow = engine.submit("A banjo is", max_tokens=12, regex=REGEX)
        assert gate.has_come.wait(60)
        runner, has_given_way = engine._runner, []

        def tight(finish_host_work):
            if not has_given_way:
                has_given_way.append(runner.life.let_youngest_give_way(finish_host_work))

        runner.life.make_room = tight
        assert len(list(first)) == 99
        assert len(list(second)) == 99
        assert has_given_way == [True]
        gate.let_through.set()
        assert list(slow)[-1].finish_reason


def test_a_worker_that_raises_ends_its_request_alone(demo, monkeypatch):
    model, tokenizer = demo

    def broken(_):
        time.sleep(0.005)
        raise ValueError("the grammar broke")

    with om.Engine(model, tokenizer) as engine:
        other = engine.submit("A river", max_tokens=16)
        next(other)
        monkeypatch.setattr(PlainConstraint, "mask", broken)
        with pytest.raises(ValueError, match="the grammar broke"):
            list(engine.submit("A banjo is", max_tokens=12, regex=REGEX))
        assert len(list(other)) == 15
