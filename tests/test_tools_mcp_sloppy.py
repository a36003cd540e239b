"""MCP servers as they are: tools with faults in them, answers in odd forms, programs that print, die, or say nothing."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

if find_spec("mcp") is None:  # which takes a second to import
    pytest.skip("the MCP SDK is not installed: pip install 'openelm_mlx[mcp]'", allow_module_level=True)

from openelm_mlx.errors import SettingError, ToolError
from openelm_mlx.text.repair import repaired
from openelm_mlx.text.schema import type_text
from openelm_mlx.text.schema_check import check_schema
from openelm_mlx.tools.calls import run
from openelm_mlx.tools.mcp import McpServer
from openelm_mlx.tools.mcp_messages import cleaned_result
from openelm_mlx.tools.tool import ToolSet

PROGRAM = [sys.executable, "-S", "-I", str(Path(__file__).parent / "mcp_sloppy_server.py")]
GOOD = {"name": "good", "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
NAMES = ["silence", "die", "garbage", "wrong id", "flood"]
TOO_LATE = 3.0  # seconds of a call that is never answered


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(tools=(), call=None, **more):
        file = tmp_path / f"{len(servers)}.json"
        file.write_text(json.dumps({"tools": [*tools], "call": call or {}, **more}))
        servers.append(McpServer([*PROGRAM, str(file)]))
        return servers[-1]

    yield start
    for server in servers:
        server._hurry()
        server.close()


def tool(server, name):
    (found,) = [tool for tool in server.tools if tool.name == name]
    return found


SLOPPY = [
    ({"required": None}, "required is null"),
    ({"required": ["a", "a"]}, None),
    ({"enum": None}, "enum is null"),
    ({"description": None}, "description is null"),
    ({"type": "any"}, "type is 'any'"),
    ({"properties": None}, "properties is null"),
    (
        {"properties": {"a": {"type": "any"}, "b": {"enum": None}}},
        "properties.a.type is 'any'; properties.b.enum is null",
    ),
    ({"properties": {"a": None}}, "properties.a is null"),
    ({"properties": {"a": {"type": "array", "items": None}}}, "properties.a.items is null"),
    ({"properties": {"a": {"anyOf": []}}}, "properties.a.anyOf is []"),
    ({"properties": []}, "properties is []"),
    ({"additionalProperties": None}, "additionalProperties is null"),
    ({"type": None}, "type is null"),
    ({"type": "string"}, "type is 'string'"),
    ({"$ref": "http://127.0.0.1:9/x"}, None),
    ({"properties": {"a": {"pattern": "(?=x)"}}}, None),
    ({"properties": {"a": {"type": "integer", "minimum": 3, "maximum": 1}}, "required": ["a"]}, None),
    ({"required": ["a"], "properties": {"a": {"$ref": "#"}}}, None),
]


@pytest.mark.parametrize(("schema", "fault"), SLOPPY, ids=lambda value: json.dumps(value)[:40])
def test_a_schema_with_faults_is_held_to_what_is_right_of_it(schema, fault):
    schema = {"type": "object", **schema}
    kept, faults = repaired(schema)
    assert "; ".join(faults) == (fault or "")
    check_schema(kept, "It")
    assert kept["type"] == "object"
    assert type_text(kept)


@pytest.mark.parametrize("schema", [None, [], [{"type": "object"}], True, False, "object", 3], ids=repr)
def test_no_schema_is_one_of_any_object(schema):
    kept, faults = repaired(schema)
    assert kept == {"type": "object"}
    assert len(faults) == 1


def test_what_is_right_is_not_touched():
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "$defs": {"x": True},
        "required": ["a"],
        "x-y": None,
    }
    assert repaired(schema) == (schema, [])
    deep = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    kept, faults = repaired(deep)
    assert faults == ["it is nested more than 64 levels deep"]
    check_schema(kept, "It")
    assert kept["properties"]["a"]["properties"]["a"]["type"] == "object"


def test_one_sloppy_tool_costs_no_other(serve):
    others = [{"name": f"t{i}", "inputSchema": {"type": "object", **schema}} for i, (schema, _) in enumerate(SLOPPY)]
    odd = [
        {"name": "none"}, {"name": "list", "inputSchema": []}, {"name": "yes", "inputSchema": True},
        {"name": "described", "description": None, "inputSchema": {}}, {"name": "numbered", "description": 3, "annotations": 7},
        {"name": "half \ud800", "inputSchema": {}}, {"name": None}, {"inputSchema": {}}, 5, None, {"name": ""},
        {"name": "two words"}, {"name": "two_words"}, {"name": "näme"}, {"name": "n" * 300}, {"name": "python"},
        {"name": "said", "description": "\udfff"},
        {"name": "out", "outputSchema": {"$ref": "http://127.0.0.1:9/x"}},
    ]  # fmt: skip
    server = serve([*odd, *others, GOOD])
    names = [each.name for each in server.tools]
    assert names[:5] == ["none", "list", "yes", "described", "numbered"]
    assert names[5:11] == ["two_words", "näme", "n" * 64, "python_", "said", "out"]
    assert names[11:] == [f"t{i}" for i in range(len(SLOPPY))] + ["good"]
    notes = "\n".join(server.notes)
    assert "the tool 'half �' is left out: its name is not valid Unicode" in notes
    assert "a second tool 'two_words' is left out" in notes
    assert "the schema of t0 has faults, which are ignored (required is null)" in notes
    assert notes.count("a tool without a name is left out") == 5
    assert "good" not in notes
    notes.encode()
    tools = ToolSet(server.tools)
    assert "functions.good" in tools.formats
    assert run(tool(server, "two_words"), '{"a": "\\ud800"}') == '{"a": "\\ufffd"}'
    assert run(tool(server, "out"), "{}") == "{}"  # with the text alone, against its own words
    with pytest.raises(ValueError, match="not of type integer"):
        run(tool(server, "good"), '{"a": "x"}')


RESULTS = [
    ({"content": [{"type": "image", "data": "", "mimeType": "image/png"}]},
     "[an image (image/png), which cannot be shown as text]"),
    ({"content": [{"type": "audio", "data": "", "mimeType": "audio/wav"}]},
     "[an audio (audio/wav), which cannot be shown as text]"),
    ({"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}}]}, "inside"),
    ({"content": [{"type": "resource", "resource": {"uri": "file:///a", "blob": "AA=="}}]},
     "[a resource, file:///a, which is not text]"),
    ({"content": [{"type": "resource_link", "uri": "file:///a", "name": "A"}]}, "[a link to A: file:///a]"),
    ({"content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}, "one\ntwo"),
    ({"content": [{"type": "hologram", "x": 1}]}, '{"type": "hologram", "x": 1}'),
    ({"content": [{"type": "text"}, None, "words"]}, '{"type": "text"}\nnull\nwords'),
    ({"content": "words"}, "words"),
    ({"content": None, "structuredContent": {"a": 1}}, '{"a": 1}'),
    ({"structuredContent": {"a": "\ud800"}}, '{"a": "�"}'),
    ({"content": [], "structuredContent": None, "isError": None}, ""),
    ({"content": [{"type": "text", "text": "half \ud800"}]}, "half �"),
]  # fmt: skip


def test_every_kind_of_result_is_text_for_the_model(serve):
    server = serve(
        [{"name": f"r{i}"} for i in range(len(RESULTS))], {f"r{i}": each for i, (each, _) in enumerate(RESULTS)}
    )
    for i, (_, text) in enumerate(RESULTS):
        assert tool(server, f"r{i}")("{}") == text


def test_errors_are_told_to_the_model(serve):
    error = {"content": [{"type": "text", "text": "no such city"}], "isError": True}
    server = serve(
        [{"name": "a"}, {"name": "b"}, {"name": "c"}], {"a": error, "b": {"isError": True}, "c": {"what": "ever"}}
    )
    with pytest.raises(ToolError, match=r"^no such city$"):
        tool(server, "a")("{}")
    with pytest.raises(ToolError, match=r"^b failed and did not say why\.$"):
        tool(server, "b")("{}")
    with pytest.raises(ToolError, match="what it sent does not follow the MCP format"):
        tool(server, "c")("{}")


def test_programs_that_print_die_or_say_nothing(serve):
    server = serve([GOOD, *({"name": name} for name in NAMES)], {name: name for name in NAMES})
    assert tool(server, "garbage")("{}") == "all the same"
    assert tool(server, "flood")("{}") == "all the same"
    assert len(server._log.errors) <= 1 << 16
    server._timeout = 0.2
    for name in ("silence", "wrong_id"):
        with pytest.raises(ToolError, match=r"did not answer in 0\.2 seconds"):
            tool(server, name)("{}")
    server._timeout = 60
    assert tool(server, "good")('{"a": 1}') == '{"a": 1}'  # it goes on
    for _ in range(2):
        with pytest.raises(ToolError, match=r"has ended; it ran out of apples\.$"):
            tool(server, "die")("{}")


def test_a_list_without_an_end_ends(serve):
    assert [each.name for each in serve([GOOD], page={"nextCursor": "again"}).tools] == ["good"]


def test_the_time_limit_is_what_it_says(tmp_path, monkeypatch):
    """All that a connection waits for counts against one limit, and a program that stays is gone with its connection."""
    waits, threads = [], []
    result, clock = McpServer._result, iter([100.0, 102.5])

    def counted(self, future, seconds):
        waits.append(seconds)
        threads.append(self)
        return result(self, future, 0.05 if seconds < 60 else seconds)

    monkeypatch.setattr(McpServer, "_result", counted)
    (tmp_path / "a").write_text(json.dumps({"before": "stay"}))
    with pytest.raises(ToolError, match=r"did not answer in 3 seconds\.$"):
        McpServer([*PROGRAM, str(tmp_path / "a")], timeout=3.0)
    assert waits == [3.0]
    assert not threads[0]._thread.is_alive()
    # The list of tools has what connecting has left.
    waits.clear()
    monkeypatch.setattr("openelm_mlx.tools.mcp.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        McpServer, "_result", lambda self, future, seconds: waits.append(seconds) or result(self, future, 60)
    )
    (tmp_path / "b").write_text(json.dumps({"tools": [GOOD], "call": {}}))
    with McpServer([*PROGRAM, str(tmp_path / "b")], timeout=3.0):
        assert waits == [3.0, 0.5]


def test_other_answers_stay_as_they_are():
    for result in ({"protocolVersion": "x", "capabilities": {"tools": {}}}, {}, None, [1], {"resources": [1]}):
        assert cleaned_result(result, pytest.fail) == result


def test_the_program_is_gone_after_a_failure(tmp_path):
    child = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print('hello'); input()"
    with pytest.raises(ToolError, match="on its standard output, where only messages belong, it said 'hello'"):
        McpServer([sys.executable, "-S", "-I", "-c", child], timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_server_s_tool_whose_calls_cannot_end_is_not_held():
    class Endless:
        namespace, name, description = "functions", "endless", ""
        parameters, is_lenient = {"type": "object"}, True

    def refuse():
        raise SettingError("The answer's format is too large for the engine.")

    for completion in (lambda: None, refuse):
        engine = SimpleNamespace(matcher=lambda call, completion=completion: SimpleNamespace(completion=completion))
        tools = ToolSet([Endless()])
        tools.check_ends(engine)
        assert tools.unfollowed == ["functions.endless"]
        own = Endless()
        own.is_lenient = False
        with pytest.raises(ToolError, match=r"^No call of the tool functions\.endless could be finished: .*[a-z]\.$"):
            ToolSet([own]).check_ends(engine)
