"""Tools of MCP servers (modelcontextprotocol.io), through the official SDK: pip install 'openelm_mlx[mcp]'.

The SDK is asynchronous and a chat is not, so each connection lives in a thread with a loop of its own, from `__init__` to
`close`. A server is a program that talks over its standard input and output, or an address on the network.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import tempfile
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO, TypeVar, cast, final

from ..errors import ToolError
from ..files import read_json
from .tool import arguments_of

if TYPE_CHECKING:
    from mcp import Client

_T = TypeVar("_T")
_MISSING = "MCP servers need the official SDK, which is not installed: pip install 'openelm_mlx[mcp]'."


@final
class McpTool:
    """A server's tool, called with JSON. Its name is the server's, with what a header cannot have as `_`."""

    namespace: str | None = "functions"
    # Servers exist, and what their schemas say beyond the engine is not for their user to change.
    is_lenient = True

    def __init__(self, server: McpServer, name: str, description: str, parameters: dict[str, Any]) -> None:
        self.name = re.sub(r"[^\w.-]", "_", name)
        self.description, self.parameters = description, parameters
        self._server, self._name = server, name

    def __call__(self, arguments: Any) -> str:
        """The tool's result as text. arguments: a dictionary, or JSON. Raises ToolError if that is not so, or it failed."""
        return self._server.call(self._name, arguments_of(arguments, self.name))


@final
class McpServer:
    """A connection to one MCP server; `tools` are its tools. `close` ends it, as a `with` block does.

    source: a command line ("uvx mcp-server-time"), its words in a list, or the address of a server
    ("http://localhost:8000/mcp"). environment: variables for the program, beside the few that it gets anyway. timeout:
    seconds for connecting and for one call. Raises ToolError if the server cannot be reached.
    """

    def __init__(
        self, source: str | list[str], *, environment: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> None:
        self.source = source if isinstance(source, str) else shlex.join(source)
        self._timeout = timeout
        self._last_words = ""
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event | None = None
        self._ready: concurrent.futures.Future[Client] = concurrent.futures.Future()
        # What the program writes to standard error; open as long as the connection is.
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        server = _server(source, environment, self._log)
        self._thread = threading.Thread(target=self._run, args=(server,), name="mcp", daemon=True)
        self._thread.start()
        try:
            self._client = self._ready.result(timeout)
            self.tools = self._wait(self._list_tools())
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and not isinstance(error, ToolError):
                reason = _reason(error) + self._last_words
                raise ToolError(f"The MCP server {self.source!r} did not answer: {reason}.") from error
            raise

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool by the server's name for it, and wait for its result as text."""
        try:
            result = self._wait(self._client.call_tool(name, arguments))
        except ToolError:
            raise
        except Exception as error:  # the SDK, its transport and the server may raise anything
            raise ToolError(f"{name} of the MCP server {self.source!r} failed: {_reason(error)}.") from error
        text = "\n".join(_content_text(part) for part in result.content)
        if not text and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        if result.is_error:
            raise ToolError(text or f"{name} failed and did not say why.")
        return text

    def close(self) -> None:
        """End the connection, and the program if one was started."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(lambda: self._stop.set() if self._stop is not None else None)
        self._thread.join(10.0)
        if not self._log.closed:
            self._log.seek(0)
            lines = self._log.read(1 << 20).split("\n")
            self._last_words = "; ".join(["", *filter(None, map(str.strip, lines))][-2:])[:300]
            self._log.close()

    def __enter__(self) -> McpServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- In the thread ------------------------------------------------------------------------------------------------

    def _run(self, server: Any) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(server))
        except BaseException as error:  # noqa: BLE001  (told to whoever waits for the connection)
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._loop.close()

    async def _serve(self, server: Any) -> None:
        from mcp import Client

        self._stop = asyncio.Event()
        async with Client(server, read_timeout_seconds=self._timeout) as client:
            self._ready.set_result(client)
            await self._stop.wait()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise ToolError(f"The connection to the MCP server {self.source!r} is closed.") from None
        try:
            return future.result(self._timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise ToolError(f"The MCP server {self.source!r} did not answer in {self._timeout:g} seconds.") from None

    async def _list_tools(self) -> list[McpTool]:
        tools: list[McpTool] = []
        cursor = None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            tools += [McpTool(self, each.name, each.description or "", dict(each.input_schema)) for each in page.tools]
            cursor = page.next_cursor
            if not cursor:
                return tools


def read_servers(file: str | Path) -> dict[str, tuple[str | list[str], dict[str, str]]]:
    """The servers of a configuration file as other programs have it: name -> (source, environment).

    The file holds `{"mcpServers": {NAME: {"command": ..., "args": [...], "env": {...}} or {"url": ...}}}`.
    """
    try:
        servers = read_json(Path(file).expanduser(), ToolError)["mcpServers"].items()
        return {
            name: (
                each["url"] if "url" in each else [each["command"], *each.get("args", ())],
                dict(each.get("env", {})),
            )
            for name, each in servers
        }
    except ToolError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(
            f'The MCP configuration {file} is not of the form {{"mcpServers": {{"name": {{"command": ...}}}}}}: '
            f"{type(error).__name__}: {error}."
        ) from None


def _server(source: str | list[str], environment: Mapping[str, str] | None, log: IO[str]) -> Any:
    """What the SDK connects to."""
    try:
        from mcp import StdioServerParameters
        from mcp.client.stdio import stdio_client
    except ImportError:
        raise ToolError(_MISSING) from None
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return source
    try:
        words = shlex.split(source) if isinstance(source, str) else list(source)
    except ValueError as error:
        raise ToolError(f"The MCP server's command {source!r} cannot be read: {error}.") from None
    if not words:
        raise ToolError("An MCP server is a command line or an address, and this is empty.")
    # Of our own variables it gets what the SDK holds for harmless, and where programs are.
    kept = {name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV") if name in os.environ}
    program = StdioServerParameters(command=words[0], args=words[1:], env={**kept, **(environment or {})})
    return stdio_client(program, errlog=cast(TextIO, log))


def _content_text(part: Any) -> str:
    if part.type == "text":
        return part.text
    if part.type == "resource" and getattr(part.resource, "text", None) is not None:
        return part.resource.text
    return f"[{part.type}, which cannot be shown as text]"


def _reason(error: BaseException) -> str:
    """The innermost error's words: task groups wrap them."""
    while isinstance(error, BaseException) and getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")[:300]
