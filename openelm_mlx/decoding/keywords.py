"""Validating a value: one function for each keyword of JSON Schema. validation.py applies them and limits the work."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .number_bounds import as_written

Fault = tuple[tuple[Any, ...], str]  # where in the value, and what is wrong there


class Check(Protocol):
    """What a keyword's function needs from the running check (validation.py)."""

    def check(self, value: Any, schema: Any, resolver: Any) -> list[Fault]:
        """The first faults of `value` under `schema`, with their places in it."""

    def at(self, place: Any, value: Any, schema: Any, resolver: Any) -> list[Fault]:
        """The faults of a part of a value, with `place` in front of theirs."""

    def follows(self, value: Any, schema: Any, resolver: Any) -> bool:
        """Whether `value` has no fault under `schema`."""

    def matches(self, pattern: str, text: str) -> bool | None:
        """Whether a pattern is found in a text; None if the pattern cannot be read."""

    def identity(self, value: Any) -> str:
        """A text that is the same only for equal values: 1 and 1.0 are the same number, true is not a number."""

    def values_of(self, values: Sequence[Any]) -> frozenset[str]:
        """The identities of the values of a list."""

    def seen(self, value: Any, schema: Any, resolver: Any, *, is_top: bool = True) -> set[Any]:
        """The names or places of `value` that keywords of `schema` have looked at."""

    def target(self, reference: Any, resolver: Any) -> tuple[Any, Any]:
        """The schema that a $ref names, and the resolver to go on with."""

    def recursive_target(self, reference: Any, resolver: Any) -> tuple[Any, Any]:
        """The same for a $recursiveRef."""


Keyword = Callable[["Check", Any, Any, Mapping[str, Any], Any], "Sequence[Fault]"]

MOST_FAULTS = 3  # for one value: more are not helpful, and doubling definitions would double them

