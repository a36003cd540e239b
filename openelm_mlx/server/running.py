"""From settings and a socket to a server that runs until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Protocol

from .connections import Server, address_of
from .counts import Metrics
from .guard import Guard
from .late import LateSite
from .registry import Registry
from .settings import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from .own_tools import OwnTools


class ServerEvents(Protocol):
    """Who speaks to the person at the terminal."""

    def listening(self, settings: ServerSettings, host: str, port: int) -> None:
        """The server answers there from now on."""

    def stopping(self, num_answers: int, seconds: float) -> None:
        """It ends: so many answers are still being written, and may take so many seconds."""

    def stopping_at_once(self) -> None:
        """It ends now."""


async def serve(
    settings: ServerSettings, listening: socket.socket, events: ServerEvents, tools: OwnTools | None = None
) -> str | None:
    """Serve until a signal, or until the only model cannot be loaded at the start: then why.

    tools: that the models may run on this machine; whoever opened them closes them.
    Models are given back, and every answer is whole or has been told that it will not be, before this returns.
    """
    registry, counted = Registry(settings), Metrics()

    def make() -> Starlette:
        from .site import make_inner_site

        return make_inner_site(registry, counted, tools)

    site = LateSite(make, registry)
    registry.load_after = site.made
    server = Server(
        Guard(site, settings, counted), settings, lambda running: events.stopping(running, settings.shutdown_time)
    )
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        if server.started:
            events.listening(settings, *address_of(listening))
        return await _until_the_end(running, server, registry, site)
    finally:
        if not running.done():  # this task was cancelled
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if server.is_hurried:
            events.stopping_at_once()
        await registry.close()


async def _until_the_end(running: asyncio.Task[None], server: Server, registry: Registry, site: LateSite) -> str | None:
    reason = registry.startup_failure
    # With other models beside the first, the server goes on without it.
    failure = reason if reason is not None and len(registry.settings.models) == 1 else None
    ends: list[asyncio.Future[Any]] = [running, *(() if failure is None else (failure,))]
    await asyncio.wait([*ends, site.made], return_when=asyncio.FIRST_COMPLETED)
    if not site.made.done() or site.made.exception() is None:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    await running
    if site.made.done() and (error := site.made.exception()) is not None:
        raise error
    return failure.result() if failure is not None and failure.done() else None
