"""What an engine leaves behind when it has gone: a process that ends as it should, and kept prompts that others can use."""

import subprocess
import sys
import threading

import pytest
from short_demos import short_demo

import openelm_mlx as om
from openelm_mlx.memory import limits

CLOSED = """
import openelm_mlx as om
model, _ = om.load("demo-openelm")
for _ in range(4):
    with om.Engine(model, None) as engine:
        list(engine.submit([5, 6, 7], max_tokens=2))
"""
LEFT_OPEN = """
import openelm_mlx as om
model, _ = om.load("demo-openelm")
engine = om.Engine(model, None)
list(engine.submit([5, 6, 7], max_tokens=2))
engine.submit([5, 6, 7], max_tokens=200)
"""
IN_THREADS = """
import threading
import openelm_mlx as om
model, tokenizer = om.load("demo-openelm")
left = []
def ask():
    om.generate(model, tokenizer, "What is a banjo?", max_tokens=3)
    left.append(om.stream_generate(model, tokenizer, "What is a banjo?", max_tokens=3))
    next(left[-1])  # and is never gone on with
threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
om.generate(model, tokenizer, "What is a banjo?", max_tokens=3)
"""


@pytest.mark.slow
def test_a_process_ends_as_it_should_after_its_engines_and_threads():
    """The thread of a stream, left running by a thread that has ended, aborted more than half of such processes."""
    started = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        for script in (CLOSED, CLOSED, LEFT_OPEN, IN_THREADS, IN_THREADS, IN_THREADS)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert ended == [("", 0)] * 6


def test_a_thread_takes_its_streams_along(monkeypatch):
    cleared, real = [], limits.mx.clear_streams
    monkeypatch.setattr(limits.mx, "clear_streams", lambda: (cleared.append(threading.get_ident()), real()))

    def generates_twice():
        for _ in range(2):
            with limits.generating(None):
                assert cleared == []

    thread = threading.Thread(target=generates_twice)
    thread.start()
    thread.join()
    assert len(cleared) == 1
    with limits.generating(None):
        pass
    assert len(cleared) == 1  # the main thread's stay


def test_prompts_that_an_engine_kept_are_there_when_it_has_gone():
    model, _ = om.load(short_demo("demo-gpt-oss"))
    prompt, store = [(7 * i) % 200 + 3 for i in range(150)], om.PrefixCache()
    expected = [chunk.token for chunk in om.stream_generate(model, None, [*prompt, 9], max_tokens=4)]
    with om.Engine(model, None) as engine:
        for _ in engine.submit(prompt, max_tokens=2, prefix_cache=store):
            pass
    chunks = list(om.stream_generate(model, None, [*prompt, 9], max_tokens=4, prefix_cache=store))
    assert [chunk.token for chunk in chunks] == expected
    assert chunks[-1].statistics.cached_tokens >= 149
