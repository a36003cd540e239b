"""Formats and the engine: what is refused beforehand, which tokens may follow, and that an end is always known."""

import datetime as dt
import enum
import gc
import json
import random
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from openelm_mlx.decoding.constraint import PlainConstraint
from openelm_mlx.decoding.grammar import answer_format, engine_of
from openelm_mlx.errors import SettingError
from openelm_mlx.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SCHEMAS = json.loads((ROOT / "examples" / "structured" / "schemas.json").read_text(encoding="utf-8"))
DEMO = ROOT / "openelm_mlx" / "demo"


@pytest.fixture(scope="module", params=["openelm", "gpt_oss"])
def engine(request):
    return engine_of(load_tokenizer(DEMO / request.param))


def text_of(engine, tokens) -> str:
    return b"".join(engine.token_bytes[token] for token in tokens).decode()


def allowed(engine, words) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def follow(matcher, text: str) -> None:
    for token in matcher.engine.encode(text.encode()):
        assert matcher.accept(token), (text, token)


def is_valid(text: str, schema) -> bool:
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).is_valid(json.loads(text))


def test_the_set_is_large_and_of_many_kinds():
    text = json.dumps(SCHEMAS)
    assert len(SCHEMAS) >= 50
    for keyword in ("enum", "anyOf", "oneOf", "allOf", "items", "pattern", "$ref", "prefixItems", "format"):
        assert text.count(f'"{keyword}"') >= 1, keyword


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_has_an_end_from_its_beginning_and_it_is_valid(engine, name):
    tokens = engine.matcher(answer_format(SCHEMAS[name])).completion()
    assert tokens is not None
    assert is_valid(text_of(engine, tokens), SCHEMAS[name])


@pytest.mark.slow(first=1)
@pytest.mark.parametrize("name", [name for name in SCHEMAS if SCHEMAS[name].get("type") == "object"])
def test_every_prefix_of_an_answer_has_an_end(engine, name):
    schema = SCHEMAS[name]
    whole = engine.matcher(answer_format(schema)).completion()
    matcher = engine.matcher(answer_format(schema))
    for token in whole[:40]:
        assert matcher.accept(token)
        rest = matcher.completion()
        assert is_valid(text_of(engine, [*matcher.tokens, *rest]), schema)


def test_the_mask_is_what_accept_accepts(engine):
    """The slow form: every token of the vocabulary tried one by one."""
    matcher = engine.matcher(answer_format(SCHEMAS["person"]))
    for prefix in ("", '{"na', "", 'me": "A', 'da"', ', "age": 1', "2"):
        follow(matcher, prefix)
        tried = set()
        for token in range(engine.vocab_size):
            if matcher.accept(token):
                tried.add(token)
                matcher.rewind(1)
        mask = allowed(engine, matcher.mask())
        # Where one text alone can follow, the mask has its first token only; shorter ones of the same text are accepted.
        assert mask == tried or (len(mask) == 1 and mask < tried)


def test_control_tokens_and_tags_are_never_text(engine):
    matcher = engine.matcher(answer_format({"type": "string"}))
    follow(matcher, '"a')
    names = {token for token, data in enumerate(engine.token_bytes) if re.fullmatch(rb"<\|\w+\|>|</?s>", data)}
    assert len(names) >= 5  # both demos have some
    assert not names & allowed(engine, matcher.mask())
    assert not any(matcher.accept(token) for token in names)
    follow(matcher, " <|end|></s> b")  # the same characters as ordinary text
    assert not matcher.is_complete
    follow(matcher, '"')
    assert matcher.is_complete


def test_rewinding_is_as_if_it_had_not_been(engine):
    matcher = engine.matcher(answer_format(SCHEMAS["invoice"]))
    tokens = matcher.completion()
    masks = []
    for token in tokens:
        masks.append(matcher.mask())
        assert matcher.accept(token)
    for count in (1, 3, 7, len(tokens) - 11):
        matcher.rewind(count)
        assert (matcher.mask() == masks[len(matcher.tokens)]).all()
    for token in tokens:
        assert matcher.accept(token)
    assert matcher.is_complete


