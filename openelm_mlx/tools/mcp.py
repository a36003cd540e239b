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
import shlex
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, final

from ..arguments import SECONDS, VARIABLES, Kind, checked_call
from ..errors import ToolError
from ..files import expanded, read_json
from .mcp_messages import cleaned_result, content_text, name_for_model, whole
from .tool import arguments_of

if TYPE_CHECKING:
    from mcp import Client

    from .mcp_program import Log

_T = TypeVar("_T")
_MISSING = "MCP servers need the official SDK, which is not installed: pip install 'openelm_mlx[mcp]'."
_SOURCE = Kind(
    lambda value: (
        isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value))
    ),
    'give a command line such as "uvx mcp-server-time", its words in a list, or an address',
)
_CLOSE_SECONDS = 5.0  # more than a program takes to be ended


@final
class McpTool:
    """A server's tool, called with JSON. It has the server's name, with `_` for characters that a header cannot have."""

    namespace: str | None = "functions"
    # A user cannot change a server's schema, so what the engine cannot follow in it is only checked afterwards.
    is_lenient = True

    def __init__(self, server: McpServer, name: str, description: str, parameters: dict[str, Any]) -> None:
        self.name = name_for_model(name)
        self.description, self.parameters = description, parameters
        self._server, self._name = server, name

    def __call__(self, arguments: Any) -> str:
        """The tool's result as text. arguments: a dictionary, or JSON. Raises ToolError for others, and if the call failed."""
        return self._server.call(self._name, arguments_of(arguments, self.name))