KEYWORDS: dict[str, Keyword] = {}


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = "a huge value"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keyword(*names: str, kind: Any = object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function for keywords; it is called for values of this kind only."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def applied(check: Check, rule: Any, value: Any, schema: Mapping[str, Any], resolver: Any) -> Any:
            if not isinstance(value, kind) or (kind is _NUMBER and isinstance(value, bool)):
                return ()
            return function(check, rule, value, schema, resolver)

        KEYWORDS.update(dict.fromkeys(names, applied))
        return function

    return register


_NUMBER = (int, float)
_KINDS: dict[str, Callable[[Any], bool]] = {
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: (isinstance(value, int) and not isinstance(value, bool)) or _is_whole(value),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, _NUMBER) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


@_keyword("type")
def _type(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    kinds = [rule] if isinstance(rule, str) else rule
    if not any(_KINDS[kind](value) if kind in _KINDS else True for kind in kinds):
        return [((), f"{shown(value)} is not of type {' or '.join(kinds)}")]
    return ()


@_keyword("enum")
def _enum(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if isinstance(rule, list) and check.identity(value) not in check.values_of(rule):
        few = ", ".join(map(shown, rule[:8])) + (", ..." if len(rule) > 8 else "")
        return [((), f"{shown(value)} is not one of {few}")]
    return ()


@_keyword("const")
def _const(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return () if check.identity(value) == check.identity(rule) else [((), f"{shown(value)} is not {shown(rule)}")]


@_keyword("minimum", kind=_NUMBER)
def _minimum(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if value < rule or (schema.get("exclusiveMinimum") is True and value == rule):
        return [((), f"{shown(value)} is below the least value, {shown(rule)}")]
    return ()


@_keyword("maximum", kind=_NUMBER)
def _maximum(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if value > rule or (schema.get("exclusiveMaximum") is True and value == rule):
        return [((), f"{shown(value)} is above the greatest value, {shown(rule)}")]
    return ()


@_keyword("exclusiveMinimum", kind=_NUMBER)
def _above(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return [((), f"{shown(value)} is not above {shown(rule)}")] if _is_bound(rule) and value <= rule else ()


@_keyword("exclusiveMaximum", kind=_NUMBER)
def _below(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return [((), f"{shown(value)} is not below {shown(rule)}")] if _is_bound(rule) and value >= rule else ()


def _is_bound(rule: Any) -> bool:
    return isinstance(rule, _NUMBER) and not isinstance(rule, bool)  # draft 4 has booleans here


@_keyword("multipleOf", kind=_NUMBER)
def _multiple(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return (
        ()
        if as_written(value) % as_written(rule) == 0
        else [((), f"{shown(value)} is not a multiple of {shown(rule)}")]
    )


def _too_few(what: str) -> Any:
    def least(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
        return [((), f"it has {len(value)} {what}, and at least {rule} are needed")] if len(value) < rule else ()

    return least


def _too_many(what: str) -> Any:
    def most(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
        return [((), f"it has {len(value)} {what}, and at most {rule} are allowed")] if len(value) > rule else ()

    return most


for _part, _of, _what in (("Length", str, "characters"), ("Items", list, "items"), ("Properties", dict, "members")):
    _keyword(f"min{_part}", kind=_of)(_too_few(_what))
    _keyword(f"max{_part}", kind=_of)(_too_many(_what))


@_keyword("pattern", kind=str)
def _pattern(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return [((), f"{shown(value)} does not match {shown(rule)}")] if check.matches(rule, value) is False else ()


# Arrays


@_keyword("prefixItems", kind=list)
def _prefix_items(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return _each(check, [(i, value[i], part) for i, part in enumerate(rule[: len(value)])], resolver)


@_keyword("items", kind=list)
def _items(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if isinstance(rule, list):  # until 2019
        return _prefix_items(check, rule, value, schema, resolver)
    prefix = schema.get("prefixItems")
    start = len(prefix) if isinstance(prefix, list) else 0
    return _each(check, [(i, value[i], rule) for i in range(start, len(value))], resolver)


@_keyword("additionalItems", kind=list)
def _additional_items(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if not isinstance(schema.get("items"), list):
        return ()
    return _each(check, [(i, value[i], rule) for i in range(len(schema["items"]), len(value))], resolver)


def _each(check: Check, parts: list[tuple[Any, Any, Any]], resolver: Any) -> list[Fault]:
    """The first faults of several parts, each with its place and its schema."""
    found: list[Fault] = []
    for place, part, schema in parts:
        found += check.at(place, part, schema, resolver)
        if len(found) >= MOST_FAULTS:
            break
    return found


@_keyword("contains", kind=list)
def _contains(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    count = sum(check.follows(item, rule, resolver) for item in value)
    low, high = schema.get("minContains", 1), schema.get("maxContains", math.inf)
    if not low <= count <= high:
        return [
            ((), f"{count} of its items are of the form that it must contain {'more' if count < low else 'less'} of")
        ]
    return ()


@_keyword("uniqueItems", kind=list)
def _unique_items(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if rule is True and len(set(map(check.identity, value))) < len(value):
        return [((), "two of its items are equal")]
    return ()


@_keyword("unevaluatedItems", kind=list)
def _unevaluated_items(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    seen = check.seen(value, schema, resolver)
    return _each(check, [(i, item, rule) for i, item in enumerate(value) if i not in seen], resolver)


# Objects


@_keyword("properties", kind=dict)
def _properties(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return _each(check, [(name, value[name], part) for name, part in rule.items() if name in value], resolver)


@_keyword("patternProperties", kind=dict)
def _pattern_properties(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    parts = [
        (name, value[name], part) for pattern, part in rule.items() for name in value if check.matches(pattern, name)
    ]
    return _each(check, parts, resolver)


@_keyword("additionalProperties", kind=dict)
def _additional_properties(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    named, patterns = schema.get("properties") or {}, schema.get("patternProperties") or {}
    # A pattern that cannot be read may have meant any name.
    others = [name for name in value if name not in named]
    others = [name for name in others if not any(check.matches(each, name) is not False for each in patterns)]
    if rule is False and others:
        known = f" it has {', '.join(map(shown, list(named)[:12]))}" if named else " it has none"
        return [((), f"there is no member {shown(others[0])};{known}")]
    return _each(check, [(name, value[name], rule) for name in others], resolver)


@_keyword("propertyNames", kind=dict)
def _property_names(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return [
        ((), f"a member's name is wrong: {what}") for name in value for _, what in check.check(name, rule, resolver)
    ]


@_keyword("required", kind=dict)
def _required(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if not isinstance(rule, list):
        return ()  # draft 3 has true and false here
    return [((), f"{shown(name)} is missing") for name in rule if name not in value]


@_keyword("dependentRequired", kind=dict)
def _dependent_required(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    needed = [(name, other) for name, others in rule.items() if name in value for other in others if other not in value]
    return [((), f"{shown(other)} is missing, which {shown(name)} needs") for name, other in needed]


@_keyword("dependentSchemas", kind=dict)
def _dependent_schemas(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return [fault for name, part in rule.items() if name in value for fault in check.check(value, part, resolver)]


@_keyword("dependencies", kind=dict)
def _dependencies(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    names = {name: part for name, part in rule.items() if isinstance(part, list)}
    found = _dependent_required(check, names, value, schema, resolver)
    others = {name: part for name, part in rule.items() if name not in names}
    return [*found, *_dependent_schemas(check, others, value, schema, resolver)]


@_keyword("unevaluatedProperties", kind=dict)
def _unevaluated_properties(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    seen = check.seen(value, schema, resolver)
    return _each(check, [(name, item, rule) for name, item in value.items() if name not in seen], resolver)


# Schemas put together


@_keyword("$ref", "$dynamicRef")
def _reference(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return check.check(value, *check.target(rule, resolver))


@_keyword("$recursiveRef")
def _recursive_reference(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    return check.check(value, *check.recursive_target(rule, resolver))


@_keyword("allOf")
def _all_of(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    found: list[Fault] = []
    for part in rule:
        found += [fault for fault in check.check(value, part, resolver) if fault not in found]
    return found


@_keyword("anyOf")
def _any_of(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    nearest: list[Fault] = []
    for part in rule:
        found = check.check(value, part, resolver)
        if not found:
            return ()
        # Report the faults of the alternative that matched the farthest.
        if not nearest or len(found[0][0]) > len(nearest[0][0]):
            nearest = found
    if nearest and (nearest[0][0] or len(rule) == 1):
        return nearest
    return [((), f"{shown(value)} is none of the {len(rule)} allowed alternatives")]


@_keyword("oneOf")
def _one_of(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if sum(check.follows(value, part, resolver) for part in rule) > 1:
        return [((), f"{shown(value)} is valid for more than one alternative of oneOf")]
    return _any_of(check, rule, value, schema, resolver)


@_keyword("not")
def _not(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if isinstance(rule, (Mapping, bool)) and check.follows(value, rule, resolver):
        return [((), f"{shown(value)} is not allowed here")]
    return ()


@_keyword("if")
def _if(check: Check, rule: Any, value: Any, schema: Any, resolver: Any) -> Any:
    if not isinstance(rule, (Mapping, bool)):
        return ()
    other = "then" if check.follows(value, rule, resolver) else "else"
    return check.check(value, schema[other], resolver) if other in schema else ()
