"""Tools made of functions: their schemas, their arguments and results, how a set is shown, and what is refused."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from openelm_mlx.errors import ToolError
from openelm_mlx.tools import calculator
from openelm_mlx.tools.tool import FunctionTool, ToolSet, function_tool, plain_schema, result_text


class Place(BaseModel):
    city: str
    title: str = "home"


class Tree(BaseModel):
    children: list["Tree"] = []


def search(query: str, count: int = 3, kind: Literal["web", "news"] = "web", near: Place | None = None) -> list[str]:
    """Searches for something.

    Slowly.

    Args:
        query: what to look for
        count: how many results
    """
    return [f"{query} {kind} {near.city if near else ''}".strip()] * count


def test_a_function_s_hints_and_docstring_become_a_schema():
    tool = function_tool(search)
    assert (tool.name, tool.description, tool.namespace) == ("search", "Searches for something.\nSlowly.", "functions")
    properties = tool.parameters["properties"]
    assert properties["query"] == {"description": "what to look for", "type": "string"}
    assert properties["count"] == {"default": 3, "description": "how many results", "type": "integer"}
    assert properties["kind"] == {"default": "web", "enum": ["web", "news"], "type": "string"}
    assert properties["near"]["anyOf"][0]["properties"]["title"] == {"default": "home", "type": "string"}
    assert tool.parameters["required"] == ["query"]


def test_arguments_are_converted_and_results_are_json():
    tool = function_tool(search)
    assert tool({"query": "mlx", "count": 1, "near": {"city": "Oslo"}}) == '["mlx web Oslo"]'
    for wrong in ({}, {"query": "x", "count": "many"}, {"query": "x", "unknown": 1}):
        with pytest.raises(ValidationError):
            tool(wrong)


def test_descriptions_may_stand_in_the_hints():
    def add(a: Annotated[int, Field(description="the first", ge=0)], b: int = 0) -> int:
        """Adds."""
        return a + b

    tool = function_tool(add)
    assert tool.parameters["properties"]["a"] == {"description": "the first", "minimum": 0, "type": "integer"}
    assert tool({"a": 2}) == "2"


def test_a_schema_that_contains_itself_keeps_its_definition():
    schema = plain_schema(Tree.model_json_schema())
    assert schema["properties"]["children"]["items"]["$ref"] == "#/$defs/Tree"
    assert "Tree" in schema["$defs"]
    assert "$defs" not in plain_schema(Place.model_json_schema())


def test_results_that_json_cannot_say():
    assert result_text("as it is") == "as it is"
    assert result_text({"a": [1, None]}) == '{"a":[1,null]}'
    with pytest.raises(TypeError, match="object"):
        result_text(object())


def nameless():
    return lambda x: x


def with_arguments(*args: int) -> int:
    return sum(args)


def of_a_type_that_is_none(x: "Nothing") -> int:  # noqa: F821
    return 0


def returns_a_thread(x: int) -> "threading.Thread":  # noqa: F821
    return None


@pytest.mark.parametrize("function", [nameless(), with_arguments, of_a_type_that_is_none, returns_a_thread])
def test_functions_that_cannot_be_tools(function):
    with pytest.raises(ToolError):
        function_tool(function)


class Python:
    name, namespace = "python", None
    description = "runs code"
    parameters = None

    def __call__(self, arguments):
        return f"ran {arguments}"


class Search:
    name, namespace, description = "find", "library", "finds books"

    @property
    def parameters(self):
        return {"type": "object", "properties": {}}

    def __call__(self, arguments):
        return "a book"


def test_a_toolbox_knows_where_each_tool_is_shown_and_what_a_call_means():
    box = ToolSet([search, Python(), Search()])
    assert box.names == ["functions.search", "python", "library.find"]
    assert [tool.name for tool in box.functions] == ["search"]
    assert [content.name for content in box.built_in] == ["python"]
    assert [namespace.name for namespace in box.namespaces] == ["library"]
    # gpt-oss may leave out or add "functions."
    assert box.find("search")[0] == "functions.search"
    assert box.find("functions.python")[0] == "python"
    assert box.find("nothing") is None
    assert not ToolSet()


@pytest.mark.parametrize("name", ["python", "browser", "functions", "analysis", "assistant"])
def test_reserved_names(name):
    tool = FunctionTool(print, name, "", {"type": "object"}, None)
    with pytest.raises(ToolError, match=name):
        ToolSet([tool])


def test_duplicate_names_and_schemas_that_are_none():
    with pytest.raises(ToolError, match=r"Two tools are called functions\.search"):
        ToolSet([search, search])
    with pytest.raises(ToolError, match="nothing"):
        ToolSet([FunctionTool(print, "show", "", {"type": "object", "properties": {"a": {"type": "nothing"}}}, None)])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 30", "42"),
        ("2 ** 10", "1024"),
        ("2^3", "8"),
        ("-7 // 2", "-4"),
        ("sqrt(2)*0", "0.0"),
        ("max(1, pi)", None),
    ],
)
def test_the_calculator(expression, value):
    assert calculator(expression) == value if value else calculator(expression).startswith("3.14159")


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "(1).real", "open('x')", "2 ** 9999999", "9 ** 9 ** 9", "x + 1", "'a' * 9", "1 +", "", "True",
     "(-8) ** 0.5", "1 if 1 else 2", "[1]", "1" * 2000],
)  # fmt: skip
def test_what_the_calculator_refuses(expression):
    with pytest.raises(ValueError):
        calculator(expression)


UNFOLLOWED = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}, "required": ["a"]}


def test_a_schema_that_calls_cannot_be_held_to_is_refused_before_anything_is_generated():
    with pytest.raises(
        ToolError, match=r"arguments' schema of the tool functions\.show cannot be enforced.*Use simpler types"
    ):
        ToolSet([FunctionTool(print, "show", "", UNFOLLOWED, None)])


def test_a_server_s_tool_is_kept_and_named():
    tool = FunctionTool(print, "show", "", UNFOLLOWED, None)
    object.__setattr__(tool, "is_lenient", True)
    tools = ToolSet([tool, search])
    assert tools.unfollowed == ["functions.show"]
    assert list(tools.schemas) == ["functions.search"]


def test_definitions_that_double_are_not_written_out():
    """Thirty models, each of which uses the next one twice: written out they would be 2^30."""
    schema = {"$defs": {f"m{i}": pair(i + 1) for i in range(30)} | {"m30": {"type": "string"}}, **pair(0)}
    plain = plain_schema(schema)
    assert plain["$defs"]["m29"]["properties"]["a"] == {"$ref": "#/$defs/m30"}
    assert "$ref" not in repr(plain_schema({**pair(28), "$defs": schema["$defs"]}))
    assert ToolSet([FunctionTool(print, "f", "", plain, None)])


def pair(number):
    part = {"$ref": f"#/$defs/m{number}"}
    return {"type": "object", "properties": {"a": part, "b": part}}
