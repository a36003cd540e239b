"""What the caller of an engine holds of a request: its chunks as they come, in a thread or in asyncio, and its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, final

from .sequence import Chunk
from .statistics import Statistics

if TYPE_CHECKING:
    import asyncio  # half a second where nobody asks for it


@final
class Channel:
    """From the engine's thread to whoever reads. The engine never waits for a reader: a request's chunks are at most as
    many as its tokens, and all of them have a place.
    """

    def __init__(self, wake_engine: Callable[[], None], num_prompt_tokens: int = 0) -> None:
        self.num_prompt_tokens, self.num_prompt_tokens_done = num_prompt_tokens, 0
        self.prompt_logprobs: list[tuple[float, dict[int, float]]] = []
        self.items: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()
        self.is_cancelled = False
        self.is_done = False
        self.statistics: Statistics | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._wake_engine = wake_engine
        self._lock = threading.Lock()

    def put(self, chunk: Chunk) -> None:
        """One more chunk, which is not the last."""
        self.items.put(chunk)

    def end(self, last: Chunk | None = None, error: BaseException | None = None) -> None:
        """Nothing comes after `last`. error: raised where the next chunk is asked for."""
        with self._lock:
            if self.is_done:
                return
            self.is_done = True
        if last is not None:
            self.statistics = last.statistics
            self.items.put(last)
        self.items.put(error)  # None: the end

    def add_waiter(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        """Resolve the loop's future when something has come."""
        with self._lock:
            self._waiters.append((loop, future))

    def take_waiters(self) -> list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]:
        """Those who are to be told that something has come."""
        if not self._waiters:  # whoever comes after this look finds the item
            return []
        with self._lock:
            found, self._waiters = self._waiters, []
        return found

    def cancel(self) -> None:
        """Ask the engine to give the request up."""
        if not self.is_done and not self.is_cancelled:
            self.is_cancelled = True
            self._wake_engine()


def wake_readers(channels: Iterable[Channel]) -> None:
    """Wake the tasks that wait for these, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for channel in channels:
        for loop, future in channel.take_waiters():
            by_loop.setdefault(loop, []).append(future)
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:
            continue  # the loop has been closed: nobody waits any more


async def something_came(handles: Sequence[Handle], within: float | None = None) -> bool:
    """Wait until one of these has something to take, or has come to its end. False after `within` seconds."""
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    for handle in handles:
        handle.channel.add_waiter(loop, future)
    if not all(handle.channel.items.empty() for handle in handles):  # it came between the two looks
        return True
    if within is None:
        await future
        return True
    timer = loop.call_later(within, _resolve, [future])
    try:
        await future
    finally:
        timer.cancel()
    return not all(handle.channel.items.empty() for handle in handles)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


@final
class Handle:
    """A request that an engine answers: iterate it, with `for` or `async for`, for its chunks.

    Each chunk comes once; several threads or tasks that read one handle share them. Who stops reading early calls
    `cancel`; a handle that is dropped before its end cancels the request. An error of the request (MemoryLimitError and
    others) is raised where its next chunk would have come.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._is_over = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._is_over:
            self._raise_end(StopIteration)
        return self._taken(self.channel.items.get(), StopIteration)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._is_over:
            self._raise_end(StopAsyncIteration)
        channel = self.channel
        while True:
            try:
                item = channel.items.get_nowait()
            except queue.Empty:
                import asyncio

                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                channel.add_waiter(loop, future)
                if channel.items.empty():  # else it came between the two looks
                    await future
            else:
                return self._taken(item, StopAsyncIteration)

    def take(self) -> list[Chunk]:
        """The chunks that have come and have not been read, without waiting for more; none where `is_over`.

        An error of the request is raised once everything before it has been taken.
        """
        found: list[Chunk] = []
        while not self._is_over:
            try:
                item = self.channel.items.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, Chunk):
                found.append(item)
            else:
                self._is_over, self._error = True, item
                self.channel.items.put(item)
        if self._is_over and not found and self._error is not None:
            raise self._error
        return found

    @property
    def is_over(self) -> bool:
        """Whether everything has been read."""
        return self._is_over

    @property
    def prompt_logprobs(self) -> list[tuple[float, dict[int, float]]]:
        """Of each token of the prompt but the first, as asked for: its log-probability, and the likeliest ones there.

        Complete when there is a chunk.
        """
        return self.channel.prompt_logprobs

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.channel.num_prompt_tokens

    @property
    def num_prompt_tokens_done(self) -> int:
        """How many of the prompt's tokens have been computed so far, those from a prefix cache included."""
        return self.channel.num_prompt_tokens_done

    def text(self) -> str:
        """The rest of the answer, waited for, without reasoning."""
        return "".join(chunk.text for chunk in self)

    def cancel(self) -> None:
        """Give the request up: its memory is free within one step of the engine. What had come before can still be read."""
        self.channel.cancel()

    @property
    def is_done(self) -> bool:
        """Whether the engine has nothing more to do for it; chunks may still wait to be read."""
        return self.channel.is_done

    @property
    def statistics(self) -> Statistics | None:
        """What the request took, `time_queued` included; None before its end, and where it came to no end."""
        return self.channel.statistics

    def __del__(self) -> None:
        channel: Channel | None = getattr(self, "channel", None)
        if channel is not None:
            channel.cancel()

    def _taken(self, item: Chunk | BaseException | None, end: type[Exception]) -> Chunk:
        if isinstance(item, Chunk):
            return item
        self._is_over, self._error = True, item
        self.channel.items.put(item)  # whoever else reads it comes to the end, too
        wake_readers([self.channel])
        raise item or end

    def _raise_end(self, end: type[Exception]) -> NoReturn:
        raise self._error or end