def test_objects_are_closed_unless_they_say_otherwise(engine):
    def takes(schema, text):
        matcher = engine.matcher(answer_format(schema))
        return all(matcher.accept(token) for token in engine.encode(text.encode())) and matcher.is_complete

    plain = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert takes(plain, '{"a":1}')
    assert not takes(plain, '{"a":1,"b":2}')
    assert takes({**plain, "additionalProperties": {"type": "integer"}}, '{"a":1,"b":2}')
    assert takes({"allOf": [plain, {"type": "object", "properties": {"b": {"type": "integer"}}}]}, '{"a":1,"b":2}')
    named = {"type": "object", "properties": {"properties": {"type": "integer"}, "const": plain}, "required": ["const"]}
    assert takes(named, '{"properties":1,"const":{"a":1}}')  # names that look like keywords
    assert takes({"const": {"properties": {"a": 1}}}, '{"properties":{"a":1}}')  # data that looks like a schema


def test_dates_exist():
    pattern = re.compile(json.loads(answer_format({"type": "string", "format": "date"}).text)["pattern"])
    days = [
        f"{y:04}-{m:02}-{d:02}"
        for y in (0, 1, 4, 400, 1900, 2000, 2023, 2024, 9999)
        for m in range(14)
        for d in range(33)
    ]
    for day in days:
        try:
            dt.date.fromisoformat(day)
        except ValueError:
            assert not pattern.match(day), day
        else:
            assert pattern.match(day), day
    stamp = json.loads(answer_format({"type": "string", "format": "date-time"}).text)["pattern"]
    assert re.match(stamp, "2024-02-29T23:59:59.5+01:00")
    assert not re.match(stamp, "2023-02-29T23:59:59Z")


def test_json_is_written_in_one_line(engine):
    for text in ('{"a":1}', '{"a": 1}', '{ "a" : 1 }'):
        follow(engine.matcher(answer_format({"type": "object"})), text)
    matcher = engine.matcher(answer_format({"type": "object"}))
    follow(matcher, '{"a":')
    assert not any(matcher.accept(engine.characters[c]) for c in "\n")
    follow(matcher, " ")
    assert not matcher.accept(engine.characters[" "])


def test_a_pydantic_model_is_a_schema(engine):
    class Colour(enum.Enum):
        RED, BLUE = "red", "blue"

    class Thing(BaseModel):
        name: str
        colour: Colour
        parts: list["Thing"] = []
        weight: float | None = None

    answer = answer_format(Thing)
    assert answer.schema == Thing.model_json_schema()
    Thing.model_validate_json(text_of(engine, engine.matcher(answer).completion()))


@pytest.mark.parametrize(
    "pattern", ["(ab)*c|x{3}", "[a-z]{3,8}( [a-z]{2,8})*", ".*foo.*", "[^a]+a", "(yes|no)!", "x{300}", "[αβγ]+", "a?"]
)
def test_regular_expressions_have_an_end(engine, pattern):
    assert re.fullmatch(pattern, text_of(engine, engine.matcher(answer_format(regex=pattern)).completion()))


