"""Values held to JSON Schema: as jsonschema has it, within limits, and without a look outside."""

import json
import socket
import urllib.request

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.decoding import validation
from openelm_mlx.decoding.grammar import answer_format
from openelm_mlx.decoding.validation import Validator
from openelm_mlx.errors import SettingError, ToolError
from openelm_mlx.tools.calls import run
from openelm_mlx.tools.tool import ToolSet


class Taker:
    """A tool that takes what its schema says."""

    namespace, name, description = "functions", "take", ""

    def __init__(self, parameters, is_lenient=False):
        self.parameters, self.is_lenient = parameters, is_lenient

    def __call__(self, arguments):
        return "taken"


@pytest.fixture(autouse=True)
def nothing_is_opened(monkeypatch):
    """Whatever asks for the network or a file during a test is an error that no code may swallow."""

    def refuse(*arguments, **keywords):
        raise BaseException(f"something was fetched: {arguments}")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)


OUTSIDE = [
    {"$ref": "http://127.0.0.1:9/x.json"},
    {"$ref": "https://example.com/x.json#/$defs/a"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "/etc/passwd"},
    {"$id": "file:///etc/", "$ref": "passwd"},
    {"$id": "http://127.0.0.1:9/", "allOf": [{"$ref": "x"}]},
    {"$dynamicRef": "http://127.0.0.1:9/x#a"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "#missing"},
    {"$ref": "http://["},
    {"$ref": "%"},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "http://127.0.0.1:9/x"},
    {"allOf": [{"$schema": "http://json-schema.org/draft-07/schema#", "allOf": [{"$ref": "http://127.0.0.1:9/x"}]}]},
    {"$ref": "data:application/json,{}"},
]


@pytest.mark.parametrize("part", OUTSIDE, ids=json.dumps)
def test_references_never_lead_outside(part):
    schema = {"type": "object", "properties": {"a": part}}
    (fault,) = Validator(schema).faults({"a": 1})
    assert "which is not a part of it; nothing is fetched" in fault
    assert "\n" not in fault
    assert "root:" not in fault
    with pytest.raises(ValueError, match="nothing is fetched"):
        run(Taker(schema), '{"a": 1}')
    # A server checks its calls itself: the rest of its schema is held.
    assert run(Taker(schema, is_lenient=True), '{"a": 1}') == "taken"
    with pytest.raises(ValueError, match="not of type"):
        run(
            Taker({**schema, "required": ["b"], "properties": {**schema["properties"], "b": {"type": "string"}}}, True),
            '{"a": 1, "b": 2}',
        )


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"$ref": "http://127.0.0.1:9/x"}, r"leads out of the schema, .*: put the definition under \$defs"),
        ({"$ref": "#/$defs/a"}, "points to nothing in the schema: correct it, or add the definition"),
        ({"$ref": "#a"}, r"is not a part of it: put that under \$defs"),
    ],
)
def test_answers_are_not_held_to_what_is_elsewhere(part, says):
    with pytest.raises(SettingError, match=says):
        answer_format({"type": "object", "properties": {"a": part}})
    with pytest.raises(ToolError, match=says):
        ToolSet([Taker({"type": "object", "properties": {"a": part}})])


def test_a_part_s_own_dialect_brings_no_other_checker():
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a+)+$", "$ref": "#/$defs/x"}
    schema = {"properties": {"a": old}, "$defs": {"x": {"maxLength": 3}}}
    assert Validator(schema).faults({"a": "a" * 60 + "!"})
    assert not Validator(schema).faults({"a": "aaa"})


