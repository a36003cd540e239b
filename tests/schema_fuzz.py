"""Schemas at random, and what becomes of each in this process: `python schema_fuzz.py SEED FIRST COUNT` is the child.

A schema is known by its seed and number alone, so `schema_of(seed, number)` shows the one that went wrong. The child
announces each number before it begins, on a line of its own; after it comes the outcome, as JSON. Whoever started the
child learns from that where it died. One that takes longer than the cap ends the child with its stacks on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

# No schema may need so long, however loaded the machine; what hangs is found, what is slow is not.
SECONDS_FOR_ONE = 300
_MEMORY = 6 * 2**30

NAMES = [
    "a",
    "b",
    "name",
    "größe",
    "名前",
    "type",
    "properties",
    "$ref",
    "x y",
    "",
    "a/b",
    "~",
    "🎹",
    '"',
    "\\",
    "const",
]
NAMES += ["a_1", "b_2", "é", "e\u0301", "0", "__proto__", "\u2028", "enum"]
WORDS = ["a", "", "yes", "no", "naïve", "日本", '"', "\\n", "\n", "🎹", "1", "null", " ", "a" * 200, "<|end|>"]
PATTERNS = [
    "^a+$", "^[ab]*abb$", r"^.+\.txt$", r"^\d{3}-\d{4}$", "a|b", "^(a|b)*c$", "", "^$", "^.{2,5}$", r"^\S+@\S+\.\S+$",
    "[0-9]+", "^[A-Z][a-z]{1,8}$", r"^\w+$", "^x-", "_1$", "^(?:ab){1,3}$", "^[^a-z]+$", "^é+$", "^a{100}$", "é",
    "(?=a)b", "(a", "[", "*", "a{5,2}", r"\1", r"(a)\1", r"\p{Lu}", "^(((a+)+)+)+$", "a{1000}", "(a{50}){50}", r"\b", "$^",
    "(?i)abc", r"^[\s\S]*$", r"[\\]", r"^\u00e9$", "^a.*z$", ".*",
]  # fmt: skip
FORMATS = [
    "date",
    "date-time",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uuid",
    "uuid4",
    "regex",
]
FORMATS += ["json-pointer", "iri", "idn-email", "uri-reference", "path", "password", "int32", "double", "", "nothing"]
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 7, 10, 100, -100, 0.5, -0.5, 0.1, 1.5, 1e-9, 255, 65536, 2**31, 2**32]
ODD_NUMBERS: list[Any] = [
    -(2**63), 2**63 - 1, 2**63, 2**64, -(2**63) - 1, -(2**63) + 1, 2**53, 2**53 + 1, -(2**53) - 1, 1e15, 1e16, -1e18,
    1e20, -1e20, 1e30, -1e30, 1e308, -1e308, 5e-324, 1e-20, -1e-20, -0.0, 10**25, -(10**25), 10**400, -(10**400),
    10**18, -(10**18), 10**18 - 1, 0.1 + 0.2, 123456789.123456789, 1e-7, 2**62, 2**63 - 1024, -(2**63) + 1024, 10**5000,
    1.0, 2.0, -3.0, 9.99, 99.5, 0.25, 1e5, 1e22,
]  # fmt: skip
TYPES = ["string", "number", "integer", "boolean", "null", "array", "object"]
KEYWORDS = [
    *("type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "items"),
    *("prefixItems", "additionalItems", "contains", "minContains", "maxContains", "minItems", "maxItems", "uniqueItems"),
    *("unevaluatedItems", "minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType"),
    *("contentSchema", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "allOf", "anyOf"),
    *("oneOf", "not", "if", "then", "else", "$ref", "$defs", "definitions", "$id", "$schema", "$anchor", "$dynamicRef"),
    *("$dynamicAnchor", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "nullable"),
    *("x-guidance", "x-anything", "discriminator", "$vocabulary", "id"),
]  # fmt: skip


class Generator:
    """One schema. Most are sound and some odd in one place, since whatever is odd everywhere is refused at once."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.is_old = draw.random() < 0.15  # arrays of `items`, as before 2020-12
        self.num_definitions = draw.choice([0, 0, 1, 2, 4])
        self.is_odd = draw.random() < 0.35

    def whole(self) -> Any:
        draw = self.draw
        if draw.random() < 0.06:
            return draw.choice(SPECIAL)(draw)
        schema = self.schema(draw.choice([1, 2, 2, 3, 4]))
        if not isinstance(schema, dict):
            return schema
        if self.num_definitions and isinstance(schema, dict):
            place = draw.choice(["$defs", "definitions"])
            names = [f"d{n}" for n in range(self.num_definitions)]
            schema[place] = {name: self.schema(2) for name in names}
            for key in sorted(set(schema) - {"enum", "const", "required"}):
                schema[key] = self._referring(schema[key], place, names)
        if draw.random() < 0.1:
            drafts = ["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#", "x"]
            schema["$schema"] = draw.choice(drafts)
        if self.is_odd:
            for _ in range(draw.choice([1, 1, 2])):
                self._spoil(schema)
        return schema

    def _referring(self, schema: Any, place: str, names: list[str]) -> Any:
        """Some parts replaced by references, to themselves too."""
        if isinstance(schema, list):
            return [self._referring(each, place, names) for each in schema]
        if not isinstance(schema, dict):
            return schema
        if "type" in schema and self.draw.random() < 0.15:
            where = f"#/{place}/{self.draw.choice(names)}"
            return {
                "$ref": self.draw.choice(
                    [where] * 12 + ["#", "#/nowhere", "https://example.com/a", "file:///etc/a", ""]
                )
            }
        return {
            key: value if key in ("enum", "const", "required") else self._referring(value, place, names)
            for key, value in schema.items()
        }

    def _spoil(self, schema: dict[str, Any]) -> None:
        nodes = list(_dicts(schema))
        node = self.draw.choice(nodes)
        node[self.draw.choice(KEYWORDS)] = self.anything()

    def anything(self) -> Any:
        draw = self.draw
        return draw.choice([
            lambda: None, lambda: True, lambda: False, lambda: draw.choice(WORDS), lambda: draw.choice(ODD_NUMBERS),
            lambda: draw.choice(NUMBERS), list, dict, lambda: [draw.choice(NAMES)], lambda: self.schema(1),
            lambda: [self.schema(1), self.schema(0)], lambda: {draw.choice(NAMES): self.schema(1)},
            lambda: draw.choice(TYPES), lambda: float("nan"), lambda: float("inf"), lambda: "\ud800", lambda: ["\udfff"],
            lambda: {"a": None}, lambda: [None], lambda: {1: 2}, lambda: draw.choice(PATTERNS), lambda: (1, 2), lambda: {1},
        ])()  # fmt: skip

    def number(self) -> Any:
        return self.draw.choice(ODD_NUMBERS if self.draw.random() < 0.2 else NUMBERS)

    def value(self, depth: int = 1) -> Any:
        draw = self.draw
        kind = draw.choice(["word", "word", "number", "bool", "null", "list", "dict"] if depth else ["word", "number"])
        if kind == "list":
            return [self.value(0) for _ in range(draw.randrange(3))]
        if kind == "dict":
            return {draw.choice(NAMES): self.value(0) for _ in range(draw.randrange(3))}
        return {"word": draw.choice(WORDS), "number": self.number(), "bool": draw.random() < 0.5, "null": None}[kind]

    def schema(self, depth: int) -> Any:
        draw = self.draw
        if draw.random() < 0.03:
            return draw.choice([True, False, {}])
        if depth > 0 and draw.random() < 0.22:
            return self._combined(depth)
        if draw.random() < 0.15:
            return draw.choice(
                [{"const": self.value()}, {"enum": [self.value() for _ in range(draw.choice([1, 2, 3, 8]))]}]
            )
        kind = draw.choice(TYPES if depth > 0 else TYPES[:5])
        schema: dict[str, Any] = {"type": kind}
        getattr(self, f"_{kind}")(schema, depth)
        if draw.random() < 0.06:
            schema["type"] = draw.sample(TYPES, draw.choice([1, 2, 3, 7]))
        elif draw.random() < 0.04:
            del schema["type"]
        if draw.random() < 0.1:
            schema.update(title=draw.choice(WORDS), default=self.value(), description=draw.choice(WORDS))
        return schema

    def _some(self, schema: dict[str, Any], share: float, **makers: Callable[[], Any]) -> None:
        for key, make in makers.items():
            if self.draw.random() < share:
                schema[key] = make()

    def _string(self, schema: dict[str, Any], depth: int) -> None:
        draw = self.draw
        self._some(schema, 0.25, pattern=lambda: draw.choice(PATTERNS), format=lambda: draw.choice(FORMATS))
        low = draw.choice([0, 1, 3, 10, 200, 5000])
        self._some(schema, 0.2, minLength=lambda: low, maxLength=lambda: low + draw.choice([0, 1, 20, -1, 10**6]))

    def _number(self, schema: dict[str, Any], depth: int) -> None:
        def bounds() -> tuple[Any, Any]:
            pair = self.number(), self.number()
            return (min(pair), max(pair)) if self.draw.random() < 0.85 else pair

        low, high = bounds()
        self._some(schema, 0.35, minimum=lambda: low, maximum=lambda: high)
        self._some(schema, 0.15, exclusiveMinimum=lambda: low, exclusiveMaximum=lambda: high)
        self._some(schema, 0.1, multipleOf=lambda: abs(self.number()) or 1)
        self._some(schema, 0.02, exclusiveMinimum=lambda: True)

    _integer = _number

    def _boolean(self, schema: dict[str, Any], depth: int) -> None:
        pass

    _null = _boolean

    def _array(self, schema: dict[str, Any], depth: int) -> None:
        draw = self.draw
        low = draw.choice([0, 1, 2, 3, 12, 300])
        self._some(schema, 0.3, minItems=lambda: low, maxItems=lambda: low + draw.choice([0, 1, 5, -1, 1000]))
        some = [self.schema(depth - 1) for _ in range(draw.choice([1, 2, 3]))]
        if self.is_old and draw.random() < 0.4:
            schema["items"] = some
            self._some(schema, 0.5, additionalItems=lambda: self.schema(depth - 1))
        else:
            self._some(schema, 0.8, items=lambda: self.schema(depth - 1))
            if not self.is_old:
                self._some(schema, 0.2, prefixItems=lambda: some)
        self._some(schema, 0.04, uniqueItems=lambda: draw.random() < 0.5, contains=lambda: self.schema(0))
        self._some(schema, 0.02, minContains=lambda: 1, maxContains=lambda: 2, unevaluatedItems=lambda: self.schema(0))

    def _object(self, schema: dict[str, Any], depth: int) -> None:
        draw = self.draw
        names = draw.sample(NAMES, draw.choice([0, 1, 2, 3, 5]))
        schema["properties"] = {name: self.schema(depth - 1) for name in names}
        asked = draw.sample(names, draw.randrange(len(names) + 1)) + (
            [draw.choice(NAMES)] if draw.random() < 0.05 else []
        )
        self._some(schema, 0.6, required=lambda: list(dict.fromkeys(asked)))
        self._some(schema, 0.25, additionalProperties=lambda: draw.choice([True, False, self.schema(depth - 1)]))
        patterns = draw.sample(PATTERNS, draw.choice([1, 1, 2]))
        self._some(schema, 0.12, patternProperties=lambda: {each: self.schema(depth - 1) for each in patterns})
        self._some(
            schema, 0.06, minProperties=lambda: draw.choice([0, 1, 2, 9]), maxProperties=lambda: draw.choice([0, 1, 3])
        )
        self._some(schema, 0.03, propertyNames=lambda: self.schema(0), unevaluatedProperties=lambda: self.schema(0))
        self._some(schema, 0.03, dependentRequired=lambda: {draw.choice(NAMES): [draw.choice(NAMES)]})
        self._some(schema, 0.02, dependentSchemas=lambda: {draw.choice(NAMES): self.schema(0)})

    def _combined(self, depth: int) -> dict[str, Any]:
        draw = self.draw
        key = draw.choice(["anyOf", "anyOf", "oneOf", "oneOf", "allOf", "not", "if"])
        if key in ("not", "if"):
            schema: dict[str, Any] = {key: self.schema(depth - 1)}
            if key == "if":
                self._some(schema, 0.7, then=lambda: self.schema(depth - 1), **{"else": lambda: self.schema(depth - 1)})
            return schema
        parts = [self.schema(depth - 1) for _ in range(draw.choice([1, 2, 2, 3, 4]))]
        schema = {key: parts}
        if draw.random() < 0.3:
            beside = self.schema(depth - 1)
            schema = {**beside, **schema} if isinstance(beside, dict) else schema
        return schema


