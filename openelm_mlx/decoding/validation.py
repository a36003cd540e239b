"""Validating a value against a JSON Schema, for arguments of tools and complete answers.

Schemas come from tools, MCP servers and callers, values come from a model, and any of them may be hostile. The package
jsonschema is not safe for that: it matches patterns with `re`, which takes exponential time for `^(a+)+$`, follows
references each time they are reached (2^30 times in 30 doubling definitions), and lets a part's `$schema` bring back its own
classes. A child process with a time limit would bound it too, but one would have to be started for every call, and a loaded
machine would reach the limit without a reason.

Here work is counted instead. Patterns are matched in linear time, by the engine that also enforces them. A part of a schema
is applied to a part of a value only once. Steps and depth have limits. References are resolved by the package `referencing`
from a registry with only the schema: nothing is ever fetched or opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import referencing
import referencing.jsonschema

from .json_patterns import matches
from .keywords import KEYWORDS, MOST_FAULTS, Fault, shown
from .schema_parts import identity

# A step is a keyword applied to a value; keywords that look at every item count once for each. One or two seconds.
_MOST_STEPS = 200_000
# Nested schemas while a value is checked. Each takes about four of Python's 1,000 stack frames.
_DEEPEST = 120
_DEEPEST_VALUE = 100
_PATTERN_STEPS = 20  # a pattern costs about as much as this many other keywords, plus the length of its text


class _Undecided(Exception):
    """The check was abandoned; the message says why."""


class _Unresolvable(Exception):
    """A reference leads nowhere in the schema."""


def is_too_deep(value: Any) -> bool:
    """Whether a value is nested too deep. It may be as deep as memory allows."""
    level = [value]
    for _ in range(_DEEPEST_VALUE + 1):
        parts: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                parts += each.values()
            elif isinstance(each, (list, tuple)):
                parts += each
        if not parts:
            return False
        level = parts
    return True


@final
class Validator:
    """One JSON Schema (drafts 4 to 2020-12), and whether values follow it.

    is_lenient: a reference that leads out of the schema, or nowhere, allows anything; otherwise it is a fault. A keyword whose
    own value is of the wrong kind is ignored, and so is a pattern that the engine cannot read (look-around, references to
    groups). `format` is an annotation, as the standard says.
    """

    def __init__(self, schema: Any, *, is_lenient: bool = False) -> None:
        self.schema, self.is_lenient = schema, is_lenient
        dialect = schema.get("$schema") if isinstance(schema, Mapping) else None
        dialect = dialect if isinstance(dialect, str) else ""
        # Until draft 2019-09, keywords beside a reference were ignored.
        self.ignores_siblings = any(f"draft-0{n}/" in dialect for n in (3, 4, 5, 6, 7))
        self.specification: Any = referencing.jsonschema.specification_with(
            dialect, default=referencing.jsonschema.DRAFT202012
        )
        self.root: Any = self._resolver()
        self.is_dynamic = any(f'"{word}"' in _text(schema) for word in ("$dynamicRef", "$recursiveRef"))
        self.values: dict[int, frozenset[str]] = {}  # of enums, by the identity of their list

    def faults(self, value: Any) -> list[str]:
        """What is wrong with `value`, in a few sentences that begin with the place; none when it follows the schema."""
        if is_too_deep(value):
            return [f"it is nested more than {_DEEPEST_VALUE} levels deep"]
        try:
            found = Check(self).check(value, self.schema, self.root)
        except _Undecided as error:
            return [f"it could not be checked: {error}"]
        except RecursionError:
            return ["it could not be checked: it, or its schema, is nested too deep"]
        return [f"{'.'.join(map(str, path))}: {what}" if path else what for path, what in found[:MOST_FAULTS]]

    def _resolver(self) -> Any:
        registry: Any = referencing.Registry()  # its default `retrieve` refuses everything
        try:
            return registry.resolver_with_root(self.specification.create_resource(self.schema))
        except Exception:  # noqa: BLE001  (an odd $id: then the schema has no name of its own)
            return registry.with_resource("", self.specification.create_resource(self.schema)).resolver()


def _text(schema: Any) -> str:
    try:
        return json.dumps(schema, default=str)
    except (ValueError, TypeError, RecursionError):
        return ""


@final
class Check:
    """The check of one value against one schema: known results, and the number of steps so far."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._steps = self._depth = 0
        # By the identities of a schema and a value, which live as long as the check. None: in progress.
        self._known: dict[tuple[int, int], list[Fault] | None] = {}

    def check(self, value: Any, schema: Any, resolver: Any) -> list[Fault]:
        """The first faults of `value` under `schema`, with their places in it."""
        if schema is False:
            return [((), "no value is allowed here")]
        if not isinstance(schema, Mapping) or not schema:
            return []
        # The target of a dynamic reference depends on the path to it.
        key = None if self._validator.is_dynamic else (id(schema), id(value))
        if key in self._known:
            known = self._known[key]
            if known is None:
                raise _Undecided("its schema refers to itself without an end")
            return known
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Undecided("it, or its schema, is nested too deep")
        if key is not None:
            self._known[key] = None
        found = self._apply(value, schema, self._inside(schema, resolver))
        if key is not None:
            self._known[key] = found
        self._depth -= 1  # not restored after an error, which ends the check
        return found

    def follows(self, value: Any, schema: Any, resolver: Any) -> bool:
        """Whether `value` follows `schema`."""
        return not self.check(value, schema, resolver)

    def step(self, count: int = 1) -> None:
        """Count steps before they are done."""
        self._steps += count
        if self._steps > _MOST_STEPS:
            raise _Undecided("checking it against its schema takes too long; make it smaller")

    def target(self, reference: Any, resolver: Any) -> tuple[Any, Any]:
        """The schema that a reference names, and the resolver there."""
        try:
            found = resolver.lookup(reference)
        except Exception:  # noqa: BLE001  (the package raises whatever an odd reference makes it)
            raise _Unresolvable from None
        return found.contents, found.resolver

    def recursive_target(self, reference: Any, resolver: Any) -> tuple[Any, Any]:
        """The same for `$recursiveRef`."""
        try:
            found = referencing.jsonschema.lookup_recursive_ref(resolver)
        except Exception:  # noqa: BLE001
            raise _Unresolvable from None
        return found.contents, found.resolver

    def _inside(self, schema: Mapping[str, Any], resolver: Any) -> Any:
        if "$id" in schema or "id" in schema:
            try:
                return resolver.in_subresource(self._validator.specification.create_resource(schema))
            except Exception:  # noqa: BLE001  (an odd $id changes nothing)
                return resolver
        return resolver

    def _apply(self, value: Any, schema: Mapping[str, Any], resolver: Any) -> list[Fault]:
        if value is None and schema.get("nullable") is True:
            return []
        keys = schema.keys()
        if self._validator.ignores_siblings and isinstance(schema.get("$ref"), str):
            keys = {"$ref": None}.keys()
        found: list[Fault] = []
        for key in keys:
            keyword = KEYWORDS.get(key)
            if keyword is None:
                continue
            self.step(1 + (len(value) if isinstance(value, (list, dict)) else 0))
            try:
                found += keyword(self, schema[key], value, schema, resolver) or ()
            except _Unresolvable:
                if not self._validator.is_lenient:
                    raise _Undecided(
                        f"its schema refers to {shown(schema[key])}, which is not a part of it; nothing is fetched"
                    ) from None
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
                continue  # the keyword's own value is of the wrong kind
            if len(found) >= MOST_FAULTS:
                break
        return found[:MOST_FAULTS]

    def at(self, place: Any, value: Any, schema: Any, resolver: Any) -> list[Fault]:
        """The faults of a part of a value, with their places in the whole."""
        return [((place, *path), what) for path, what in self.check(value, schema, resolver)]

    def matches(self, pattern: str, text: str) -> bool | None:
        """Whether a pattern is found in a text; None if the pattern cannot be read."""
        self.step(_PATTERN_STEPS + len(text) // 20)
        return matches(pattern, text)

    def values_of(self, values: Sequence[Any]) -> frozenset[str]:
        """An enum's values in the form in which they are compared."""
        known = self._validator.values.get(id(values))
        if known is None:
            self.step(len(values))
            known = self._validator.values[id(values)] = frozenset(map(self.identity, values))
        return known

    def identity(self, value: Any) -> str:
        """See `schema_parts.identity`; its steps are counted."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, (Mapping, list, tuple)):
                self.step(len(part))
                waiting += part.values() if isinstance(part, Mapping) else part
        return identity(value)

    # --- What of a value other keywords have looked at ----------------------------------------------------------------

    def seen(self, value: Any, schema: Any, resolver: Any, *, is_top: bool = True) -> set[Any]:
        """The names or indexes in `value` that `schema` evaluates, for unevaluatedProperties and unevaluatedItems."""
        if not isinstance(schema, Mapping):
            return set()
        self.step(1 + len(value))
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Undecided("it, or its schema, is nested too deep")
        found = self._seen_names if isinstance(value, dict) else self._seen_places
        try:
            places = found(value, schema, resolver, is_top)
            for part, inside in self._applied_parts(value, schema, resolver):
                places |= self.seen(value, part, inside, is_top=False)
            return places
        finally:
            self._depth -= 1

    def _seen_names(self, value: dict[str, Any], schema: Mapping[str, Any], resolver: Any, is_top: bool) -> set[Any]:
        if "additionalProperties" in schema or ("unevaluatedProperties" in schema and not is_top):
            return set(value)
        patterns = schema.get("patternProperties", {})
        named = set(schema.get("properties", {})) & set(value)
        return named | {name for name in value for pattern in patterns if self.matches(pattern, name)}

    def _seen_places(self, value: list[Any], schema: Mapping[str, Any], resolver: Any, is_top: bool) -> set[Any]:
        items = schema.get("items")
        everything = set(range(len(value)))
        if isinstance(items, (Mapping, bool)) or (isinstance(items, list) and "additionalItems" in schema):
            return everything
        if "unevaluatedItems" in schema and not is_top:
            return everything
        first = items if isinstance(items, list) else schema.get("prefixItems", ())
        found = everything & set(range(len(first)))
        if "contains" in schema:
            found |= {i for i, item in enumerate(value) if self.follows(item, schema["contains"], resolver)}
        return found

    def _applied_parts(self, value: Any, schema: Mapping[str, Any], resolver: Any) -> Iterator[tuple[Any, Any]]:
        """The schemas that apply to `value` itself together with `schema`, each with its resolver."""
        for key in ("$ref", "$dynamicRef"):
            if key in schema:
                yield self.target(schema[key], resolver)
        if "$recursiveRef" in schema:
            yield self.recursive_target(schema["$recursiveRef"], resolver)
        parts = [part for key in ("allOf", "anyOf", "oneOf") for part in schema.get(key, ())]
        if isinstance(value, dict):
            parts += [part for name, part in schema.get("dependentSchemas", {}).items() if name in value]
        yield from ((part, resolver) for part in parts if self.follows(value, part, resolver))
        if "if" in schema:
            holds = self.follows(value, schema["if"], resolver)
            yield from ((schema[key], resolver) for key in (("if", "then") if holds else ("else",)) if key in schema)
