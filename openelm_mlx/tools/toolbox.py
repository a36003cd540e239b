"""Tools by name, as a command line gives them: "python,files=~/notes,patch=.,mcp=servers.json".

A tool is off unless it is named. What it may do is described in its file: python_tool.py, patch.py, files.py, mcp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, final

from ..arguments import FLAG, FUNCTION, TEXT, checked_call
from ..errors import ToolError

KINDS = {
    "calculator": "calculator: arithmetic",
    "python": "python: run Python in a sandbox",
    "files": "files=DIR: search and read the text files of a folder",
    "patch": "patch=DIR: change the text files of a folder",
    "mcp": "mcp=SERVER: the tools of an MCP server: a command, an address, or a file with mcpServers",
}

TOOL_NAMES = TEXT._replace(wanted='give names with commas, as in "calculator,files=~/notes"')
_WITHOUT_VALUE = ("calculator", "python")


@final
@checked_call("Toolbox", ToolError, names=TOOL_NAMES, allow_unsandboxed=FLAG, count_tokens=FUNCTION)
class Toolbox:
    """The tools in `names`, as `tools`; `close` ends their processes, as a `with` block does.

    `notes` are sentences about tools of MCP servers that are left out, or whose schema is not fully enforced.

    names: separated by commas. allow_unsandboxed: python may run where the machine has no sandbox. count_tokens: how many
    tokens a text has for the model, for the size of file views. Raises ToolError for a tool that is unknown, named twice, or
    cannot be started.
    """

    def __init__(
        self, names: str, *, allow_unsandboxed: bool = False, count_tokens: Callable[[str], int] | None = None
    ) -> None:
        self.tools: list[Any] = []
        self.notes: list[str] = []
        self._allow_unsandboxed, self._count_tokens = allow_unsandboxed, count_tokens
        with ExitStack() as stack:
            for kind, value in parse_names(names):
                self._add(self._open(kind, value, stack))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the processes and connections of the tools."""
        self._stack.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, kind: str, value: str, stack: ExitStack) -> list[Any]:
        if kind == "calculator":
            from .arithmetic import calculator
            from .tool import function_tool

            return [function_tool(calculator)]
        if kind == "python":
            from .python_tool import PythonTool

            return [stack.enter_context(PythonTool(allow_unsandboxed=self._allow_unsandboxed))]
        if kind == "files":
            from .files import FileBrowser

            return list(FileBrowser(value, self._count_tokens).tools)
        if kind == "patch":
            from .patch import PatchTool

            return [PatchTool(value)]
        from .mcp import McpServer, read_servers

        servers = list(read_servers(value).values()) if value.endswith(".json") else [(value, {})]
        opened = [stack.enter_context(McpServer(source, environment=own)) for source, own in servers]
        self.notes += [note for server in opened for note in server.notes]
        return [tool for server in opened for tool in server.tools]

    def _add(self, tools: list[Any]) -> None:
        """Add tools; of two with the same name only the first, since servers do not know of each other."""
        names = {(tool.namespace, tool.name) for tool in self.tools}
        for tool in tools:
            if (name := (tool.namespace, tool.name)) in names:
                self.notes.append(f"A second tool {tool.name!r} is left out: another one has its name.")
                continue
            names.add(name)
            self.tools.append(tool)


def parse_names(names: str) -> list[tuple[str, str]]:
    """Kinds and values of "python,files=DIR". Raises ToolError for an unknown kind, or a missing or superfluous value."""
    found: list[tuple[str, str]] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        kind, has_value, value = name.partition("=")
        if kind not in KINDS:
            raise ToolError(f"There is no tool {kind!r}. There are: {'; '.join(KINDS.values())}.")
        if kind in _WITHOUT_VALUE and has_value:
            raise ToolError(f"{name!r} gives {kind} a value, and it takes none.")
        if kind not in _WITHOUT_VALUE and not value:
            raise ToolError(f"{kind!r} lacks its value: {KINDS[kind]}.")
        if kind != "mcp" and kind in dict(found):
            raise ToolError(f"{kind!r} is named twice.")
        found.append((kind, value))
    return found
