"""Numbers of a user's JSON Schema that the engine can write: constants, bounds and multiples.

Bounds become a pattern's bounds, or a list of the few numbers that there are; what no number fits that can be written
exactly is refused with its place. The arithmetic is in number_bounds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from .number_bounds import (
    BOUNDS,
    LARGEST_MULTIPLE,
    bounds_of,
    engine_multiple,
    exact,
    far_values,
    few_multiples,
    fraction_bounds,
    is_writable,
    whole_bounds,
    writable,
)
from .schema_parts import NAMED_SCHEMAS, OTHER_TYPES, REFUSED, kind_of, may_be, may_be_other, refuse, shown

_WHICH = (
    "whole numbers are possible up to 9,223,372,036,854,774,784 (either sign) if a 64-bit float represents them exactly, as it "
    "does all up to 2^53, and fractions with 15 digits."
)


@final
class SchemaNumbers:
    """Both steps change `walked`, a part of the schema at `here`.

    is_combined: whether parts of the schema are combined, where numbers beyond 64 bits must not meet `integer` in the
    engine. note: told what of a part is not written.
    """

    def __init__(self, is_combined: bool, note: Callable[[str], None]) -> None:
        self._is_combined, self._note = is_combined, note

    def constants(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        if "const" not in walked and not isinstance(walked.get("enum"), (list, tuple)):
            return
        may_be_far = self._without_type(walked)
        if "const" in walked:
            if not is_writable(walked["const"], may_be_far):
                sentence = (
                    f"The const at {here} has a number that cannot be enforced ({shown(walked['const'])}): {_WHICH}"
                )
                refuse(walked, f"{sentence} Use a string.")
                walked["const"] = None
            walked["const"] = writable(walked["const"], may_be_far)
        if isinstance(walked.get("enum"), (list, tuple)):
            values = [writable(value, may_be_far) for value in walked["enum"] if is_writable(value, may_be_far)]
            if len(values) < len(walked["enum"]):
                odd = next(value for value in walked["enum"] if not is_writable(value, may_be_far))
                if values:
                    self._note(
                        f"The value {shown(odd)} of the enum at {here} is left out: it cannot be written exactly."
                    )
                else:
                    sentence = f"The enum at {here} has only numbers that cannot be enforced ({shown(odd)}): {_WHICH}"
                    refuse(walked, f"{sentence} Use strings.")
            walked["enum"] = values

    def _without_type(self, walked: dict[str, Any]) -> bool:
        """Drop a `type` that all values have anyway, so that the engine has nothing to combine; return whether it did."""
        if (
            self._is_combined
            or not set(walked) <= {"const", "enum", "type"}
            or ("const" in walked and "enum" in walked)
        ):
            return False
        values = [walked["const"]] if "const" in walked else walked["enum"]
        if not all(_has_type(walked, value) for value in values):
            return False
        walked.pop("type", None)
        return True

    def bounds(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        multiple = schema.get("multipleOf")
        if multiple is not None and engine_multiple(multiple) is None:
            refuse(
                walked,
                f"multipleOf at {here} is {shown(multiple)}, which cannot be enforced: give a whole number up to "
                f"{LARGEST_MULTIPLE:,}, or one with few decimals such as 0.01 or 0.5.",
            )
            walked.pop("multipleOf", None)
            multiple = None
        low, high = bounds_of(walked)
        for key in BOUNDS:
            walked.pop(key, None)
        if (low is None and high is None) or not may_be(walked, "number"):
            return
        kinds = walked.get("type")
        kinds = [kinds] if isinstance(kinds, str) else [*OTHER_TYPES, "number"] if kinds is None else list(kinds)
        is_whole = "number" not in kinds
        new: dict[str, Any] | None = whole_bounds(low, high) if is_whole else fraction_bounds(low, high)
        if multiple is not None and new is not None:
            values = few_multiples(low, high, exact(multiple), is_whole)
            if values is not None:
                values = [value for value in values if is_writable(value, False)]
                if not values:
                    new = None
                elif not may_be_other(walked) and "enum" not in walked and "const" not in walked:
                    del walked["multipleOf"]  # the engine computes multiples with floats
                    new = {"enum": [writable(value, False) for value in values]}
        if new is None and multiple is None and not self._is_combined and (values := far_values(low, high)):
            self._note(f"Of the numbers beyond 64 bits at {here} only powers of ten are written.")
            new = {"enum": values}
        if new is None:
            others = [kind for kind in kinds if kind in OTHER_TYPES]
            words = " and ".join(f"{key} {shown(schema[key])}" for key in (*BOUNDS, "multipleOf") if key in schema)
            if not others:
                refuse(
                    walked,
                    f"The bounds at {here} ({words}) make it unsatisfiable: they leave no number that can be written "
                    f"exactly: {_WHICH} Change the bounds, or use a string.",
                )
            else:
                walked["type"] = others
            return
        if "enum" in new and not self._is_combined:
            others = [kind for kind in kinds if kind in OTHER_TYPES]
            numbers = {"enum": new["enum"]}
            beside = {key: walked.pop(key) for key in list(walked) if not key.startswith("$")}
            beside.pop("multipleOf", None)
            if others:
                walked["anyOf"] = [numbers, {**beside, "type": others}]
            else:
                walked.update(numbers)
                walked.update({key: value for key, value in beside.items() if key in NAMED_SCHEMAS or key == REFUSED})
            return
        walked.update(new)


def _has_type(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is of the schema's `type`."""
    if isinstance(value, float) and value != int(value):
        kinds = schema.get("type", "number")
        return "number" in ([kinds] if isinstance(kinds, str) else kinds)
    return may_be(schema, kind_of(value))
