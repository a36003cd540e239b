"""Connections and their patience: uvicorn's HTTP, with limits on clients that send nothing, read nothing, or are too many.

Each connection has at most one timer of each kind: for a request's headers, for the rest of a request that has been answered
before it was whole, and for an answer that nobody reads.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import SettingError
from .failures import ApiError
from .log import log
from .settings import ServerSettings

# Of a request's line and headers. Cookies of other servers on localhost come along in browsers.
MAX_HEADERS = 65_536
# How long the rest of a body is read and thrown away whose request has been answered: a client that is still sending would
# not see the answer if its connection were closed.
LINGER = 5.0
# Connections beyond the limit that are told so; of more, none is answered.
MOST_REFUSED = 64


def raw_answer(error: ApiError) -> bytes:
    """An error as HTTP, where no request could be understood."""
    body = json.dumps(error.openai_body()).encode()
    reasons = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), "connection": "close",
        "x-content-type-options": "nosniff", **error.headers,
    }  # fmt: skip
    lines = [
        f"HTTP/1.1 {error.status} {reasons[error.status]}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@final
class Connection(H11Protocol):
    """A connection of uvicorn's, with patience as the settings have it."""

    _header_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def __init__(self, *arguments: Any, settings: ServerSettings, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._settings = settings

    # --- beginning and end ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        beyond = len(self.connections) - self._settings.max_connections
        if beyond > MOST_REFUSED:
            transport.abort()
            return
        self._is_refused = beyond > 0
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._rest_timer, self._write_timer):
            _stop(timer)
        super().connection_lost(exc)

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._refuse()
            return
        if self._header_timer is None and self._is_between_requests():
            self._await_headers()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            _stop(self._header_timer)
            self._header_timer = None

    def _is_between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self._settings.header_timeout, self._headers_are_late)

    def _headers_are_late(self) -> None:
        self._answer(
            ApiError(408, f"No request came within {self._settings.header_timeout:g} seconds.", code="request_timeout")
        )

    def _refuse(self) -> None:
        most = self._settings.max_connections
        message = f"There are {most} connections already: ask again in a moment."
        self._answer(ApiError(503, message, "server_error", code="overloaded", retry_after=2))

    def send_400_response(self, msg: str) -> None:
        self._answer(ApiError(400, "This is no HTTP/1.1 request that can be read.", code="invalid_http"))

    def _answer(self, error: ApiError) -> None:
        """End the connection, with an error where no answer has begun yet."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None:
                self.cycle.disconnected = True  # what the application still says goes nowhere
                self.cycle.message_event.set()
            self.transport.write(raw_answer(error))
        self.transport.close()

    # --- what goes out ---

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self._rest_timer = self.loop.call_later(LINGER, self._rest_is_late)

    def _rest_is_late(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        _stop(self._write_timer)
        self._write_timer = self.loop.call_later(self._settings.write_timeout, self._reader_is_late)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._write_timer)
        self._write_timer = None

    def _reader_is_late(self) -> None:
        log.warning("an answer was not read for %g seconds, and its connection is closed", self._settings.write_timeout)
        self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises SettingError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingError(f"--host {host} is no address of this machine: {error}.") from None
    family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise SettingError(_no_socket(host, port, error)) from None
    listening.setblocking(False)
    return listening


def _no_socket(host: str, port: int, error: OSError) -> str:
    import errno

    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use by another program: stop it, or give another port, as --port {_next(port)}."
    if error.errno == errno.EACCES:
        return f"Port {port} is for the system's own programs: give one from 1024 on, as --port 8080."
    return f"{host} port {port} cannot be listened to: {error.strerror or error}."


def _next(port: int) -> int:
    return port + 1 if port < 65535 else 8080


@final
class Server(uvicorn.Server):
    """uvicorn's, which ends as a person at a terminal expects.

    The first Ctrl-C (or SIGTERM) lets answers finish, for `shutdown_time` at most; the second one does not. on_stop: told at
    the first one how many answers are still being written. is_hurried: whether there was a second one.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, on_stop: Callable[[int], None] | None = None) -> None:
        http: Any = partial(Connection, settings=settings)  # called as a class is
        config = uvicorn.Config(
            app, http=http, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, h11_max_incomplete_event_size=MAX_HEADERS, loop="asyncio",
            timeout_keep_alive=int(settings.keep_alive_timeout), backlog=1024,
        )  # fmt: skip
        super().__init__(config)
        self._on_stop, self._shutdown_time = on_stop, settings.shutdown_time
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and wait for the answers."""
        timer = asyncio.get_running_loop().call_later(self._shutdown_time, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. Nothing is raised again afterwards."""
        if not self.should_exit:
            self.should_exit = True
            if self._on_stop is not None:
                self._on_stop(len(self.server_state.tasks))
            return
        self.force_exit = self.is_hurried  # a third one does not even wait for what was ended
        self.is_hurried = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_connections)

    def stop(self) -> None:
        """End as after one Ctrl-C, from within."""
        self.should_exit = True

    def _give_up(self) -> None:
        log.warning("%d answers are not finished, and end here", len(self.server_state.tasks))
        self._end_connections()

    def _end_connections(self) -> None:
        """Whoever writes an answer is told that its client has gone, and leaves nothing behind."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def address_of(listening: socket.socket) -> tuple[str, int]:
    """Where it listens."""
    name: Any = listening.getsockname()
    return name[0], name[1]