def test_a_grammar(engine):
    answer = answer_format(grammar='start: item ("," item)*\nitem: /[0-9]+/ | "(" start ")"')
    matcher = engine.matcher(answer)
    follow(matcher, "(1,(2")
    assert not matcher.is_complete
    assert text_of(engine, matcher.completion()) == "))"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"schema": {"type": "objct"}}, "objct"),
        ({"schema": [1]}, "list"),
        ({"schema": "{}"}, "str"),
        ({"schema": int}, "type"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"not": {"type": "string"}}}, "not"),
        ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "look-ahead"),
        ({"schema": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
        ({"schema": {"$ref": "https://example.com/x.json"}}, "example.com"),
        ({"schema": {"const": {1, 2}}}, "JSON"),
        ({"schema": False}, "nsatisfiable"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "nsatisfiable"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": ""}, "regex is ''"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"schema": {}, "regex": "a"}, "schema and regex"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(given, says):
    with pytest.raises(SettingError, match=re.escape(says)) as error:
        answer_format(**given)
    assert "\n" not in str(error.value)


def test_a_default_that_the_engine_does_not_know_is_no_hindrance():
    assert answer_format({"type": "array", "uniqueItems": False}) is not None
    assert answer_format() is None


def test_a_schema_without_an_end_is_refused():
    endless = {"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}}
    with pytest.raises(SettingError, match="contains itself endlessly"):
        answer_format({**endless, "$ref": "#/$defs/a"})


@pytest.mark.parametrize("name", ["byte_level", "llama", "llama_json", "llama_metaspace"])
def test_other_kinds_of_tokenizers(name):
    engine = engine_of(load_tokenizer(FIXTURES / "tokenizers" / name))
    assert is_valid(text_of(engine, engine.matcher(answer_format(SCHEMAS["invoice"])).completion()), SCHEMAS["invoice"])


M = -(2**63)


def test_a_large_float_is_the_number_that_readers_take_it_for():
    """3.738199698113133e16 reads as 37381996981131328, which its own digits would leave below the bound."""
    schema = {"type": "integer", "minimum": 37381996981131326, "exclusiveMaximum": 3.738199698113133e16}
    with pytest.raises(SettingError):  # two numbers are left, and the engine holds neither
        answer_format(schema)
    assert answer_format({**schema, "minimum": 37381996981130000}) is not None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": M},
        {"type": "integer", "minimum": M, "maximum": 2**63 - 1},
        {"type": "integer", "maximum": M},
        {"type": "integer", "exclusiveMaximum": M},
        {"type": "integer", "minimum": M, "maximum": M + 4096},
        {"type": "integer", "minimum": M, "maximum": -5, "multipleOf": 7},
        {"type": "integer", "minimum": -1e30, "maximum": -1e20},
        {"type": "integer", "exclusiveMinimum": -1e30, "exclusiveMaximum": -1e20},
        {"type": "number", "minimum": -1e30, "maximum": -1e20},
        {"type": "number", "minimum": M, "maximum": -1e18},
        {"type": "integer", "minimum": 1e20},
        {"type": "integer", "minimum": 10**18},
        {"type": "integer", "minimum": -(10**400), "maximum": 10**400},
        {"type": "number", "maximum": -(10**5000), "minimum": -(10**5001), "nullable": True}
        | {"type": ["number", "null"]},
        {"type": "integer", "minimum": 1.5, "maximum": 2.5},
        {"type": "integer", "exclusiveMinimum": 1.5, "exclusiveMaximum": 2.0001},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        {"type": "number", "minimum": -0.5, "exclusiveMaximum": 0},
        {"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3.1},
        {"type": "number", "minimum": 0.012345678901234567, "maximum": 0.5},
        {"type": "number", "minimum": 0.5, "maximum": 0.7, "multipleOf": 0.25},
        {"type": "integer", "minimum": 1, "maximum": 30, "multipleOf": 7.5},
        {"type": "object", "properties": {"id": {"type": "integer", "minimum": M, "maximum": -1}}, "required": ["id"]},
        {"type": "array", "items": {"type": ["integer", "null"], "maximum": M}, "minItems": 1},
        {"const": 1e22},
        {"const": 2**60},
        {"type": "integer", "enum": [2.0**60, -(2**62)]},
    ],
    ids=lambda schema: repr(sorted(schema)),
)
def test_bounds_far_out_give_an_answer_within_them(schema):
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    answer = answer_format(schema)
    matcher = engine.matcher(answer)
    assert is_valid(text_of(engine, matcher.completion()), schema)


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.25", "0"),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0.25", "-0"),
        ({"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3.1}, "3.05", "3"),
        ({"type": "integer", "minimum": 1.5, "maximum": 3.5}, "3", "4"),
        ({"type": "number", "minimum": 10**16, "maximum": 10**17}, "20000000000000000", "1"),
        ({"type": "number", "exclusiveMaximum": 1}, "0.9", "1"),
        # This text reads as the bound itself.
        ({"type": "number", "exclusiveMaximum": -1e18}, "-1000000000000010000", "-1000000000000000000.25"),
    ],
)
def test_an_open_bound_is_open(schema, taken, refused):
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    matcher = engine.matcher(answer_format(schema))
    assert matcher.is_completed_by(engine.spell(taken.encode()))
    assert not matcher.is_completed_by(engine.spell(refused.encode()))


def test_a_fraction_is_written_as_it_is_or_refused():
    """Of 17 digits, or far from the point, the engine reads some as a neighbour."""
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    draw = random.Random(5)
    numbers = [draw.uniform(-1, 1) * 10 ** draw.uniform(-14, 14) for _ in range(300)]
    numbers += [float(f"{each:.14g}") for each in numbers] + [1e22, 1e23, 2.0**80, 0.1 + 0.2, 123456789.12345679]
    refused = []
    for number in numbers:
        try:
            answer = answer_format({"const": number})
        except SettingError:
            refused.append(number)
        else:
            assert float(text_of(engine, engine.matcher(answer).completion())) == number
    assert 123456789.12345679 in refused
    assert len(refused) < len(numbers) // 3
    assert not any(1e-4 < abs(number) < 1e10 and number in refused for number in numbers[300:600])


def _doubling(levels: int) -> dict:
    """Definitions that each ask for the next one twice."""
    definitions: dict = {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "minimum": M, "maximum": M}, "-9223372036854775808"),
        ({"properties": {"a": {"const": M}}, "required": ["a"]}, "const at properties.a"),
        ({"enum": [M]}, "enum at the top level"),
        ({"allOf": [{"type": "integer"}, {"maximum": M}, {"type": "integer", "maximum": M}]}, "bounds at allOf[2]"),
        ({"type": "integer", "minimum": 10**5000}, "huge number"),
        ({"type": "string", "pattern": "\ud800"}, "surrogate"),
        ({"enum": ["\ud800"]}, "surrogate"),
        ({"oneOf": [{"const": 10**5000}, {"const": 1}, {"const": 1.0}]}, "both fit 1"),
        ({"oneOf": [{"const": {"a": 1}}, {"const": {"a": 1.0}}]}, 'both fit {"a": 1}'),
        ({"enum": [123456789.12345679]}, "numbers that cannot be enforced (123456789.12345679)"),
        ({"properties": {"a": {"not": {}}}}, "not at properties.a"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "properties.a points to nothing"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "leads out of the schema"),
        ({"type": "integer", "multipleOf": 604_800}, "multipleOf at the top level is 604800, which cannot be enforced"),
        ({"type": "integer", "multipleOf": 2**32 - 5, "minimum": 10**17}, "a whole number up to 100,000"),
        ({"type": "number", "multipleOf": 3e-9}, "multipleOf at the top level is 3e-09"),
        ({"allOf": [{"type": "integer", "multipleOf": 401}, {"multipleOf": 409}]}, "common multiple is too large"),
        ({"type": "object", "minProperties": 2}, "minProperties at the top level is 2, and only 0 names are required"),
        ({"properties": {"a": {}}, "required": ["a"], "minProperties": 9}, "written twice, and counts once"),
        (_doubling(30), "combines more than 5,000 parts"),
    ],
)
def test_what_no_answer_can_hold_is_refused_with_its_place(schema, says):
    with pytest.raises(SettingError, match=re.escape(says)) as error:
        answer_format(schema)
    assert "\n" not in str(error.value)


