"""All cores where MLX's CPU backend computes: it takes one for each stream, and each thread has streams of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from ..platforms import available_cores

_T = TypeVar("_T")

# More than this wait for memory.
MOST_CORES = 8

_of_thread = threading.local()  # a thread cannot use the streams of another one
_jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
_threads: list[threading.Thread] = []
_starting = threading.Lock()


def num_cores() -> int:
    """How many of this process's cores are computed on, at most `MOST_CORES`."""
    return min(available_cores(), MOST_CORES)


def streams() -> list[mx.Stream]:
    """This thread's own and one more for each other core.

    For operations that alternate between them. MLX lets about a hundred be on their way, and waits then: of two long pieces of
    work that one thread dispatches, the second begins when the first has nearly ended. `compute_at_once` is for those.
    """
    if not hasattr(_of_thread, "streams"):
        _of_thread.streams = [mx.new_stream(mx.cpu) for _ in range(num_cores() - 1)]
    return [mx.default_stream(mx.cpu), *_of_thread.streams]


def compute_at_once(works: Sequence[Callable[[], _T]]) -> list[_T]:
    """What each of them returns, each in a thread: the last one in this thread, the others in threads kept for it.

    They evaluate what they compute, and return when all have ended; an error is raised then.
    """
    others: list[Future[_T]] = []
    for work in works[:-1]:
        others.append(Future())
        _jobs.put((others[-1], work))
    _start_threads(len(others))
    try:
        last = works[-1]()
    finally:
        for each in others:
            each.exception()  # waits
    return [*(each.result() for each in others), last]


def _start_threads(count: int) -> None:
    """Have so many threads, at most one for each core but one.

    They never end: when Python ends, a thread that ends too gives its streams back while MLX closes, which aborts the process.
    """
    with _starting:
        while len(_threads) < min(count, MOST_CORES - 1):
            _threads.append(threading.Thread(target=_work, name="openelm_mlx core", daemon=True))
            _threads[-1].start()


def _work() -> None:
    with mx.stream(mx.new_stream(mx.cpu)):
        while True:
            _do(*_jobs.get())


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised by whoever waits
        future.set_exception(error)
