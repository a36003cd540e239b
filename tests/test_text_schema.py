"""Tool text: the trained wording by its hash, each kind of schema by its text, and what is not valid JSON Schema.

That the texts are openai-harmony's for schemas of every shape is shown by the conversations in test_text_harmony.py.
"""

import hashlib

import pytest

from openelm_mlx.errors import SettingError
from openelm_mlx.text.builtin_tools import BROWSER, PYTHON
from openelm_mlx.text.schema import Tool, ToolNamespace, comment_lines, json_text, tools_section, type_text


@pytest.mark.parametrize(
    ("namespaces", "size", "sha256"),
    [
        ([BROWSER], 1559, "b8733e7a73d3d9b12dc9278b57bcb09cb78f2fa3bb482632beba480f13b58b0e"),
        ([PYTHON], 624, "327504a3443ff9a6f9fda24c942c9aea8e32d93487b233825de7d2aa61301502"),
        ([PYTHON, BROWSER], 2176, "2dd2e964247a5297eae90c926d70f3968aa386759006be74910679fa5bd47485"),
    ],
)
def test_built_in_tools_have_the_trained_wording(namespaces, size, sha256):
    text = tools_section(namespaces).encode()
    assert (len(text), hashlib.sha256(text).hexdigest()) == (size, sha256)


def test_section_as_documented():
    """The example of openai/harmony docs/format.md, "Defining available tools"."""
    format_ = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
    place = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
    places = {
        "type": "array",
        "items": {"type": "string"},
        "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
    }
    tools = (
        Tool("get_location", "Gets the location of the user."),
        Tool(
            "get_current_weather",
            "Gets the current weather in the provided location.",
            {"type": "object", "properties": {"location": place, "format": format_}, "required": ["location"]},
        ),
        Tool(
            "get_multiple_weathers",
            "Gets the current weather in the provided list of locations.",
            {"type": "object", "properties": {"locations": places, "format": format_}, "required": ["locations"]},
        ),
    )
    assert tools_section([ToolNamespace("functions", tools=tools)]) == (
        """# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

// Gets the current weather in the provided list of locations.
type get_multiple_weathers = (_: {
// List of city and state, e.g. ["San Francisco, CA", "New York, NY"]
locations: string[],
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions"""
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, "string"),
        ({"type": "integer"}, "number"),
        ({"type": "number"}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": "null"}, "any"),
        ({}, "any"),
        (True, "any"),
        ({"const": 3}, "any"),
        ({"$ref": "#/$defs/x"}, "any"),
        ({"anyOf": [{"type": "string"}]}, "any"),
        ({"enum": ["a"]}, "any"),
        ({"type": "string", "enum": ["a", "b"]}, '"a" | "b"'),
        ({"type": "string", "enum": []}, "string"),
        ({"type": "integer", "enum": [1]}, "number"),
        ({"type": ["integer", "string"]}, "number | string"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "integer"}}, "number[]"),
        ({"type": "array", "items": {"type": "string", "enum": ["x", "y"]}}, '"x" | "y"[]'),
        ({"type": "object"}, "{\n}"),
        ({"type": "object", "properties": {}, "additionalProperties": False}, "{\n}"),
        ({"type": "object", "description": "What"}, "// What\n{\n}"),
        (
            {"oneOf": [{"type": "string", "description": "one"}, {"type": "null", "nullable": True, "default": 1}]},
            "\n | string // one\n | any | null // default: 1",
        ),
        ({"oneOf": [{"type": "string", "enum": ["a"], "default": "a"}]}, '\n | "a" // default: "a"'),
    ],
)
def test_type_text(schema, text):
    assert type_text(schema) == text