def test_a_count_beyond_all_answers_is_refused_soon_with_the_number():
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    for schema in (
        {"type": "string", "pattern": "^a{20000}$"},
        {"type": "string", "pattern": "^[ab]{20000}$"},
        {"type": "string", "minLength": 20_000},
        {"type": "array", "items": {"type": "integer"}, "minItems": 20_000},
    ):
        with pytest.raises(SettingError, match="No answer in this format was found within 4,096 bytes"):
            PlainConstraint(engine, answer_format(schema), (2,), 65_536)
    assert len(engine.matcher(answer_format({"type": "string", "minLength": 5000})).completion()) > 1000


def test_what_stays_below_those_limits_has_an_answer():
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    for schema in (
        {"type": "integer", "multipleOf": 1009, "minimum": 1, "maximum": 2_000_000_000},
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "minProperties": 2},
        _doubling(8),
    ):
        assert is_valid(text_of(engine, engine.matcher(answer_format(schema)).completion()), schema)


def test_what_nothing_refers_to_is_no_hindrance():
    odd = {"a": {"not": {}}, "b": {"type": "integer", "minimum": M, "maximum": M}, "c": {"$ref": "#/nowhere"}}
    assert answer_format({"type": "string", "$defs": odd}) is not None
    answer = answer_format(
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/d"}, {"not": {"type": "null"}}]} | {"$defs": odd | {"d": {}}}
    )
    assert any("not at anyOf[2]" in note for note in answer.notes)
    assert answer_format({"$schema": "https://example.com/own", "type": "null"}) is not None
    assert answer_format({"x-anything": 10**5000, "minContains": 3, "if": {}, "type": "null"}) is not None


