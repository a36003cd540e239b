"""Compiled functions that come and go while several threads call them."""

import queue
import threading

import mlx.core as mx
import pytest

from openelm_mlx.models.tracing import compile_apart


@pytest.fixture
def two_threads():
    """Two that stay, each of which calls what it is given."""
    given = [(queue.Queue(), queue.Queue()) for _ in range(2)]

    def serve(asked, answers):
        while (function := asked.get()) is not None:
            answers.put(function())
            del function

    def caller(asked, answers):
        def call(function):
            asked.put(function)
            return answers.get(timeout=60)

        return call

    threads = [threading.Thread(target=serve, args=each) for each in given]
    for each in threads:
        each.start()
    yield [caller(*each) for each in given]
    for asked, _ in given:
        asked.put(None)
    for each in threads:
        each.join()


def made(number):
    """A function with a weight of its own, as a model's pieces have them."""
    weight = mx.full((4, 4), number)
    mx.eval(weight)
    return compile_apart(lambda x, shift: (x @ weight + shift)[0, 0])


def test_no_thread_takes_another_function_s_trace(two_threads):
    """With `mx.compile` alone nearly all but the first are wrong in the thread that did not call a function last."""
    x = mx.ones((4, 4))
    mx.eval(x)
    for number in range(1, 40):
        function = made(float(number))
        for call in two_threads:
            assert call(lambda function=function: function(x, mx.array(0.5)).item()) == 4 * number + 0.5
        del function


def test_it_is_the_function():
    x = mx.array([1.0, 2.0])
    assert compile_apart(lambda x, more: [x + 1, {"sum": x + more[0]}])(x, (x,))[1]["sum"].tolist() == [2.0, 4.0]
    with pytest.raises(TypeError, match="positional"):
        compile_apart(lambda x: x)(x, x)
