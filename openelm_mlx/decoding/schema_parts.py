"""A schema's parts: which of them are schemas, which are data, and what a reference points to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

NAMED_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
DATA = ("const", "enum")
OTHER_TYPES = ["string", "boolean", "null", "array", "object"]  # than numbers
# The key for a sentence that says why a part cannot be enforced: an error if the part is needed, else it is left out.
REFUSED = "\x00refused"


def nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema that may be a schema."""
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key in DATA:
                continue
            if key in NAMED_SCHEMAS and isinstance(value, Mapping):
                for item in value.values():
                    yield from nodes(item)
            else:
                yield from nodes(value)
    elif isinstance(schema, (list, tuple)):
        for item in schema:
            yield from nodes(item)


def target_of(root: Any, reference: str) -> Any:
    """What a `$ref` within the schema points to; True (anything) where it points elsewhere or nowhere."""
    found = find(root, reference)
    return True if found is None else found


def find(root: Any, reference: str) -> Any:
    """What a `$ref` within the schema points to; None where it points elsewhere or nowhere."""
    own = root.get("$id") if isinstance(root, Mapping) else None
    if isinstance(own, str) and own and reference.startswith(own):
        reference = reference[len(own) :] or "#"
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    node = root
    for part in reference[2:].split("/"):
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, (list, tuple)) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node


def num_combined(root: Any) -> int:
    """How many parts apply to one value at most, each counted as often as references and allOf lead to it."""
    known: dict[int, int] = {}

    def count(schema: Any) -> int:
        if not isinstance(schema, Mapping):
            return 1
        if id(schema) in known:
            return known[id(schema)]
        known[id(schema)] = 1  # a circle ends where it began
        total = 1
        for key in ("allOf", "anyOf", "oneOf"):
            if isinstance(schema.get(key), (list, tuple)):
                parts = [count(part) for part in schema[key]]
                total += sum(parts) if key == "allOf" else max(parts, default=0)
        if isinstance(schema.get("$ref"), str):
            total += count(target_of(root, schema["$ref"]))
        known[id(schema)] = total
        return total

    return max(map(count, nodes(root)), default=1)


def may_be(schema: Mapping[str, Any], kind: str) -> bool:
    """Whether `type` allows this kind of value."""
    kinds = schema.get("type")
    if kinds is None:
        return True
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return kind in kinds or (kind == "number" and "integer" in kinds)


def may_be_other(schema: Mapping[str, Any]) -> bool:
    """Whether `type` allows anything but numbers."""
    return any(may_be(schema, kind) for kind in OTHER_TYPES)


def refuse(walked: dict[str, Any], sentence: str) -> None:
    """Mark a part that cannot be enforced: an error only if the part is needed (`SchemaEnds`); an alternative is left out."""
    walked.setdefault(REFUSED, sentence)


def shown(value: Any) -> str:
    """A value for a message: as short JSON."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not has_huge_number(value) else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def has_huge_number(value: Any) -> bool:
    """Whether a whole number is in it that Python refuses to print."""
    if isinstance(value, Mapping):
        return any(map(has_huge_number, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_huge_number, value))
    return isinstance(value, int) and value.bit_length() > 4000


def identity(value: Any) -> str:
    """A text that is the same for values that JSON Schema considers equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{key!r}:{identity(item)}' for key, item in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(identity, value))}]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)  # any int is printed in base 16
    return repr(value)


def kind_of(value: Any) -> str:
    """The name of a value's type; "number" for whole ones too."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "object" if isinstance(value, Mapping) else "array"