def _dicts(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


# --- Whole schemas of one odd kind ------------------------------------------------------------------------------------


def _deep(draw: random.Random) -> Any:
    schema: Any = {"type": "integer"}
    wrap = draw.choice([
        lambda inner: {"type": "array", "items": inner}, lambda inner: {"type": "object", "properties": {"a": inner}},
        lambda inner: {"anyOf": [inner, {"type": "null"}]}, lambda inner: {"allOf": [inner]},
        lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]}, lambda inner: {"not": inner},
        lambda inner: {"oneOf": [inner, {"type": "string"}]}, lambda inner: {"const": inner},
        lambda inner: {"type": "array", "items": inner, "minItems": 2}, lambda inner: {"default": inner},
    ])  # fmt: skip
    for _ in range(draw.choice([5, 20, 40, 62, 70, 200, 2000])):
        schema = wrap(schema)
    return schema


def _doubling(draw: random.Random) -> Any:
    """Definitions that each ask for the next one twice."""
    levels, word = draw.choice([3, 8, 20, 40]), draw.choice(["allOf", "anyOf", "prefixItems", "properties", "oneOf"])
    definitions: dict[str, Any] = {}
    for n in range(levels):
        both = [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]
        if word == "properties":
            definitions[f"d{n}"] = {
                "type": "object",
                "properties": dict(zip("ab", both, strict=True)),
                "required": ["a", "b"],
            }
        elif word == "prefixItems":
            definitions[f"d{n}"] = {"type": "array", "prefixItems": both, "minItems": 2}
        else:
            definitions[f"d{n}"] = {word: both}
    definitions[f"d{levels}"] = draw.choice(
        [{"type": "integer"}, {"type": "string", "pattern": "^a+$"}, {"type": "object"}]
    )
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def _circle(draw: random.Random) -> Any:
    words = ["allOf", "anyOf", "oneOf", "not", "items", "properties", "additionalProperties", "$ref"]
    definitions: dict[str, Any] = {}
    count = draw.choice([1, 2, 3])
    for n in range(count):
        target, word = {"$ref": f"#/$defs/d{(n + 1) % count}"}, draw.choice(words)
        if word in ("allOf", "anyOf", "oneOf"):
            definitions[f"d{n}"] = {word: [target, draw.choice([{"type": "null"}, {"type": "object"}, {}])]}
        elif word == "properties":
            definitions[f"d{n}"] = {"type": "object", word: {"next": target}, "required": draw.choice([[], ["next"]])}
        elif word == "$ref":
            definitions[f"d{n}"] = {**target, **draw.choice([{}, {"type": "object"}, {"minItems": 1}])}
        else:
            kind = {"items": "array", "additionalProperties": "object"}.get(word)
            definitions[f"d{n}"] = {word: target, **({"type": kind} if kind else {})}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def _wide(draw: random.Random) -> Any:
    count = draw.choice([50, 300, 2000])
    names = [f"{draw.choice(NAMES)}{n}" for n in range(count)]
    kind = draw.randrange(4)
    if kind == 0:
        return {"enum": names}
    if kind == 1:
        return {"anyOf": [{"const": name} for name in names]}
    asked = draw.choice([[], names[: count // 2], names])
    if kind == 2:
        return {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": asked}
    return {"type": "array", "prefixItems": [{"const": name} for name in names], "minItems": draw.choice([0, count])}


def _large(draw: random.Random) -> Any:
    many = draw.choice([1000, 20_000, 65_536, 10**9, 10**30])
    return draw.choice([
        {"type": "array", "items": {"type": "integer"}, "minItems": many}, {"type": "string", "minLength": many},
        {"type": "array", "items": {"type": "array", "minItems": 300, "items": {"minLength": many}}, "minItems": 300},
        {"type": "string", "maxLength": many}, {"type": "string", "pattern": f"^a{{{many}}}$"},
        {"type": "array", "items": {"type": "null"}, "maxItems": many}, {"type": "object", "minProperties": many},
        {"type": "string", "pattern": f"^(a|b)*a(a|b){{{min(many, 3000)}}}$", "minLength": 20},
        {"type": "string", "pattern": "^(a?){40}a{40}$"}, {"type": "object", "maxProperties": many},
        {"type": "array", "prefixItems": [{"type": "null"}] * 3, "items": False, "minItems": many},
        {"allOf": [{"multipleOf": 999_983}, {"multipleOf": 999_979}, {"type": "integer"}]},
        {"type": "integer", "multipleOf": 2**32 - 5, "minimum": 10**17}, {"type": "number", "multipleOf": 1e-9, "minimum": 0.5},
        {"type": "string", "allOf": [{"pattern": each} for each in ("a", "b", "c", "d", "e", "f", "g", "h")]},
    ])  # fmt: skip


def _bounds(draw: random.Random) -> Any:
    """Numbers alone, all of them."""
    schema: dict[str, Any] = {"type": draw.choice(["integer", "number", ["integer", "null"], ["number", "string"]])}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if draw.random() < 0.45:
            value = draw.choice(ODD_NUMBERS + NUMBERS)
            schema[key] = value + draw.choice([0, 0, 1, -1]) if isinstance(value, int) else value
    if draw.random() < 0.2:
        schema["multipleOf"] = abs(draw.choice(ODD_NUMBERS + NUMBERS)) or 1
    return {"allOf": [schema, {"maximum": draw.choice(ODD_NUMBERS)}]} if draw.random() < 0.2 else schema


def _range(draw: random.Random) -> Any:
    """A narrow range somewhere, of decimals or of whole numbers."""
    low = round(draw.uniform(-10, 10), draw.randrange(4)) if draw.random() < 0.6 else draw.randrange(-(10**17), 10**17)
    step = draw.choice([0, 1, 5, 0.1, 0.001, 1e-6, 1000, 10**9])
    names = draw.choice(["minimum", "exclusiveMinimum"]), draw.choice(["maximum", "exclusiveMaximum"])
    return {"type": draw.choice(["integer", "number"]), names[0]: low, names[1]: low + step}


SPECIAL = [_deep, _doubling, _circle, _wide, _large, _bounds, _bounds, _bounds, _range, _range, _range]


def schema_of(seed: int, number: int) -> Any:
    return Generator(random.Random(f"{seed}/{number}")).whole()


# --- What becomes of one ----------------------------------------------------------------------------------------------


class Fault(Exception):
    """What must not be, in a sentence."""


def outcome_of(schema: Any, engine: Any, end_tokens: tuple[int, ...], draw: random.Random) -> str:
    """ "refused", or "answered" when two answers were written and are valid; Fault for all else."""
    from openelm_mlx.decoding.constraint import PlainConstraint
    from openelm_mlx.decoding.grammar import answer_format
    from openelm_mlx.errors import SettingError

    try:
        answer = answer_format(schema)
        assert answer is not None
        shortest = engine.matcher(answer).completion()
        room = 4096 if shortest is None else len(shortest) + draw.choice([1, 20, 60])
        constraint = PlainConstraint(engine, answer, end_tokens, room)
    except SettingError as error:
        sentence = str(error)
        if "\n" in sentence or len(sentence) > 900 or "\x00" in sentence:
            raise Fault(f"a refusal is not a sentence: {sentence[:300]!r}") from None
        return "refused"
    _check(_text(engine, shortest), schema)
    _check(_text(engine, _written(constraint, room, draw, end_tokens)), schema)
    return "answered"


def _text(engine: Any, tokens: list[int]) -> str:
    return b"".join(engine.token_bytes[token] for token in tokens).decode("utf-8")


def _written(constraint: Any, max_tokens: int, draw: random.Random, end_tokens: tuple[int, ...]) -> list[int]:
    """Tokens drawn evenly from the mask, as by a model that knows nothing and ends only when it must."""
    import numpy as np

    tokens: list[int] = []
    while not constraint.is_finished:
        if len(tokens) == max_tokens:
            raise Fault(f"no end within {max_tokens} tokens")
        choices = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()
        if not choices:
            raise Fault(f"no token may follow {tokens}")
        token = draw.choice([each for each in choices if each not in end_tokens] or choices)
        if not constraint.accept(token):
            continue  # the next mask is narrower: the answer has to end
        tokens.append(token)
    return tokens[:-1]


def _check(text: str, schema: Any) -> None:
    from jsonschema import FormatChecker
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft201909Validator, Draft202012Validator, validator_for
    from referencing.exceptions import Unresolvable

    def no_constant(name: str) -> None:
        raise ValueError(name)

    value = json.loads(text, parse_constant=no_constant)
    schema = _for_re(schema)
    has_lists = any(isinstance(node.get("items"), list) for node in _dicts(schema))
    kind = validator_for(schema, default=Draft201909Validator if has_lists else Draft202012Validator)
    try:
        kind.check_schema(schema)
    except (SchemaError, TypeError, ValueError, RecursionError, re.error):
        return  # taken all the same (draft 4's booleans, say); what it means is not sure
    try:
        checker = FormatChecker([each for each in _HELD_FORMATS if each in FormatChecker.checkers])
        errors = kind(schema, format_checker=checker).iter_errors(value)
        error = next((each for each in errors if not _is_multiple_after_all(each)), None)
    except (re.error, RecursionError, OverflowError, Unresolvable):
        return  # a pattern in Rust's syntax, a circle that jsonschema does not leave, a reference in an alternative left out
    if error is not None:
        raise Fault(f"the answer {text[:300]} is invalid: {error.message[:200]}")


# Patterns that `re`, with which jsonschema matches, takes 2^40 steps for where repetitions have to be given back, or that it
# reads otherwise: in ECMAScript, as in the engine, a letter of `\w` is one of ASCII. Each with what it means, said plainly.
FOR_RE = {
    "^(a?){40}a{40}$": "^a{40,80}$",
    "^(((a+)+)+)+$": "^a+$",
    r"^\w+$": "^[A-Za-z0-9_]+$",
    r"^\d{3}-\d{4}$": "^[0-9]{3}-[0-9]{4}$",
}


def _for_re(part: Any) -> Any:
    """The schema with patterns that `re` reads as they are meant, and matches in few steps."""
    if isinstance(part, list):
        return [_for_re(each) for each in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _for_re(each) for key, each in part.items()}
    if isinstance(pattern := part.get("pattern"), str):
        changed["pattern"] = FOR_RE.get(pattern, pattern)
    if isinstance(named := changed.get("patternProperties"), dict):
        changed["patternProperties"] = {FOR_RE.get(pattern, pattern): each for pattern, each in named.items()}
    return changed


_HELD_FORMATS = ("date", "date-time", "email", "ipv4", "ipv6", "uuid")


def _is_multiple_after_all(error: Any) -> bool:
    """jsonschema divides floats: 0.5 is not a multiple of 1e-9 there."""
    if error.context:
        return any(map(_is_multiple_after_all, error.context))
    if error.validator != "multipleOf":
        return False
    instance, step = (Fraction(Decimal(repr(each))) for each in (error.instance, error.validator_value))
    return (instance / step).denominator == 1


def main(seed: int, first: int, count: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # another system
    from openelm_mlx.decoding.grammar import engine_of
    from openelm_mlx.text.tokenizer import load_tokenizer

    demo = Path(__file__).parent.parent / "openelm_mlx" / "demo" / "openelm"
    tokenizer = load_tokenizer(demo)
    engine = engine_of(tokenizer)
    outcomes: Counter[str] = Counter()
    for number in range(first, first + count):
        print(number, flush=True)
        faulthandler.dump_traceback_later(SECONDS_FOR_ONE, exit=True)
        try:
            outcome = outcome_of(schema_of(seed, number), engine, tokenizer.eos_tokens, random.Random(number))
        except Exception:  # noqa: BLE001  # whatever it is: this is what is looked for
            lines = traceback.format_exc().splitlines()
            print(json.dumps({"number": number, "fault": "\n".join(lines[-6:])}), flush=True)
            outcome = "fault"
        outcomes[outcome] += 1
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"outcomes": outcomes}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
