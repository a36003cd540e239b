"""Checks the form of a JSON Schema: `check_schema` raises for the first keyword with a value of the wrong kind."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping

from openelm_mlx.errors import SettingError

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
MAX_DEPTH = 64  # also what ends a dict that contains itself
# Shared parts are counted each time they are used: dictionaries that share parts can double at every level.
_MOST_PARTS = 100_000


def check_schema(schema: object, what: str) -> None:
    """Raise SettingError unless `schema` is a JSON Schema (drafts 6 to 2020-12, and OpenAPI's `nullable`).

    `what` opens the sentence, for example "The parameters of tool 'f'". Only the form is checked: each keyword's value is
    of the kind that the standard asks for. `$ref` is not followed; unknown keywords are allowed, as the standard says.
    """
    try:
        _check_size(schema)
        _check(schema, "", 0)
    except _Invalid as error:
        raise SettingError(f"{what} cannot be read as JSON Schema: {error}.") from None


class _Invalid(Exception):
    pass


def _check_size(schema: object) -> None:
    waiting, count = [(schema, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        count += len(parts)
        if count > _MOST_PARTS:
            raise _Invalid(f"it has more than {_MOST_PARTS:,} parts")
        if depth <= 2 * MAX_DEPTH:  # deeper ones are refused below; names lie between two levels
            waiting += [(part, depth + 1) for part in parts]


# One branch for each kind of keyword: in one place, one sees that none is missing.
def _check(schema: object, path: str, depth: int) -> None:  # noqa: C901
    here = path or "the top level"
    if depth > MAX_DEPTH:
        raise _Invalid(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _Invalid(f"{here} is {_shown(schema)}, where an object (a dict) belongs")
    for key, value in schema.items():
        if not isinstance(key, str):
            raise _Invalid(f"the key {key!r} at {here} is not a string")
        at = f"{path}.{key}" if path else key
        if key in SIMPLE:
            is_valid, expected = SIMPLE[key]
            if not is_valid(value):
                raise _Invalid(f"{at} is {_shown(value)}, where {expected} belongs")
        elif key in MAPS_OF_SCHEMAS:
            if not isinstance(value, Mapping):
                raise _Invalid(f"{at} is {_shown(value)}, where an object of schemas belongs")
            for name, item in value.items():
                if not isinstance(name, str):
                    raise _Invalid(f"the key {name!r} at {at} is not a string")
                _check(item, f"{at}.{name}", depth + 1)
        elif key in LISTS_OF_SCHEMAS or (key == "items" and isinstance(value, list)):
            if not isinstance(value, (list, tuple)) or not value:
                raise _Invalid(f"{at} is {_shown(value)}, where a list of schemas belongs")
            for i, item in enumerate(value):
                _check(item, f"{at}[{i}]", depth + 1)
        elif key in SCHEMAS:
            _check(value, at, depth + 1)
        elif not is_json(value, depth):
            raise _Invalid(f"{at} is {_shown(value)}, which JSON cannot express")


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits, which Python refuses to print
        return "something with a huge number"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)  # it may be too large for a float
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_number(value) and value == int(value) and value >= 0  # type: ignore[call-overload,operator]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and is_json(value)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_type(value: object) -> bool:
    return value in _TYPES if isinstance(value, str) else _is_names(value) and bool(value) and set(value) <= set(_TYPES)  # type: ignore[call-overload]


def _is_names_by_key(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_names(names) for names in value.values())


def is_json(value: object, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_json(item, depth + 1) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_json(item, depth + 1) for item in value)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


SIMPLE: dict[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, f"one or several of {', '.join(_TYPES)}"),
    "required": (_is_names, "a list of different property names"),
    "enum": (_is_list, "a list of values"),
    "examples": (_is_list, "a list of values"),
    "dependentRequired": (_is_names_by_key, "an object of lists of property names"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above zero"),  # type: ignore[operator]
    **dict.fromkeys(("minimum", "maximum"), (_is_number, "a number")),
    # Draft 4, and so OpenAPI 3.0, have true and false here.
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"), (lambda value: _is_bool(value) or _is_number(value), "a number")
    ),
    **dict.fromkeys(
        (
            *("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"),
            *("minProperties", "maxProperties"),
        ),
        (_is_count, "a count (0, 1, 2, ...)"),
    ),
    **dict.fromkeys(("uniqueItems", "deprecated", "readOnly", "writeOnly", "nullable"), (_is_bool, "true or false")),
    **dict.fromkeys(
        (
            *("title", "description", "format", "pattern", "contentEncoding", "contentMediaType"),
            *("$id", "$schema", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$comment"),
        ),
        (_is_text, "a string"),
    ),
}
MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SCHEMAS = frozenset(
    {
        *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"),
        *("contentSchema", "unevaluatedItems", "unevaluatedProperties"),
    }
)
