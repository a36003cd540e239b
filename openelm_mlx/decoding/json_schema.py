"""Rewriting a user's JSON Schema into one that the engine can enforce.

The engine (llguidance) supports less than the standard, and some unsupported schemas crash the process or break off an
answer. So a schema is rewritten first, always to one that allows the same or less: objects are closed, dates exist, counts
and bounds are numbers that the engine can write, infinite parts are left out. What cannot be rewritten is refused with its
place. Numbers are rewritten in schema_numbers.py; text/schema_check.py checks a schema's form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple, final

from ..errors import SettingError
from ..text.schema_check import check_schema
from .alternatives import Alternatives, strings_apart
from .engine_schema import engine_refusal
from .json_patterns import fits, held_pattern
from .number_bounds import common_multiple_is_too_large
from .schema_ends import SchemaEnds
from .schema_keywords import ANNOTATIONS, COMBINING, KNOWN, UNHELD, combines_conditions
from .schema_numbers import SchemaNumbers
from .schema_parts import (
    DATA,
    NAMED_SCHEMAS,
    OTHER_TYPES,
    REFUSED,
    find,
    may_be,
    nodes,
    num_combined,
    refuse,
    shown,
)
from .string_formats import FORMATS

# The engine combines a part again for each reference to it.
_MOST_COMBINED = 5_000
# The largest count of characters or items: a larger maximum is never reached, a larger minimum is refused.
_MOST_COUNT = 65_536

_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[4-7]|draft/2019-09|draft/2020-12)/schema#?")


class Prepared(NamedTuple):
    """A schema for the engine, and sentences about parts of the user's schema that it does not enforce."""

    schema: Any
    notes: tuple[str, ...]


def prepared(schema: Any) -> Prepared:
    """The schema that the engine is given. Raises SettingError for what cannot be enforced, with the place."""
    return _Preparation(schema).result()


