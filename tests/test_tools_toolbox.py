"""Tools by name: what is opened, what is refused, and that closing ends it."""

import json
import sys
from pathlib import Path

import pytest

from openelm_mlx.errors import ToolError
from openelm_mlx.tools import sandbox
from openelm_mlx.tools.toolbox import Toolbox, parse_names

SERVER = Path(__file__).parent / "mcp_server.py"
BARE_SERVER = SERVER.with_name("mcp_sloppy_server.py")  # which starts at once


def test_nothing_is_on_unless_it_is_named():
    with Toolbox("") as box:
        assert box.tools == []


def test_files_and_patch(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with Toolbox(f"files={tmp_path}, patch={tmp_path}", count_tokens=len) as box:
        assert [(t.namespace, t.name) for t in box.tools] == [
            ("browser", "search"), ("browser", "open"), ("browser", "find"), ("functions", "apply_patch"),
        ]  # fmt: skip
        assert "hello" in box.tools[1]('{"id": "a.txt"}')


def test_python_and_its_end():
    if sys.platform != "linux" or sandbox.namespaces_fail():
        pytest.skip("no sandbox")
    with Toolbox("python") as box:
        (tool,) = box.tools
        assert tool("2 ** 10") == "1024"
        scratch = tool.scratch
        assert scratch.exists()
    assert not scratch.exists()


def test_servers_from_a_file(tmp_path):
    pytest.importorskip("mcp")
    file = tmp_path / "servers.json"
    server = {"command": sys.executable, "args": [str(SERVER)]}
    file.write_text(json.dumps({"mcpServers": {"one": server}}))
    with Toolbox(f"mcp={file}") as box:
        assert box.tools[0]('{"a": 1, "b": 2}') == "3"
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"tools": [{"name": "add", "inputSchema": {"type": "object"}}], "call": {}}))
    server = {"command": sys.executable, "args": ["-S", "-I", str(BARE_SERVER), str(answers)]}
    file.write_text(json.dumps({"mcpServers": {"one": server, "two": server}}))
    with Toolbox(f"mcp={file}") as box:
        assert len({tool.name for tool in box.tools}) == len(box.tools) == len(box.notes)
        assert "A second tool 'add' is left out: another one has its name." in box.notes


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("shell", "There is no tool 'shell'"),
        ("files", "lacks its value"),
        ("files=", "lacks its value"),
        ("python=3", "takes none"),
        ("python,python", "named twice"),
        ("patch=.,patch=.", "named twice"),
        ("files=/nowhere/at/all", "not a folder"),
        ("mcp=/nowhere/servers.json", "cannot be read"),
    ],
)
def test_mistakes_are_said(names, says):
    with pytest.raises(ToolError, match=says):
        Toolbox(names)


def test_names_are_read():
    assert parse_names("python, files=~/a=b,") == [("python", ""), ("files", "~/a=b")]
