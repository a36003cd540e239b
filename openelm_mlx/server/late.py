"""A server that listens before all of it has been imported: most of its code, and MLX, take longer than people wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from starlette.types import ASGIApp, Receive, Scope, Send

from .loading import in_thread

if TYPE_CHECKING:
    from starlette.applications import Starlette


@final
class LateSite:
    """An application that is made in a thread once the server has started. Until then requests wait for it, except that
    `/health` says that it is loading.

    models: entered as soon as the server starts, and left when it ends; the application has no lifespan of its own.
    """

    def __init__(self, make: Callable[[], Starlette], models: contextlib.AbstractAsyncContextManager[object]) -> None:
        self._make, self._models = make, models
        self.made: asyncio.Future[Starlette] = asyncio.get_running_loop().create_future()

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
        async with self._models:
            making = asyncio.create_task(self._make_it())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _make_it(self) -> None:
        try:
            self.made.set_result(await in_thread(self._make, uses_mlx=False))
        except Exception as error:  # noqa: BLE001  (whoever waits is told)
            self.made.set_exception(error)


async def _loading(send: Send) -> None:
    body = json.dumps({"status": "loading"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
