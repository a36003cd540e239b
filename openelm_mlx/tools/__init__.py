"""Tools that a model may call: calculator, python in a sandbox, patches, local files, MCP servers, and your functions.

from openelm_mlx.tools import calculator

chat = om.Chat(model, tokenizer, tools=[calculator])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module. Loaded on first use: a program pays only for the tools that it uses.
_PUBLIC = {
    "Tool": "tool",
    "FunctionTool": "tool",
    "function_tool": "tool",
    "Toolbox": "toolbox",
    "calculator": "arithmetic",
    "PythonTool": "python_tool",
    "FileBrowser": "files",
    "PatchTool": "patch",
    "apply_patch": "patch",
    "McpServer": "mcp",
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from .arithmetic import calculator as calculator
    from .files import FileBrowser as FileBrowser
    from .mcp import McpServer as McpServer
    from .patch import PatchTool as PatchTool
    from .patch import apply_patch as apply_patch
    from .python_tool import PythonTool as PythonTool
    from .tool import FunctionTool as FunctionTool
    from .tool import Tool as Tool
    from .tool import function_tool as function_tool
    from .toolbox import Toolbox as Toolbox


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
