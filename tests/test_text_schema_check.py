"""What is JSON Schema in form, and what is refused with its place."""

import pytest

from openelm_mlx.errors import SettingError
from openelm_mlx.text.schema import Tool
from openelm_mlx.text.schema_check import check_schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("object", "the top level is 'object'"),
        ({"type": "strng"}, "type is 'strng'"),
        ({"type": []}, "type is []"),
        ({"type": ["string", "string"]}, "type is"),
        ({"properties": ["a"]}, "properties is ['a']"),
        ({"properties": {"a": {"properties": {"b": "string"}}}}, "properties.a.properties.b is 'string'"),
        ({"properties": {3: {}}}, "the key 3 at properties"),
        ({3: {}}, "the key 3 at the top level"),
        ({"required": True}, "required is True"),
        ({"required": ["a", "a"]}, "required is"),
        ({"enum": "a"}, "enum is 'a'"),
        ({"items": 3}, "items is 3"),
        ({"items": []}, "items is []"),
        ({"oneOf": []}, "oneOf is []"),
        ({"anyOf": [{"type": "string"}, {"type": 1}]}, "anyOf[1].type is 1"),
        ({"minLength": -1}, "minLength is -1"),
        ({"minimum": "0"}, "minimum is '0'"),
        ({"minimum": float("nan")}, "minimum is nan"),
        ({"multipleOf": 0}, "multipleOf is 0"),
        ({"uniqueItems": "yes"}, "uniqueItems is 'yes'"),
        ({"nullable": "yes"}, "nullable is 'yes'"),
        ({"description": ["a"]}, "description is ['a']"),
        ({"dependentRequired": {"a": "b"}}, "dependentRequired is"),
        ({"default": {1, 2}}, "default is {1, 2}, which JSON cannot express"),
        ({"default": float("inf")}, "default is inf, which JSON cannot express"),
    ],
)
def test_invalid_schema(schema, words):
    with pytest.raises(SettingError) as error:
        check_schema(schema, "The schema")
    message = str(error.value)
    assert message.startswith("The schema cannot be read as JSON Schema: ")
    assert words in message
    assert len(message) < 250


def test_schema_that_contains_itself():
    schema = {"type": "object"}
    schema["properties"] = {"self": schema}
    with pytest.raises(SettingError, match="64 levels"):
        check_schema(schema, "The schema")
    loop = []
    loop.append(loop)
    with pytest.raises(SettingError, match="JSON cannot express"):
        check_schema({"default": loop}, "The schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"exclusiveMinimum": True, "minimum": 0},  # draft 4 and OpenAPI 3.0
        {"items": [{"type": "string"}], "additionalItems": False},  # until 2019-09
        {"$defs": {"a": True}, "properties": {"a": {"$ref": "#/$defs/a"}}, "x-vendor": {"any": ["thing"]}},
        {"if": {"required": []}, "then": {"minItems": 2.0}, "else": False, "patternProperties": {"^a": {}}},
    ],
)
def test_valid_schema(schema):
    check_schema(schema, "The schema")
    Tool("f", parameters=schema)
