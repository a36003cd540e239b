"""Whether the alternatives of a `oneOf` exclude each other, as far as that can be proved.

An engine that chooses tokens can enforce "one of these" but not "exactly one of these". If no value fits two alternatives,
both mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import Any, final

from .engine_schema import engine_refusal
from .number_bounds import Bound, bounds_of, exact, first_and_last
from .schema_parts import has_huge_number, identity, kind_of, may_be, shown, target_of
from .validation import Validator

_TYPES = ("string", "number", "boolean", "null", "array", "object")
_MOST_STEPS = 20_000


@final
class Alternatives:
    """The alternatives of one schema's oneOfs.

    root: the whole schema, for its references. walk: makes a schema as answers will be written from one of the user's.
    """

    def __init__(self, root: Any, walk: Callable[[Any, str], Any]) -> None:
        self._root, self._walk = root, walk
        self._steps = 0
        self._marking: set[int] = set()

    def apart(self, given: list[Any], prepared: list[Any], here: str) -> tuple[list[Any] | None, str]:
        """The alternatives as an anyOf, or None and why they are not followed.

        given: as the user has them. prepared: as answers will be written, with the same or less allowed: a closed object
        cannot have the member that another alternative requires.
        """
        if all(map(_only_requires, given)):
            return _exclusive_members(given, prepared), ""
        prepared = list(prepared)
        for i, j in permutations(range(len(given)), 2):
            if self._are_apart(prepared[i], given[j], frozenset()):
                continue
            marked = self._marked(given[i], prepared[i], given[j], f"{here}.oneOf[{i}]")
            if marked is None:
                return None, self._reason(given, min(i, j), max(i, j))
            prepared[i] = marked
        return prepared, ""

    def _marked(self, own: Any, written: Any, other: Any, path: str) -> Any:
        """`written` with a required member that distinguishes it from `other` (such as a tag); None if there is none."""
        if isinstance(own, Mapping) and set(own) == {"$ref"}:
            own = target_of(self._root, own["$ref"])
            if id(own) in self._marking:
                return None  # this very oneOf is in it
            self._marking.add(id(own))
            written = self._walk(own, path) if isinstance(own, Mapping) else written
            self._marking.discard(id(own))
        if isinstance(other, Mapping) and set(other) == {"$ref"}:
            other = target_of(self._root, other["$ref"])
        if not all(isinstance(each, Mapping) and each.get("type") == "object" for each in (own, written, other)):
            return None
        for name in _members(own):
            if name in _members(other) and self._are_apart(_members(own)[name], _members(other)[name], frozenset()):
                return {**written, "required": [*dict.fromkeys((*_required(written), name))]}
        return None

    def _reason(self, given: list[Any], i: int, j: int) -> str:
        advice = "Use anyOf, or give each alternative a required member with a const of its own."
        example = _fits_both(given[i], given[j])
        if example:
            return f"its alternatives {i + 1} and {j + 1} both fit {example[0]}, which oneOf forbids. {advice}"
        return f"its alternatives {i + 1} and {j + 1} may both fit one value, which oneOf forbids. {advice}"

    def _are_apart(self, a: Any, b: Any, seen: frozenset[tuple[int, int]]) -> bool:
        """Whether no value fits both, proved for some conjunct of each; False if that cannot be proved."""
        self._steps += 1
        if self._steps > _MOST_STEPS or (id(a), id(b)) in seen:
            return False
        seen |= {(id(a), id(b))}
        if a is False or b is False:
            return True
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        for first in self._conjuncts(a):
            for second in self._conjuncts(b):
                if first is not a or second is not b:
                    if self._are_apart(first, second, seen):
                        return True
                elif self._own_parts_apart(a, b, seen):
                    return True
        return any(
            choices and all(self._are_apart(choice, *rest, seen) for choice in choices)
            for choices, rest in ((_choices(a), (b,)), (_choices(b), (a,)))
        )

    def _conjuncts(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        yield schema
        if isinstance(schema.get("$ref"), str):
            yield target_of(self._root, schema["$ref"])
        if isinstance(schema.get("allOf"), (list, tuple)):
            yield from schema["allOf"]

    def _own_parts_apart(self, a: Mapping[str, Any], b: Mapping[str, Any], seen: frozenset[tuple[int, int]]) -> bool:
        first, second = _values(a), _values(b)
        if first is not None and second is not None:
            known = set(map(identity, first))
            return not any(identity(value) in known for value in second)
        common = [kind for kind in _TYPES if _may_be(a, kind) and _may_be(b, kind)]
        return all(self._apart_as(kind, a, b, seen) for kind in common)

    def _apart_as(
        self, kind: str, a: Mapping[str, Any], b: Mapping[str, Any], seen: frozenset[tuple[int, int]]
    ) -> bool:
        if kind == "object":
            return any(self._member_apart(name, a, b, seen) for name in {*_required(a), *_required(b)})
        if kind == "array":
            if not (a.get("minItems", 0) or b.get("minItems", 0)) or "prefixItems" in a or "prefixItems" in b:
                return _beyond(a, b, "minItems", "maxItems")
            items = a.get("items", True), b.get("items", True)
            return _beyond(a, b, "minItems", "maxItems") or self._are_apart(*items, seen)
        if kind == "string":
            return _beyond(a, b, "minLength", "maxLength") or strings_apart(a, b)
        return kind == "number" and _numbers_apart(a, b)

    def _member_apart(
        self, name: str, a: Mapping[str, Any], b: Mapping[str, Any], seen: frozenset[tuple[int, int]]
    ) -> bool:
        return self._are_apart(_member(a, name), _member(b, name), seen)


def _members(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _numbers_apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether no number is within the bounds of both."""
    sides = []
    for schema in (a, b):
        values = _values(schema)
        if values is None:
            sides.append([bounds_of(schema)])
        else:
            points = [Bound(exact(value), False) for value in values if kind_of(value) == "number"]
            sides.append([(point, point) for point in points])
    is_whole = not (_may_be_fraction(a) and _may_be_fraction(b))
    for low, high in sides[0]:
        for other_low, other_high in sides[1]:
            pairs = ((low, other_high), (other_low, high))
            if not any(_is_empty(first, last, is_whole) for first, last in pairs):
                return False
    return True


