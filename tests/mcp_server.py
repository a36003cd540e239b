"""A small MCP server for the tests, made with the official SDK; run as a program it talks over stdin and stdout."""

import os

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("things")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="greet someone")
def greet(name: str, polite: bool = False) -> str:
    """Greet someone."""
    return f"Good day, {name}." if polite else f"Hi {name} 🐔"


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ToolError("it cannot be done")


@server.tool()
def variable(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "not set")


if __name__ == "__main__":
    server.run()
