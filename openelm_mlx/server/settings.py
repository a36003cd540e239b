"""What a server is told at its start, in one place: the command line fills it, and everything else only reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PORT = 8080


@dataclass(frozen=True)
class ServedModel:
    """A model that requests may name. name: as they write it. source: what is loaded for it.

    options: keywords of `om.load` for this one, which go before the server's own. created: seconds since 1970, of its files
    where they are here. owned_by: the owner of its repository.
    """

    name: str
    source: str | Path
    options: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0
    owned_by: str = "local"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters; requests may name MODEL:ADAPTER."""
        given = self.options.get("adapter")
        return tuple(given) if isinstance(given, Mapping) else ()


@dataclass(frozen=True)
class ServerSettings:
    """Everything that can be set. Times in seconds, sizes in bytes.

    Attributes:
        models: What is served; the first one is loaded when the server starts, the others when they are asked for.
        aliases: Other names of them.
        keep_alive: A model that nobody has used for so long is given back; 0 at once, None never.
        load_options: Keywords of `om.load` for every model.
        max_running, max_waiting: As `om.Engine` has them, for each model.
        tools: Tools that the models may run on this machine, as `Toolbox` reads them; none without a name.
        allow_unsandboxed: Whether python may run where the machine has no sandbox.
        max_rounds: How many times in an answer a model may call them.
        load_wait: How long a request waits for a model to be loaded, or for memory to become free for it.
        api_keys: Any of these is asked for, if there is one.
        allow_hosts: Names in the Host header beside those of this machine's own loopback.
        allow_origins: Origins of web pages elsewhere that may use the server.
        max_body: Of a request.
        header_timeout, body_timeout: How long a client may take to send a request's headers, and its body.
        write_timeout: How long a client may leave an answer unread.
        keep_alive_timeout: How long a connection stays open between two requests.
        max_connections: At once; one more is told to come back.
        shutdown_time: How long answers may go on after Ctrl-C.
    """

    models: tuple[ServedModel, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    keep_alive: float | None = None
    load_options: Mapping[str, Any] = field(default_factory=dict)
    max_running: int | None = None
    max_waiting: int | None = None
    tools: str = ""
    allow_unsandboxed: bool = False
    max_rounds: int = 16
    load_wait: float = 300.0
    api_keys: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body: int = 8_000_000
    header_timeout: float = 20.0
    body_timeout: float = 60.0
    write_timeout: float = 120.0
    keep_alive_timeout: float = 75.0
    max_connections: int = 512
    shutdown_time: float = 30.0