_TAG = {"type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}, "n": {"type": "integer"}}}
_OTHER_TAG = {"type": "object", "properties": {"kind": {"const": "dog", "default": "dog"}, "n": {"type": "integer"}}}


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "integer"}, {"type": "string"}],
        [{"type": "number", "minimum": 0, "exclusiveMaximum": 5}, {"type": "number", "minimum": 5}],
        [{"type": "integer", "maximum": 4}, {"type": "integer", "exclusiveMinimum": 4}],
        [{"type": "number", "exclusiveMaximum": 0}, {"const": 0}],
        [{"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "^b+$"}],
        [{"type": "string", "pattern": "^a+$"}, {"enum": ["b", "c"]}],
        [{"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}],
        [_TAG, _OTHER_TAG],
        [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    ],
)
def test_a_one_of_that_is_apart_is_followed(branches):
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    schema = {"oneOf": branches, "$defs": {"cat": _TAG, "dog": _OTHER_TAG}}
    assert is_valid(text_of(engine, engine.matcher(answer_format(schema)).completion()), schema)


@pytest.mark.parametrize(
    ("branches", "says"),
    [
        ([{"type": "integer"}, {"type": "number"}], "1 and 2 both fit 0,"),
        ([{"type": "string"}, {"type": "boolean"}, {"const": "yes"}], '1 and 3 both fit "yes",'),
        ([{"enum": [1, 2]}, {"enum": [2.0, 3]}], "1 and 2 both fit 2"),
        (
            [{"type": "object", "required": ["a"]}, {"type": "object", "properties": {"b": {}}}],
            '1 and 2 both fit {"a": 0},',
        ),
        ([{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "b$"}], "1 and 2 may both fit one value"),
    ],
)
def test_a_one_of_that_overlaps_is_refused_with_its_place_and_an_example(branches, says):
    with pytest.raises(SettingError, match=re.escape(says)) as error:
        answer_format({"type": "object", "properties": {"a": {"oneOf": branches}}})
    assert "oneOf at properties.a" in str(error.value)
    assert "Use anyOf" in str(error.value)


def test_a_multiple_is_one_of_decimals():
    """In floats 0.3 / 0.1 is less than 3."""
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    schema = {"type": "number", "minimum": 0.3, "maximum": 0.3, "multipleOf": 0.1}
    assert text_of(engine, engine.matcher(answer_format(schema)).completion()) == "0.3"


def test_a_list_of_hundreds_of_items_has_an_answer():
    engine = engine_of(load_tokenizer(DEMO / "openelm"))
    schema = {"type": "array", "minItems": 300, "items": {"type": ["number", "boolean"]}}
    assert is_valid(text_of(engine, engine.matcher(answer_format(schema)).completion()), schema)


@pytest.mark.parametrize("name", ["openelm", "gpt_oss"])
def test_a_tokenizer_and_its_engine_are_let_go(name):
    tokenizer = load_tokenizer(DEMO / name)
    engine = engine_of(tokenizer)
    assert engine_of(tokenizer) is engine
    assert engine.matcher(answer_format({"type": "string", "pattern": "^a+$"})).completion()
    gone = [weakref.ref(tokenizer), weakref.ref(engine)]
    del tokenizer, engine
    gc.collect()
    assert [each() for each in gone] == [None, None]
