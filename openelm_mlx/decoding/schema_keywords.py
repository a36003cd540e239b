"""The keywords of JSON Schema, by what the engine does with them: holds, ignores, or cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .number_bounds import (
    BOUNDS,
)
from .schema_parts import (
    NAMED_SCHEMAS,
)

# What says nothing about an answer's form. The engine refuses some of it.
ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml"),
        "x-guidance",  # the engine's own options, which are not a schema's to set
    }
)
# What the engine does not hold, each with the values that hold anyway.
UNHELD: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "contains": (),
    **dict.fromkeys(("if", "then", "else", "propertyNames", "unevaluatedItems", "unevaluatedProperties"), (True, {})),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
    **dict.fromkeys(("minContains", "maxContains"), ()),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), ()),
    "uniqueItems": (False,),
}
COMBINING = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref", "minProperties")
KNOWN = frozenset(
    {
        *("type", "const", "enum", "allOf", "anyOf", "oneOf", "$ref", "$schema", "$id", "$anchor", *NAMED_SCHEMAS),
        *("required", "additionalProperties", "minProperties", "maxProperties", "items", "prefixItems"),
        *("additionalItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "multipleOf"),
        *(*BOUNDS, *UNHELD),
    }
)
# Keywords beside which others hold for the same value.
_APPLICATORS = frozenset({"const", "enum", "anyOf", "oneOf", "allOf", "$ref", "patternProperties"})


def combines_conditions(part: Mapping[str, Any]) -> bool:
    """Whether the engine combines several conditions for one value here."""
    kept = [key for key in part if key not in ANNOTATIONS and key not in ("$defs", "definitions", "$schema", "$id")]
    applied = _APPLICATORS.intersection(kept)
    return "allOf" in applied or (bool(applied) and len(kept) > 1 and not set(kept) <= {"const", "enum", "type"})
