"""Formats and the engine: what is refused beforehand, which tokens may follow, and that an end is always known."""

import datetime as dt
import enum
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES
from jsonschema import Draft202012Validator
from pydantic import BaseModel

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
    with pytest.raises(SettingError, match="needs itself without an end"):
        answer_format({**endless, "$ref": "#/$defs/a"})


@pytest.mark.parametrize("name", ["byte_level", "llama", "llama_json", "llama_metaspace"])
def test_other_kinds_of_tokenizers(name):
    engine = engine_of(load_tokenizer(FIXTURES / "tokenizers" / name))
    assert is_valid(text_of(engine, engine.matcher(answer_format(SCHEMAS["invoice"])).completion()), SCHEMAS["invoice"])