@pytest.mark.parametrize(
    ("schema", "lines"),
    [
        ({"type": "string"}, "x?: string,"),
        ({"type": "string", "nullable": True}, "x?: string | null,"),
        ({"type": ["string", "null"], "nullable": True}, "x?: string | null,"),
        ({"type": "string", "enum": ["a"], "nullable": True}, 'x?: "a" | null,'),
        ({"type": "string", "description": "two\nlines"}, "// two\nlines\nx?: string,"),
        ({"type": "string", "title": "T", "description": "D"}, "// T\n//\n// D\nx?: string,"),
        ({"type": "string", "examples": ["a", 1, "b"]}, '// Examples:\n// - "a"\n// - "b"\nx?: string,'),
        ({"type": "string", "default": "s"}, 'x?: string, // default: "s"'),
        ({"type": "string", "enum": ["s"], "default": "s"}, 'x?: "s", // default: s'),
        ({"type": "number", "default": 1.5}, "x?: number, // default: 1.5"),
        ({"default": {"k": [1, "ü"]}}, 'x?: any, // default: {"k":[1,"ü"]}'),
        ({"default": None}, "x?: any, // default: null"),
        (False, "x?: any,"),
        (
            {"type": "object", "description": "D", "properties": {"y": {"type": "string"}}, "required": ["y"]},
            "// D\nx?:     // D\n{\n    y: string,\n    },",
        ),
        (
            {"description": "D", "default": "s", "oneOf": [{"type": "string", "description": "first"}, {"default": 1}]},
            '// D\n// default: "s"\nx?:\n | string\n | any // default: 1\n,',
        ),
        (
            {"description": "D", "oneOf": [{"description": "D", "type": "string"}, {"description": "E"}]},
            "x?:\n | string\n | any // E\n,",
        ),
    ],
)
def test_property_text(schema, lines):
    assert type_text({"type": "object", "properties": {"x": schema}}) == f"{{\n{lines}\n}}"


def test_tool_without_parameters_and_with_any():
    tools = (Tool("none"), Tool("any", "", {}), Tool("empty", "a\r\nb\n", {"type": "object"}))
    assert tools_section([ToolNamespace("functions", "What\nfor", tools)]) == (
        "# Tools\n\n## functions\n\n// What\n// for\nnamespace functions {\n\n"
        "type none = () => any;\n\ntype any = (_: any) => any;\n\n"
        "// a\n// b\ntype empty = (_: {\n}) => any;\n\n} // namespace functions"
    )


def test_namespaces_are_sorted_and_tools_are_not():
    b = ToolNamespace("b", tools=(Tool("z"), Tool("a")))
    text = tools_section([b, ToolNamespace("a", "plain\ntext")])
    assert text.index("## a\n\nplain\ntext\n\n## b") < text.index("type z") < text.index("type a")


def test_comment_lines_end_at_line_feeds_only():
    assert comment_lines("a\u2028b\n\nc\r\nd\re\n") == ["// a\u2028b", "// ", "// c", "// d\re"]
    assert comment_lines("") == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e20, "1e20"),
        (1e16, "1e16"),
        (1e-7, "1e-7"),
        (1e-5, "0.00001"),
        (-1.25e-5, "-0.0000125"),
        (2**64, "1.8446744073709552e19"),
        (2**64 - 1, "18446744073709551615"),
        (-0.0, "-0.0"),
        ({"a": [True, None, "é\n"]}, '{"a":[true,null,"é\\n"]}'),
    ],
)
def test_json_text(value, text):
    assert json_text(value) == text


def test_tool_from_dict():
    inner = {"name": "f", "description": "D", "parameters": {"type": "object"}}
    tool = Tool("f", "D", {"type": "object"})
    assert Tool.from_dict({"type": "function", "function": inner}) == tool
    assert Tool.from_dict({"type": "function", **inner}) == Tool.from_dict(inner) == tool
    assert Tool.from_dict({"name": "f", "description": None, "parameters": None, "strict": True}) == Tool("f")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tool("two words"), "'two words'"),
        (lambda: Tool(""), "''"),
        (lambda: Tool("f", None), "description"),
        (lambda: Tool("f", "", "string"), "parameters of tool 'f' are a str"),
        (lambda: Tool("f", "", {"type": "x"}), "The parameters of tool 'f' cannot be read as JSON Schema"),
        (lambda: Tool.from_dict("f"), "'f'"),
        (lambda: Tool.from_dict({"type": "web_search"}), "'web_search'"),
        (lambda: Tool.from_dict({"type": "function"}), "has no name"),
        (lambda: Tool.from_dict({"type": "function", "function": "f"}), "has no name"),
        (lambda: ToolNamespace("a b"), "'a b'"),
        (lambda: ToolNamespace("a", tools=(Tool("f"), Tool("f"))), "Two tools of 'a' are called 'f'"),
        (lambda: tools_section([PYTHON, PYTHON]), "Two tool namespaces are called 'python'"),
    ],
)
def test_unusable_tool(make, words):
    with pytest.raises(SettingError) as error:
        make()
    assert words in str(error.value)
