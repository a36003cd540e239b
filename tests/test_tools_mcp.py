"""MCP servers as tools, with a real server in a process of its own."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("mcp") is None:  # which takes a second to import
    pytest.skip("the MCP SDK is not installed: pip install 'openelm_mlx[mcp]'", allow_module_level=True)

from openelm_mlx.errors import ToolError
from openelm_mlx.text.schema import Tool, ToolNamespace, tools_section
from openelm_mlx.tools import mcp as room
from openelm_mlx.tools.mcp import McpServer, read_servers

COMMAND = [sys.executable, str(Path(__file__).parent / "mcp_server.py")]
# One without the SDK, which takes over a second to import: for what becomes of a server's process.
BARE = [sys.executable, "-S", "-I", str(Path(__file__).parent / "mcp_sloppy_server.py")]


@pytest.fixture(scope="module")
def server():
    with McpServer(COMMAND, environment={"MINE": "yes"}) as server:
        yield server


@pytest.fixture
def bare(tmp_path):
    """The command of a server with a tool that does this."""

    def command(does):
        file = tmp_path / "answers.json"
        file.write_text(
            json.dumps({"tools": [{"name": "it", "inputSchema": {"type": "object"}}], "call": {"it": does}})
        )
        return [*BARE, str(file)]

    return command


def tool(server, name):
    (found,) = [tool for tool in server.tools if tool.name == name]
    return found


def test_its_tools_are_listed_and_called(server):
    assert [t.name for t in server.tools] == ["add", "greet_someone", "fail", "variable"]
    add = tool(server, "add")
    assert (add.namespace, add.description) == ("functions", "Add two numbers.")
    assert set(add.parameters["properties"]) == {"a", "b"}
    assert add({"a": 2, "b": 40}) == add('{"a": 2, "b": 40}') == "42"
    assert tool(server, "greet_someone")('{"name": "Ada"}') == "Hi Ada 🐔"
    assert tool(server, "greet_someone")('{"name": "Ada", "polite": true}') == "Good day, Ada."


def test_gpt_oss_can_be_told_of_them(server):
    tools = tuple(Tool(t.name, t.description, t.parameters) for t in server.tools)
    assert "type greet_someone = (_: {" in tools_section([ToolNamespace("functions", None, tools)])


def test_errors_are_told(server):
    with pytest.raises(ToolError, match="it cannot be done"):
        tool(server, "fail")("{}")
    for arguments in ("[1]", "{", "3"):
        with pytest.raises(ToolError):
            tool(server, "add")(arguments)
    with pytest.raises(ToolError):
        tool(server, "add")('{"a": "many"}')
    assert tool(server, "add")('{"a": 1, "b": 1}') == "2"


def test_it_gets_its_own_variables_and_not_ours(server, bare, monkeypatch):
    assert tool(server, "variable")('{"name": "MINE"}') == "yes"
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with McpServer(bare("environment"), environment={"MINE": "too"}) as fresh:
        seen = json.loads(tool(fresh, "it")("{}"))
    assert seen["MINE"] == "too"
    assert "SECRET_TOKEN" not in seen


def test_a_slow_call_ends_in_time(bare):
    with McpServer(bare("silence")) as slow:
        slow._timeout = 0.5
        with pytest.raises(ToolError, match=r"0\.5 seconds"):
            tool(slow, "it")("{}")


def test_a_server_that_ends_is_an_error_not_a_hang(bare):
    with McpServer(bare("die")) as server, pytest.raises(ToolError, match="it ran out of apples"):
        tool(server, "it")("{}")


def test_a_server_that_is_not_there_is_an_error():
    for source in ("/nowhere/server", [sys.executable, "-c", "raise SystemExit(1)"], "http://127.0.0.1:9/mcp"):
        with pytest.raises(ToolError, match="did not answer"):
            McpServer(source)
    with pytest.raises(ToolError, match="no such module: things"):
        McpServer([sys.executable, "-c", "raise SystemExit('no such module: things')"])
    for source in ("", "'unbalanced"):
        with pytest.raises(ToolError):
            McpServer(source)


def test_after_close_nothing_is_left(bare):
    before = threading.active_count()
    other = McpServer(bare("environment"))
    it = tool(other, "it")
    other.close()
    other.close()
    assert threading.active_count() == before
    with pytest.raises(ToolError, match="closed"):
        it("{}")


def test_calls_from_two_threads(server):
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(tool(server, "add")(json.dumps({"a": n, "b": 1}))))
        for n in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["1", "2", "3", "4", "5"]


def test_a_configuration_file_of_other_programs(tmp_path):
    file = tmp_path / "mcp.json"
    servers = {
        "things": {"command": COMMAND[0], "args": COMMAND[1:], "env": {"A": "b"}},
        "far": {"url": "https://x/mcp"},
    }
    file.write_text(json.dumps({"mcpServers": servers}))
    assert read_servers(file) == {"things": (COMMAND, {"A": "b"}), "far": ("https://x/mcp", {})}
    for text in ("{", "[]", '{"mcpServers": {"x": {}}}', '{"mcpServers": 3}'):
        file.write_text(text)
        with pytest.raises(ToolError, match=r"mcp\.json"):
            read_servers(file)
    with pytest.raises(ToolError, match="cannot be read"):
        read_servers(tmp_path / "none.json")


def test_without_the_sdk_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ToolError, match=r"openelm_mlx\[mcp\]"):
        room.McpServer("anything")


def test_over_http():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = f"import mcp_server; mcp_server.server.run('streamable-http', host='127.0.0.1', port={port})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        with McpServer(f"http://127.0.0.1:{port}/mcp") as server:
            assert tool(server, "add")('{"a": 20, "b": 1}') == "21"
    finally:
        process.kill()
        process.wait()