def _is_empty(low: Bound | None, high: Bound | None, is_whole: bool) -> bool:
    if low is None or high is None:
        return False
    if is_whole:
        first, last = first_and_last(low, high)
        return first is not None and last is not None and first > last
    return low.value > high.value or (low.value == high.value and (low.is_open or high.is_open))


def _may_be_fraction(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", "number")
    return "number" in ([kinds] if isinstance(kinds, str) else kinds)


def strings_apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether, according to the engine, no string matches the patterns and lengths of both."""
    sides = []
    for schema in (a, b):
        kept = {key: schema[key] for key in _OF_STRINGS if key in schema}
        values = _values(schema)
        if values is not None:
            kept["enum"] = [value for value in values if isinstance(value, str)]
        sides.append({"type": "string", **kept})
    if not all({"pattern", "enum", "format"} & side.keys() for side in sides):
        return False
    # Each alone is accepted, so if both together are refused, they have nothing in common.
    if any(engine_refusal(json.dumps(side)) for side in sides):
        return False
    reason = engine_refusal(json.dumps({"allOf": sides}))
    return reason is not None and ("Regex is empty" in reason or "Unsatisfiable schema" in reason)


_OF_STRINGS = ("pattern", "format", "minLength", "maxLength")
_EXAMPLES: tuple[Any, ...] = (0, 1, -1, 2, 10, 0.5, "", "a", "text", True, False, None, [], [0], ["a"], {})


def _fits_both(a: Any, b: Any) -> list[str]:
    """A value that fits both, as JSON, where a simple one is found.

    No example is looked for beside references, which need the whole schema, nor beside patterns and formats, which the
    validator may not know.
    """
    text = json.dumps([a, b], default=str) if not has_huge_number([a, b]) else '"$ref"'
    if any(f'"{word}"' in text for word in ("$ref", "pattern", "patternProperties", "format")) or len(text) > 5000:
        return []
    both = Validator({"allOf": [a, b]})
    for example in (*_EXAMPLES, *_made(a), *_made(b)):
        if not both.faults(example):
            return [shown(example)]
    return []


def _made(schema: Any) -> list[Any]:
    """Simple values of a schema: those it lists, or an object with what it requires."""
    if not isinstance(schema, Mapping):
        return []
    values = _values(schema)
    if values is not None:
        return values
    if not _required(schema):
        return []
    return [
        {name: (_made(_members(schema).get(name)) or [example])[0] for name in _required(schema)}
        for example in _EXAMPLES
    ]


def _member(schema: Mapping[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return True if schema.get("patternProperties") else schema.get("additionalProperties", True)


def _only_requires(schema: Any) -> bool:
    keys = set(schema) if isinstance(schema, Mapping) else set()
    return "required" in keys and keys <= {"required", "type"} and schema.get("type", "object") == "object"


def _exclusive_members(given: list[Any], prepared: list[Any]) -> list[Any]:
    """`oneOf` of nothing but required names: each alternative forbids a member of each other."""
    branches: list[Any] = []
    for i, own in enumerate(given):
        names = [_required(own), *(_required(other) for j, other in enumerate(given) if j != i)]
        forbidden = [next((name for name in other if name not in names[0]), None) for other in names[1:]]
        if None not in forbidden:
            branches.append({**prepared[i], "properties": dict.fromkeys(forbidden, False)})
    return branches or [False]


def _required(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("required", ()))


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), (list, tuple)):
            return list(schema[key])
    return []


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), (list, tuple)) else None


def _may_be(schema: Mapping[str, Any], kind: str) -> bool:
    values = _values(schema)
    if values is not None and not any(kind_of(value) == kind for value in values):
        return False
    return may_be(schema, kind)


def _beyond(a: Mapping[str, Any], b: Mapping[str, Any], low: str, high: str) -> bool:
    """Whether one's range ends before the other's begins."""

    def ends_before(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        return high in first and low in second and first[high] < second[low]

    return ends_before(a, b) or ends_before(b, a)
