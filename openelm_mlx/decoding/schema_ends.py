"""Which parts of a schema have finite values, and which parts are reachable at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from ..errors import SettingError
from .schema_parts import NAMED_SCHEMAS, REFUSED, nodes, target_of

# Keywords whose schemas apply to the same value.
_APPLIED = frozenset(
    {
        *("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "additionalItems"),
        *("allOf", "anyOf", "oneOf"),
    }
)


@final
class SchemaEnds:
    """Which parts of a schema have finite values; the others are left out if that is allowed.

    A definition that always contains itself has none. The finite parts are found as a least fixed point.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._finite: set[int] = set()
        self._nodes = list(nodes(schema))
        for _ in range(len(self._nodes) + 1):
            before = len(self._finite)
            self._finite.update(id(n) for n in reversed(self._nodes) if id(n) not in self._finite and self._ends(n))
            if len(self._finite) == before:
                break

    def pruned(self) -> Any:
        """The schema without infinite parts; False if it is infinite itself. Raises SettingError for a refused part."""
        if not self._has_end(self._root):
            self._raise_refusals()
            return False
        for node in self._nodes:
            assert isinstance(node, dict)
            if id(node) in self._finite:
                self._prune(node)
        self._raise_refusals()
        for node in self._nodes:
            assert isinstance(node, dict)
            if REFUSED in node:  # unreachable, but the engine would read it
                node.clear()
                node["type"] = "null"
        return self._root

    def _raise_refusals(self) -> None:
        for node in self._reached(self._root, set()):
            if REFUSED in node:
                raise SettingError(node[REFUSED])

    def _reached(self, schema: Any, seen: set[int]) -> Iterator[Mapping[str, Any]]:
        """The schemas that the root needs: definitions only where something refers to them."""
        waiting = [schema]
        while waiting:
            node = waiting.pop()
            if isinstance(node, (list, tuple)):
                waiting += node
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if isinstance(node.get("$ref"), str):
                waiting.append(target_of(self._root, node["$ref"]))
            for key, value in node.items():
                if key in _APPLIED:
                    waiting += value.values() if key in NAMED_SCHEMAS and isinstance(value, Mapping) else [value]

    def _has_end(self, schema: Any) -> bool:
        if isinstance(schema, Mapping):
            return id(schema) in self._finite
        return schema is not False

    def _ends(self, node: Mapping[str, Any]) -> bool:
        if "const" in node or node.get("enum"):
            return True
        if node.get("enum") is not None:
            return False
        if isinstance(node.get("$ref"), str) and not self._has_end(target_of(self._root, node["$ref"])):
            return False
        if not all(map(self._has_end, _listed(node, "allOf"))):
            return False
        for key in ("anyOf", "oneOf"):
            if key in node and not any(map(self._has_end, _listed(node, key))):
                return False
        kinds = node.get("type", "string" if "$ref" not in node else None)
        kinds = [kinds] if isinstance(kinds, str) or kinds is None else kinds
        return any(self._ends_as(node, kind) for kind in kinds)

    def _ends_as(self, node: Mapping[str, Any], kind: str | None) -> bool:
        if kind == "array":
            return all(map(self._has_end, _first_items(node)))
        if kind in ("object", None):
            properties = node.get("properties", {})
            other = node.get("additionalProperties", True)
            return all(self._has_end(properties.get(name, other)) for name in node.get("required", ()))
        return True

    def _prune(self, node: dict[str, Any]) -> None:
        for key in ("anyOf", "oneOf"):
            if key in node:
                node[key] = [each for each in _listed(node, key) if self._has_end(each)]
        for key in ("properties", "patternProperties"):
            if isinstance(node.get(key), dict):
                node[key] = {name: each if self._has_end(each) else False for name, each in node[key].items()}
        for key in ("items", "additionalItems", "additionalProperties"):
            if isinstance(node.get(key), dict) and not self._has_end(node[key]):
                node[key] = False
        for key in ("prefixItems", "items"):
            if isinstance(node.get(key), list):
                node[key] = [each if self._has_end(each) else False for each in node[key]]


def _listed(node: Mapping[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    return list(value) if isinstance(value, (list, tuple)) else []


def _first_items(node: Mapping[str, Any]) -> list[Any]:
    """The schemas of the items that an array has at least."""
    count = node.get("minItems", 0)
    given = _listed(node, "prefixItems") or _listed(node, "items")
    first, items = given[:count], node.get("items")
    if len(first) < count and isinstance(items, (Mapping, bool)):
        first.append(items)
    return first