@final
class _Preparation:
    def __init__(self, schema: Any) -> None:
        self._root = schema
        parts = list(nodes(schema))
        # If parts are combined, closing one would forbid members that another requires.
        self._may_close = not any("allOf" in part or "unevaluatedProperties" in part for part in parts)
        self._has_references = any("$ref" in part for part in parts)
        self._identifiers = [part["$id"] for part in parts if isinstance(part.get("$id"), str)]
        self._notes: dict[str, None] = {}
        self._numbers = SchemaNumbers(any(map(combines_conditions, parts)), self._note)
        self._alternatives = Alternatives(schema, self._walk)

    def result(self) -> Prepared:
        schema = self._walk(self._root, "")
        if num_combined(schema) > _MOST_COMBINED:
            raise SettingError(
                f"The schema combines more than {_MOST_COMBINED:,} parts, each reference counted as often as it is used: use "
                f"fewer allOf and $ref that lead to one another."
            )
        schema = SchemaEnds(schema).pruned()
        if schema is False and self._root is not False:
            raise SettingError(
                "The schema is unsatisfiable: no value fits it, or a required part of it contains itself endlessly. Make a "
                "member of the circle optional, or allow another type for it."
            )
        if common_multiple_is_too_large(schema):
            raise SettingError(
                "The schema combines several multipleOf whose common multiple is too large: use one of them."
            )
        return Prepared(schema, tuple(self._notes))

    # --- The walk -----------------------------------------------------------------------------------------------------

    def _walk(self, schema: Any, path: str) -> Any:
        if isinstance(schema, (list, tuple)):
            return [self._walk(item, f"{path}[{i}]") for i, item in enumerate(schema)]
        if not isinstance(schema, Mapping):
            return schema
        walked = {
            key: self._walk_value(key, value, f"{path}.{key}" if path else key)
            for key, value in schema.items()
            if key in KNOWN or self._may_hold_schemas(key, value)
        }
        here = path or "the top level"
        numbers = self._numbers
        steps = (
            self._names,
            numbers.constants,
            self._counts,
            self._string,
            numbers.bounds,
            self._choices,
            self._object,
        )
        for step in (*steps, self._unheld):
            step(walked, schema, here)
        return walked

    def _walk_value(self, key: str, value: Any, path: str) -> Any:
        if key in DATA:
            return value
        if key in NAMED_SCHEMAS and isinstance(value, Mapping):  # names, which may look like keywords
            return {name: self._walk(item, f"{path}.{name}") for name, item in value.items()}
        return self._walk(value, path)

    def _may_hold_schemas(self, key: str, value: Any) -> bool:
        """Whether references may lead to an unknown member, such as OpenAPI's `components`."""
        if key in ANNOTATIONS or not self._has_references or not isinstance(value, Mapping):
            return False
        try:
            check_schema(value, key)
        except SettingError:
            return False
        return True

    def _note(self, sentence: str) -> None:
        self._notes[sentence] = None

    def _names(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        """Names of schemas, and references."""
        if "$schema" in walked and not _DRAFT.fullmatch(walked["$schema"]):
            del walked["$schema"]  # an unknown dialect
        if not self._has_references:
            walked.pop("$id", None)
        reference = walked.get("$ref")
        if not isinstance(reference, str):
            return
        if not reference.startswith("#") and not self._identifiers:
            refuse(
                walked,
                f"The $ref {shown(reference)} at {here} leads out of the schema, and nothing outside it is read: put the "
                f"definition under $defs.",
            )
        elif reference.startswith("#/") and not self._identifiers and find(self._root, reference) is None:
            refuse(
                walked,
                f"The $ref {shown(reference)} at {here} points to nothing in the schema: correct it, or add the definition.",
            )

    def _unheld(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        if "if" not in schema or not {"then", "else"} & schema.keys():
            for key in ("if", "then", "else"):
                walked.pop(key, None)  # without effect alone
        if "contains" not in schema:
            walked.pop("minContains", None)
            walked.pop("maxContains", None)
        for key, harmless in UNHELD.items():
            if key in walked and any(schema[key] is each or schema[key] == each for each in harmless):
                del walked[key]
        odd = [key for key in UNHELD if key in walked]
        if odd:
            names = " and ".join(odd)
            refuse(
                walked,
                f"{names} at {here} cannot be enforced while tokens are chosen: leave {'it' if len(odd) == 1 else 'them'} out, "
                f"and check the answer afterwards.",
            )

    def _counts(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        for kind in ("Length", "Items", "Properties"):
            low, high = schema.get(f"min{kind}"), schema.get(f"max{kind}")
            if low is not None and low > _MOST_COUNT:
                refuse(
                    walked,
                    f"min{kind} at {here} is {shown(low)}, and no answer is that long: the limit is {_MOST_COUNT:,}.",
                )
                low = 0
            if low is not None:
                walked[f"min{kind}"] = int(low)
            if high is not None and high > _MOST_COUNT:
                walked.pop(f"max{kind}", None)  # never reached
            elif high is not None:
                walked[f"max{kind}"] = int(high)
        if walked.get("uniqueItems") is True and walked.get("maxItems", 2) <= 1:
            del walked["uniqueItems"]

    def _string(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        name = walked.get("format")
        if isinstance(name, str):
            if not may_be(walked, "string"):
                del walked["format"]  # int32, double, ...: without effect for numbers
            elif name in FORMATS:
                del walked["format"]
                self._add_pattern(walked, f"^{FORMATS[name]}$")
            elif engine_refusal(json.dumps({"type": "string", "format": name})) is not None:
                del walked["format"]
                self._note(f"The format {name!r} at {here} is not enforced: any string is accepted there.")

    def _add_pattern(self, walked: dict[str, Any], pattern: str) -> None:
        if "pattern" in walked:
            # The engine enforces all of them.
            walked["allOf"] = [*walked.get("allOf", ()), {"type": "string", "pattern": pattern}]
            if walked.get("type") != "string":
                walked["allOf"][-1] = {"anyOf": [walked["allOf"][-1], {"type": OTHER_TYPES}]}
        else:
            walked["pattern"] = pattern

    def _choices(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        self._check_pattern(walked, here)
        if isinstance(walked.get("anyOf"), list):
            walked["anyOf"] = self._followed(walked["anyOf"], here)
        if isinstance(walked.get("oneOf"), list) and isinstance(schema.get("oneOf"), (list, tuple)):
            branches, one = self._alternatives.apart(list(schema["oneOf"]), walked["oneOf"], here)
            if branches is None:
                refuse(walked, f"The oneOf at {here} cannot be enforced: {one}")
                branches = walked["oneOf"]
            del walked["oneOf"]
            if "anyOf" in walked:
                walked["allOf"] = [*walked.get("allOf", ()), {"anyOf": branches}]
            else:
                walked["anyOf"] = branches

    def _check_pattern(self, walked: dict[str, Any], here: str) -> None:
        if isinstance(walked.get("pattern"), str):
            walked["pattern"] = self._held(walked, walked["pattern"], here)

    def _held(self, walked: dict[str, Any], pattern: str, here: str) -> str:
        """The pattern in the form that the engine can enforce; refused and unchanged if there is none."""
        reason = engine_refusal(json.dumps({"type": "string", "pattern": pattern}))
        held = None if reason else held_pattern(pattern)
        if held is None:
            reason = reason or "it has every control character, and quotes or backslashes are not told from them"
            refuse(walked, f"The pattern {shown(pattern)} at {here} cannot be enforced: {reason[:200]}.")
            return pattern
        return held

    def _followed(self, branches: list[Any], here: str) -> list[Any]:
        """The alternatives that can be enforced, or all if none can."""
        kept = [each for each in branches if not (isinstance(each, dict) and REFUSED in each)]
        if not kept:
            return branches
        for each in branches:
            if isinstance(each, dict) and REFUSED in each:
                self._note(f"{each[REFUSED]} This alternative is left out.")
        return kept

    # --- Objects ------------------------------------------------------------------------------------------------------

    def _object(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        if isinstance(walked.get("patternProperties"), dict):
            self._separate(walked, here)
        properties: Any = walked.get("properties")
        required: Any = walked.get("required", ())
        closes = self._may_close and isinstance(properties, dict) and not any(key in walked for key in COMBINING)
        if closes and all(name in properties for name in required):
            walked["additionalProperties"] = False
        low = walked.get("minProperties", 0)
        is_open = walked.get("additionalProperties") is not False or walked.get("patternProperties")
        if is_open and may_be(walked, "object") and low > len(required) + 1:
            refuse(
                walked,
                f"minProperties at {here} is {low}, and only {len(required)} names are required: an additional one could be "
                f"written twice, and counts once. List the names under properties and required.",
            )

    def _separate(self, walked: dict[str, Any], here: str) -> None:
        """The engine cannot write a name that matches both a property and a pattern, so such patterns are removed."""
        patterns: dict[str, Any] = walked["patternProperties"]
        held = {pattern: self._held(walked, pattern, here) for pattern in patterns}
        if REFUSED in walked:
            return
        for first, second in combinations(patterns, 2):
            if not strings_apart({"pattern": first}, {"pattern": second}):
                refuse(
                    walked,
                    f"The patterns {shown(first)} and {shown(second)} at {here} may match one name: change them so that no "
                    f"name matches both.",
                )
                return
        properties: dict[str, Any] = dict(walked.get("properties", {}))
        overlapping: set[str] = set()
        for name in dict.fromkeys((*properties, *walked.get("required", ()))):
            matching = [pattern for pattern in patterns if fits(pattern, name)]
            if matching:
                own = [properties[name]] if name in properties else []
                parts = [*own, *(patterns[pattern] for pattern in matching)]
                properties[name] = parts[0] if len(parts) == 1 else {"allOf": parts}
                overlapping.update(matching)
        if not overlapping:
            walked["patternProperties"] = {held[pattern]: each for pattern, each in patterns.items()}
            if held.keys() != set(held.values()) and walked.get("additionalProperties") is not False:
                walked["additionalProperties"] = (
                    False  # names that a pattern does not match any more would count as additional
                )
                self._note(f"At {here} only names that are listed or match patternProperties are written.")
            return
        kept = {held[pattern]: each for pattern, each in patterns.items() if pattern not in overlapping}
        walked["properties"], walked["patternProperties"] = properties, kept
        if not kept:
            del walked["patternProperties"]
        walked["additionalProperties"] = False  # others could match a pattern that is not there any more
        names = ", ".join(map(repr, sorted(overlapping)))
        self._note(
            f"At {here} a property's name matches patternProperties ({names}): of these names only the listed properties "
            f"are written, and no additional ones."
        )
