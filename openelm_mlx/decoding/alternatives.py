"""Whether the alternatives of a `oneOf` exclude each other, as far as that can be shown.

An engine that chooses tokens can follow "one or another of these", not "exactly one": it does not look back. Where no value
can fit two alternatives the two are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, final
from urllib.parse import unquote

_TYPES = ("string", "number", "boolean", "null", "array", "object")
_MOST_STEPS = 20_000


@final
class Alternatives:
    """The alternatives of one schema's oneOfs; `root` is the whole schema, for its references."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0

    def apart(self, given: list[Any], prepared: list[Any]) -> tuple[list[Any] | None, tuple[int, int]]:
        """The alternatives as an anyOf, or None and the numbers (from 1) of two that may fit one value.

        given: as the user has them. prepared: as answers will be written, with the same or less allowed: a closed object
        cannot have the member that another alternative requires.
        """
        if all(isinstance(each, Mapping) and set(each) <= {"required", "type"} for each in given):
            return _exclusive_members(given, prepared), (0, 0)
        for i, written in enumerate(prepared):
            for j, other in enumerate(given):
                if i != j and not self._are_apart(written, other, frozenset()):
                    return None, (min(i, j) + 1, max(i, j) + 1)
        return prepared, (0, 0)

    def _are_apart(self, a: Any, b: Any, seen: frozenset[tuple[int, int]]) -> bool:
        """Whether no value fits both. Shown for some conjunct of each; False where it cannot be shown."""
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
            texts = set(map(_text, first))
            return not any(_text(value) in texts for value in second)
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
            return _beyond(a, b, "minLength", "maxLength")
        return kind == "number" and _beyond(a, b, "minimum", "maximum")

    def _member_apart(
        self, name: str, a: Mapping[str, Any], b: Mapping[str, Any], seen: frozenset[tuple[int, int]]
    ) -> bool:
        return self._are_apart(_member(a, name), _member(b, name), seen)


def _member(schema: Mapping[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return True if schema.get("patternProperties") else schema.get("additionalProperties", True)


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


def _text(value: Any) -> str:
    """Equal for values that JSON Schema holds for equal: 1 and 1.0 are."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _may_be(schema: Mapping[str, Any], kind: str) -> bool:
    values = _values(schema)
    if values is not None and not any(_kind_of(value) == kind for value in values):
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return kind in kinds or (kind == "number" and "integer" in kinds)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "object" if isinstance(value, Mapping) else "array"


def _beyond(a: Mapping[str, Any], b: Mapping[str, Any], low: str, high: str) -> bool:
    """Whether one's range ends before the other's begins."""

    def ends_before(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        return high in first and low in second and first[high] < second[low]

    return ends_before(a, b) or ends_before(b, a)


def target_of(root: Any, reference: str) -> Any:
    """What a `$ref` within the schema points to; True (anything) where it points elsewhere or nowhere."""
    own = root.get("$id") if isinstance(root, Mapping) else None
    if isinstance(own, str) and own and reference.startswith(own):
        reference = reference[len(own) :] or "#"
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return True
    node = root
    for part in reference[2:].split("/"):
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, (list, tuple)) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return True
    return node
