"""From settings and a socket to a server that runs until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from .connections import Server, address_of
from .registry import Registry
from .settings import ServerSettings


class Voice(Protocol):
    """Who speaks to the person at the terminal."""

    def listening(self, settings: ServerSettings, host: str, port: int) -> None:
        """The server answers there from now on."""

    def stopping(self, num_answers: int, seconds: float) -> None:
        """It ends: so many answers are still being written, and may take so many seconds."""

    def hurried(self) -> None:
        """It ends now."""


async def serve(settings: ServerSettings, listening: socket.socket, voice: Voice) -> str | None:
    """Serve until a signal, or until the only model cannot be loaded at the start: then why.

    Models are given back, and every answer is whole or has been told that it will not be, before this returns.
    """
    from .site import make_site

    registry = Registry(settings)
    server = Server(
        make_site(settings, registry), settings, lambda running: voice.stopping(running, settings.shutdown_time)
    )
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        if server.started:
            voice.listening(settings, *address_of(listening))
        return await _until_the_end(running, server, registry)
    finally:
        if not running.done():  # this task was cancelled
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if server.is_hurried:
            voice.hurried()
        await registry.close()


async def _until_the_end(running: asyncio.Task[None], server: Server, registry: Registry) -> str | None:
    failure = registry.startup_failure
    if failure is None or len(registry.settings.models) > 1:
        await running
        return None
    await asyncio.wait((running, failure), return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    await running
    return failure.result() if failure.done() and not failure.cancelled() else None
