"""The keywords of JSON Schema, by what the engine does with them: enforces, ignores, or cannot enforce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .number_bounds import (
    BOUNDS,
)
from .schema_parts import (
    NAMED_SCHEMAS,
)

# Annotations, which do not restrict an answer. The engine refuses some of them.
ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml"),
        "x-guidance",  # the engine's own options, which are not a schema's to set
    }
)
# Keywords that the engine cannot enforce, each with the values that have no effect.
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
# Keywords that apply together with others to the same value.
_APPLICATORS = frozenset({"const", "enum", "anyOf", "oneOf", "allOf", "$ref", "patternProperties"})


def combines_conditions(part: Mapping[str, Any]) -> bool:
    """Whether the engine combines several conditions for one value here."""
    kept = [key for key in part if key not in ANNOTATIONS and key not in ("$defs", "definitions", "$schema", "$id")]
    applied = _APPLICATORS.intersection(kept)
    return "allOf" in applied or (bool(applied) and len(kept) > 1 and not set(kept) <= {"const", "enum", "type"})
