"""Answers over HTTP while they are being written, and what happens when whoever asked goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .failures import ApiError, ClientGone, api_error
from .generation import Generation, Progress
from .log import log
from .parts import Part

T = TypeVar("T")
Starting = asyncio.Future[Generation]

# Seconds without anything new after which the client is told that it is still being worked on, and how far that is.
BEFORE_TEXT = 1.0
WITHIN_TEXT = 10.0
# Seconds that a stream's model may take to be there, before the client is told that it is being loaded. What fails before is
# an answer with a status of its own.
BEFORE_LOADING = 5.0


class Events(Protocol):
    """The stream of one API. Its methods give the bytes to send; none of them waits."""

    def start(self) -> bytes:
        """As soon as the request has been accepted."""

    def more(self, parts: list[Part]) -> bytes:
        """What these parts are; with the last ones, the end of the stream too."""

    def keep_alive(self, progress: Progress | None) -> bytes:
        """That the answer is still being worked on. progress: before its first part."""

    def failure(self, error: ApiError) -> bytes:
        """That it has failed, and the end of the stream."""


def comment(progress: Progress | None) -> bytes:
    """A line that clients pass over, and people who look can read."""
    if progress is None:
        return b": still writing\n\n"
    if progress.place is not None:
        return b": in the queue, %d before this one\n\n" % progress.place
    return b": prompt, %d of %d tokens\n\n" % (progress.prompt_tokens_done, progress.prompt_tokens)


@final
class EventStream(Response):
    """Server-sent events of a generation. All parts that are there go out in one write.

    A client that goes away, or reads so slowly that its connection is given up, ends the generation.
    """

    def __init__(self, starting: Starting, events: Callable[[Generation | None], Events]) -> None:
        """events: of this generation; None where there has never been one."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._starting, self._events = starting, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError):  # the connection is gone
                await _unless_gone(receive, self._send(send))
        finally:
            await _end(self._starting)

    async def _send(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            if body or not more:
                await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while not self._starting.done():
            await write(b": the model is being loaded\n\n")
            await asyncio.wait([self._starting], timeout=WITHIN_TEXT)
        try:
            generation = self._starting.result()
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("an answer failed before it began")
            events = self._events(None)
            await write(events.start() + events.failure(api_error(error)))
            await write(b"", more=False)
            return
        events, has_text = self._events(generation), False
        try:
            await write(events.start())
            batches = generation.batches(BEFORE_TEXT)
            quiet = 0.0
            async for parts in batches:
                if parts:
                    has_text, quiet = True, 0.0
                    await write(events.more(parts))
                    continue
                quiet += BEFORE_TEXT
                if not has_text:
                    await write(events.keep_alive(generation.progress()))
                elif quiet >= WITHIN_TEXT:
                    quiet = 0.0
                    await write(events.keep_alive(None))
        except OSError:
            raise
        except ApiError as error:
            await write(events.failure(error))
        except Exception as error:
            log.exception("an answer failed while it was streamed")
            await write(events.failure(api_error(error)))
        await write(b"", more=False)


async def begun(request: Request, start: Coroutine[Any, Any, Generation]) -> Starting:
    """A stream's generation, or, while its model is still being loaded, the task that will have it.

    Raises what `start` raises, as long as that can still be an answer of its own.
    """
    starting = asyncio.ensure_future(start)
    try:
        await unless_gone(request, asyncio.wait([starting], timeout=BEFORE_LOADING))
    except BaseException:
        await _end(starting)
        raise
    if starting.done():
        starting.result()
    return starting


async def _end(starting: Starting) -> None:
    """Give up a generation, begun or not."""
    starting.cancel()
    await asyncio.wait([starting])
    if not starting.cancelled() and starting.exception() is None:
        async with starting.result():
            pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. It is cancelled when the client goes away; then a `ClientGone` is raised.

    The request's body has to have been read.
    """
    return await _unless_gone(request.receive, work)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client has gone")
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
