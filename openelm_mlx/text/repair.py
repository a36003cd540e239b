"""Faulty JSON Schemas of other programs: the valid parts are kept, the others are left out and reported.

A server's author writes `"required": null` where nothing is required, or `"type": "any"`, and other clients do not mind.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .schema_check import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, MAX_DEPTH, SCHEMAS, SIMPLE, check_schema, is_json


def repaired(schema: Any) -> tuple[dict[str, Any], list[str]]:
    """A schema of an object without the keywords whose values are wrong, and these keywords, each with its place.

    The result passes `check_schema`. Of something that is not a schema at all, or is too large, only `{"type": "object"}`
    is left.
    """
    faults: list[str] = []
    if not isinstance(schema, Mapping):
        return {"type": "object"}, [f"it is {_shown(schema)}"]
    kept: dict[str, Any] = _repaired(schema, "", 0, faults)
    if kept.get("type") != "object":
        if "type" in kept:
            faults.append(f"type is {_shown(kept['type'])}")
        kept["type"] = "object"
    try:
        check_schema(kept, "It")
    except SettingError as error:
        return {"type": "object"}, [str(error).rstrip(".")]
    return kept, list(dict.fromkeys(faults))


def _repaired(schema: Any, path: str, depth: int, faults: list[str]) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        faults.append(f"{path} is {_shown(schema)}")
        return True  # anything
    if depth == MAX_DEPTH:
        faults.append(f"it is nested more than {MAX_DEPTH} levels deep")
        return True
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        at = f"{path}.{key}" if path else key
        is_right = True
        if key in SIMPLE:
            value = _without_doubles(value) if key == "required" else value
            kept[key] = value
            is_right = SIMPLE[key][0](value)
        elif key in MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            kept[key] = {name: _repaired(item, f"{at}.{name}", depth + 1, faults) for name, item in value.items()}
        elif (key in LISTS_OF_SCHEMAS or key == "items") and isinstance(value, (list, tuple)) and value:
            kept[key] = [_repaired(item, f"{at}[{i}]", depth + 1, faults) for i, item in enumerate(value)]
        elif key in SCHEMAS and isinstance(value, (Mapping, bool)):
            kept[key] = _repaired(value, at, depth + 1, faults)
        else:
            kept[key] = value
            is_right = key not in (MAPS_OF_SCHEMAS | LISTS_OF_SCHEMAS | SCHEMAS) and is_json(value, depth)
        if not is_right:
            faults.append(f"{at} is {_shown(value)}")
            del kept[key]
    return kept


def _without_doubles(value: Any) -> Any:
    """A list of required names, each name once."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return list(dict.fromkeys(value))
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
