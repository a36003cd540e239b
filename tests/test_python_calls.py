"""The Python functions that a token costs: between two tokens of a small model the host's work is what takes the time."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType

import openelm_mlx as om
from openelm_mlx.engine.sequence import Sequence

MOST_CALLS = 300
NUM_TOKENS = 40


def counted_calls(function: Callable[[], None]) -> Counter[CodeType]:
    """How often each Python function was called within `function`.

    In a thread of its own, so that the profiler, coverage or debugger of this one goes on, and is not counted.
    """
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    def run() -> None:
        sys.settrace(None)
        sys.setprofile(count)
        try:
            function()
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return calls


def test_a_token_takes_few_calls():
    model, tokenizer = om.load("demo-openelm")
    chunks = []

    def answer() -> None:
        chunks[:] = om.stream_generate(model, tokenizer, "What is a violin?", max_tokens=NUM_TOKENS)

    answer()  # what the first request makes is kept
    calls = counted_calls(answer)
    assert calls[Sequence.accept.__code__] == len(chunks) == NUM_TOKENS
    most = [f"{number / NUM_TOKENS:.1f} {code.co_name} ({code.co_filename})" for code, number in calls.most_common(20)]
    # The prompt's pass is among them: a step alone takes fewer.
    calls_per_token = calls.total() / NUM_TOKENS
    assert calls_per_token <= MOST_CALLS, "\n".join(most)