PATTERNS = [
    "^(a+)+$",
    "(x|x)*y",
    "^(a|a?)+$",
    "(a*)*b",
    r"^(\w+\s?)*$",
    "(.*a){25}$",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(a?){80}a{80}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_take_linear_time(pattern):
    """With `re` each of these takes longer than anybody waits."""
    text = "a" * 20_000 + "!"
    schemas = [{"pattern": pattern}, {"patternProperties": {pattern: False}}, {"propertyNames": {"pattern": pattern}}]
    schemas += [{"patternProperties": {pattern: True}, "additionalProperties": False}]
    schemas += [{"patternProperties": {pattern: True}, "unevaluatedProperties": False}]
    for schema in schemas:
        Validator(schema).faults(text if "pattern" in schema else {text: 1})
    assert Validator({"format": "regex"}).faults(pattern) == []


def test_patterns_say_what_they_say():
    validator = Validator(
        {"properties": {"a": {"pattern": "^(a+)+$"}, "b": {"pattern": "b"}, "c": {"pattern": "(?=x)"}}}
    )
    assert not validator.faults({"a": "aaa", "b": "abc", "c": "anything"})  # look-ahead is not read
    assert validator.faults({"a": "aab"}) == ['a: "aab" does not match "^(a+)+$"']
    assert validator.faults({"b": "x"})


def doubling(keyword, last, depth=30):
    definitions = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": last}}


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_definitions_that_double_are_checked_once(keyword):
    if keyword != "oneOf":
        assert not Validator(doubling(keyword, {"type": "string"})).faults("x")
    faults = Validator(doubling(keyword, {"type": "string"})).faults(1)
    assert len(faults) == 1
    assert "is" in faults[0]


def test_work_that_cannot_be_shared_has_a_limit(monkeypatch):
    """Dynamic references and evaluated members are found out anew on each way; that ends."""
    steps = []
    step = validation.Check.step
    monkeypatch.setattr(validation.Check, "step", lambda self, count=1: (steps.append(1), step(self, count)))
    monkeypatch.setattr(validation, "_MOST_STEPS", 3_000)
    dynamic = doubling("allOf", {"$dynamicAnchor": "x", "type": "object"})
    dynamic["properties"] = {"a": {"$dynamicRef": "#x"}}
    names = doubling("allOf", {"type": "object"})
    for schema in (dynamic, {"allOf": [names], "$defs": names["$defs"], "unevaluatedProperties": False}):
        steps.clear()
        (fault,) = Validator(schema).faults({"a": 1})
        assert "takes too long" in fault
        assert len(steps) <= validation._MOST_STEPS


@pytest.mark.parametrize("schema", [
    {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"anyOf": [{"$ref": "#"}, True]}, {"not": {"$ref": "#"}},
    {"$dynamicRef": "#"}, {"if": {"$ref": "#"}}, {"$recursiveRef": "#"},
], ids=json.dumps)  # fmt: skip
def test_schemas_that_need_themselves_end(schema):
    (fault,) = Validator(schema).faults({"a": 1})
    assert fault.startswith("it could not be checked: ")


def test_deep_values_and_long_arrays():
    tree = {"properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    deep, text = {}, "[" * 100_000
    for _ in range(3_000):
        deep = {"a": deep}
    assert Validator(tree).faults(deep) == ["it is nested more than 100 levels deep"]
    for _ in range(2_960):
        deep = deep["a"]
    assert not Validator(tree).faults(deep)
    with pytest.raises(ValueError, match="nested too deep"):
        run(Taker({}), '{"a": ' + text)
    with pytest.raises(ValueError, match="NaN is not a number"):
        run(Taker({}), '{"a": NaN}')
    unique = Validator({"uniqueItems": True})
    items = [[i] for i in range(20_000)]
    assert not unique.faults(items)
    assert unique.faults([*items, [7.0]]) == ["two of its items are equal"]
    assert not unique.faults([1, True, "1", None, [1], {"a": 1}, {"a": True}])
    enum = Validator({"items": {"enum": [{"a": i} for i in range(2_000)]}})
    assert not enum.faults([{"a": i % 2_000} for i in range(5_000)])


def test_faults_are_short_and_say_where():
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"items": {"type": "integer", "maximum": 9}}},
        "required": ["city"],
        "additionalProperties": False,
    }
    faults = Validator(schema).faults({"days": [1, 12, "x"], "place": "y" * 10_000})
    assert faults == [
        "days.1: 12 is above the greatest value, 9",
        'days.2: "x" is not of type integer',
        '"city" is missing',
    ]
    assert max(map(len, Validator(schema).faults({"city": "y" * 10_000, "place": 1}))) < 200
    choice = {"anyOf": [{"properties": {"a": {"properties": {"b": {"const": 1}}}}}, {"type": "string"}]}
    assert Validator(choice).faults({"a": {"b": 2}}) == ["a.b: 2 is not 1"]


@pytest.mark.parametrize("schema", [
    {"required": None}, {"enum": None}, {"type": "any"}, {"properties": None}, {"items": None}, {"pattern": 3},
    {"anyOf": None}, {"minimum": "a"}, {"multipleOf": 0}, {"$ref": 3}, {"additionalProperties": None}, {"not": None},
    {"dependentRequired": []}, {"patternProperties": {"(": False}}, {"$id": 5}, {"$schema": 5}, {"$id": "http://["},
    {"minLength": None}, {"allOf": [None]}, {"if": 3, "then": False}, {"uniqueItems": 1}, {"required": "a"},
], ids=json.dumps)  # fmt: skip
def test_keywords_of_the_wrong_kind_say_nothing(schema):
    for value in ({"b": [1, "x"]}, "x", 3, [1, 1], None):
        assert Validator(schema, is_lenient=True).faults(value) == []


# --- As jsonschema has it ---------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from([0.5, 1.0, "", "a", "ab", "abc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ab"]), inner, max_size=3),
    max_leaves=6,
)
LEAVES = st.sampled_from([
    True, False, {}, {"type": "string"}, {"type": ["integer", "null"]}, {"type": "number"}, {"const": 1},
    {"enum": [1, "a", [True]]},
    {"minimum": 2}, {"exclusiveMaximum": 3}, {"multipleOf": 0.5}, {"minLength": 2}, {"maxLength": 1}, {"pattern": "^a"},
    {"minItems": 1}, {"maxItems": 2}, {"uniqueItems": True}, {"minProperties": 1}, {"maxProperties": 1}, {"required": ["a"]},
    {"dependentRequired": {"a": ["b"]}}, {"$ref": "#/$defs/d"}, {"$ref": "#e"},
])  # fmt: skip


def combined(inner):
    names = st.dictionaries(st.sampled_from(["a", "b"]), inner, min_size=1, max_size=2)
    some = st.lists(inner, min_size=1, max_size=3)
    words = {
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), some),
        **dict.fromkeys(
            ("not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames"), inner
        ),
        **dict.fromkeys(("properties", "patternProperties", "dependentSchemas"), names),
        **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), inner),
        "minContains": st.integers(0, 2),
    }
    return st.fixed_dictionaries({}, optional=words)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.recursive(LEAVES, combined, max_leaves=8), VALUES)
def test_it_says_what_jsonschema_says(schema, value):
    schema = {"$defs": {"d": {"type": ["object", "array"]}, "e": {"$anchor": "e", "maxLength": 2}}, "allOf": [schema]}
    expected = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert (not Validator(schema).faults(value)) == expected
