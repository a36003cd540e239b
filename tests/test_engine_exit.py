"""What an engine leaves behind when it has gone: a process that ends as it should, and kept prompts that others can use."""

import subprocess
import sys

import pytest
from short_demos import short_demo

import openelm_mlx as om

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


@pytest.mark.slow
def test_a_process_ends_as_it_should_after_its_engines():
    """The thread of an engine's stream, left running, aborted more than half of such processes at their end."""
    started = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        for script in (CLOSED, CLOSED, LEFT_OPEN)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert ended == [("", 0)] * 3


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