@final
@checked_call("McpServer", ToolError, source=_SOURCE, environment=VARIABLES, timeout=SECONDS)
class McpServer:
    """A connection to one MCP server; `tools` are its tools. `close` ends it, as a `with` block does.

    source: a command line ("uvx mcp-server-time"), its words in a list, or the address of a server
    ("http://localhost:8000/mcp"). environment: variables for the program, in addition to the few that it always gets.
    timeout: seconds for connecting, including the list of tools, and for one call. `notes` are sentences about tools that
    were left out, or whose schema is not fully enforced. Raises ToolError if the server cannot be reached.
    """

    def __init__(
        self, source: str | list[str], *, environment: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> None:
        self.source = source if isinstance(source, str) else shlex.join(source)
        self.notes: list[str] = []
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[Any] | None = None
        self._stop: asyncio.Event | None = None
        self._ready: concurrent.futures.Future[Client] = concurrent.futures.Future()
        self._log: Log | None = None
        server = self._transport(source, environment)
        self._thread = threading.Thread(target=self._run, args=(server,), name="mcp", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + timeout
        try:
            self._client = self._result(self._ready, timeout)
            self.tools = self._wait(self._list_tools(), deadline - time.monotonic())
        except BaseException as error:
            self._hurry()
            self.close()
            if isinstance(error, Exception):
                reason = "" if isinstance(error, ToolError) else f": {_reason(error)}"
                within = f" in {timeout:g} seconds" if isinstance(error, ToolError) else ""
                raise ToolError(
                    f"The MCP server {self.source!r} did not answer{within}{reason}{self._last_words()}."
                ) from error
            raise

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool by the server's name for it, and wait for its result as text."""
        try:
            result = self._wait(self._client.call_tool(name, whole(arguments)), self._timeout)
        except ToolError:
            raise
        except Exception as error:  # the SDK, its transport and the server may raise anything
            if self._log is not None and self._log.has_ended:
                raise ToolError(f"The MCP server {self.source!r} has ended{self._last_words()}.") from error
            raise ToolError(f"{name} of the MCP server {self.source!r} failed: {_reason(error)}.") from error
        text = "\n".join(map(content_text, result.content))
        if not text and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        if result.is_error:
            raise ToolError(text or f"{name} failed and did not say why.")
        return text

    def close(self) -> None:
        """End the connection, and the program if one was started."""
        self._in_loop(lambda: self._stop.set() if self._stop is not None else None)
        self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> McpServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hurry(self) -> None:
        """Cancel whatever the connection waits for: it has failed, and the caller has waited long enough."""
        if self._log is not None:
            self._log.is_hurried = True
        self._in_loop(lambda: self._main.cancel() if self._main is not None else None)

    def _in_loop(self, action: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(action)

    def _last_words(self) -> str:
        return "" if self._log is None else self._log.last_words()

    def _wait(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise ToolError(f"The connection to the MCP server {self.source!r} is closed.") from None
        return self._result(future, seconds)

    def _result(self, future: concurrent.futures.Future[_T], seconds: float) -> _T:
        """The result of a future. This is a connection's only timeout: the SDK's own would race with it."""
        try:
            return future.result(max(seconds, 0))
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise ToolError(f"The MCP server {self.source!r} did not answer in {self._timeout:g} seconds.") from None
        except BaseException:
            future.cancel()  # Ctrl-C: the result is not needed any more
            raise

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

        self._stop, self._main = asyncio.Event(), asyncio.current_task()
        async with Client(server) as client:
            if not self._ready.cancelled():
                self._ready.set_result(client)
            await self._stop.wait()

    async def _list_tools(self) -> list[McpTool]:
        tools: dict[str, McpTool] = {}
        cursor = None
        seen: set[str | None] = set()
        while cursor not in seen:  # some servers repeat the same page for ever
            seen.add(cursor)
            page = await self._client.list_tools(cursor=cursor)
            for each in page.tools:
                tool = McpTool(self, each.name, each.description or "", dict(each.input_schema))
                if tool.name in tools:
                    self._note(f"a second tool {tool.name!r} is left out")
                tools.setdefault(tool.name, tool)
            cursor = page.next_cursor
            if not cursor:
                break
        return list(tools.values())

    def _note(self, text: str) -> None:
        sentence = f"MCP server {self.source!r}: {text}."
        if sentence not in self.notes:  # the SDK may list the tools again at any time
            self.notes.append(sentence)

    def _transport(self, source: str | list[str], environment: Mapping[str, str] | None) -> Any:
        """What the SDK connects to."""
        try:
            import mcp  # noqa: F401
            from mcp.client.streamable_http import streamable_http_client

            from .mcp_program import Log, program
        except ImportError:
            raise ToolError(_MISSING) from None
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            return _cleaned(streamable_http_client(source), self._note)
        try:
            words = shlex.split(source) if isinstance(source, str) else list(source)
        except ValueError as error:
            raise ToolError(f"The MCP server's command {source!r} cannot be read: {error}.") from None
        if not words:
            raise ToolError("An MCP server is a command line or an address, and this is empty.")
        self._log = Log()
        # Of our environment it gets the variables that the SDK considers harmless, and PATH.
        kept = {name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV") if name in os.environ}
        return program(words, {**kept, **(environment or {})}, self._log, self._note)


@contextlib.asynccontextmanager
async def _cleaned(transport: Any, note: Any) -> AsyncIterator[tuple[Any, Any]]:
    async with transport as (messages, answers):
        yield _CleanStream(messages, note), answers


@final
class _CleanStream:
    """The messages of another stream, with sloppy results corrected."""

    def __init__(self, messages: Any, note: Any) -> None:
        self._messages, self._note = messages, note

    async def receive(self) -> Any:
        return self._clean(await self._messages.receive())

    async def aclose(self) -> None:
        await self._messages.aclose()

    def __aiter__(self) -> _CleanStream:
        return self

    async def __anext__(self) -> Any:
        return self._clean(await self._messages.__anext__())

    async def __aenter__(self) -> _CleanStream:
        await self._messages.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._messages.__aexit__(*error)

    @property
    def last_context(self) -> Any:
        """An attribute that the SDK expects of some streams."""
        return getattr(self._messages, "last_context", None)

    def _clean(self, item: Any) -> Any:
        message: Any = getattr(item, "message", None)
        if isinstance(getattr(message, "result", None), dict):
            message.result = cleaned_result(message.result, self._note)
        return item


def read_servers(file: str | Path) -> dict[str, tuple[str | list[str], dict[str, str]]]:
    """The servers in a configuration file in the usual format: name -> (source, environment).

    The file holds `{"mcpServers": {NAME: {"command": ..., "args": [...], "env": {...}} or {"url": ...}}}`.
    """
    try:
        servers = read_json(expanded(file, ToolError), ToolError)["mcpServers"].items()
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


def _reason(error: BaseException) -> str:
    """The innermost error's message: task groups wrap errors."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    if isinstance(error, ValueError) and hasattr(error, "error_count"):  # pydantic's, with several lines for each fault
        return "what it sent does not follow the MCP format"
    return f"{type(error).__name__}: {error}".rstrip(": .").replace("\n", " ")[:300]
