"""A server that listens before all of it has been imported: most of its code, and MLX, take longer than people wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from starlette.types import ASGIApp, Receive, Scope, Send

from .loading import THREAD

if TYPE_CHECKING:
    from starlette.applications import Starlette


@final
class LateSite:
    """An application that is made in a thread once the server has started. Until then requests wait for it, except that
    `/health` says that it is loading.

    models: entered as soon as the server starts, and left when it ends.
    """

    def __init__(self, make: Callable[[], Starlette], models: contextlib.AbstractAsyncContextManager[object]) -> None:
        self._make, self._models = make, models
        self.made: asyncio.Future[Starlette] = asyncio.get_running_loop().create_future()
        self._entered = contextlib.AsyncExitStack()
        self._entering: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["path"] == "/health" and not self.made.done():
            await _loading(send)
            return
        app: ASGIApp = await asyncio.shield(self.made)
        await app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await self._entered.enter_async_context(self._models)
        self._entering = asyncio.create_task(self._enter())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._entering.cancel()
        await asyncio.gather(self._entering, return_exceptions=True)
        await self._entered.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _enter(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._make_it, args=(loop,), name=THREAD, daemon=True).start()
        app = await asyncio.shield(self.made)
        await self._entered.enter_async_context(app.router.lifespan_context(app))

    def _make_it(self, loop: asyncio.AbstractEventLoop) -> None:
        made, error = None, None
        try:
            made = self._make()
        except BaseException as failure:  # noqa: BLE001  (whoever waits is told)
            error = failure
        with contextlib.suppress(RuntimeError):  # of a loop that has been closed
            loop.call_soon_threadsafe(self._deliver, made, error)

    def _deliver(self, made: Starlette | None, error: BaseException | None) -> None:
        if self.made.done():
            return
        if made is None:
            self.made.set_exception(error or RuntimeError("there is no application"))
        else:
            self.made.set_result(made)


async def _loading(send: Send) -> None:
    body = json.dumps({"status": "loading"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
