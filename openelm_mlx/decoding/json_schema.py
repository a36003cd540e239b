"""A user's JSON Schema as the engine can follow it.

The engine (llguidance) does less than the standard, and some of what it cannot do ends the process or an answer that has
begun. So a schema is rewritten first, always to one that allows the same or less: objects are closed, dates exist, counts
and bounds are numbers that the engine can write, parts without an end are left out. What cannot be rewritten is refused
with its place. Reading and checking its form is text/schema.py's business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, final

from ..errors import SettingError
from .alternatives import Alternatives, target_of

# No answer has so many characters or items: more are never reached, or cannot be asked for.
_MOST_COUNT = 65_536
# The engine computes with 64-bit integers, read from floats: the last ones that are both.
_LARGEST = 2**63 - 1024
# Of numbers with fractions it writes ranges up to here.
_LARGEST_NUMBER = 10**15
_MOST_MULTIPLE = 2**32 - 1

NAMED_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_DATA = ("const", "enum")
# What says nothing about an answer's form. The engine refuses some of it.
_ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml"),
        "x-guidance",  # the engine's own options, which are not a schema's to set
    }
)
# Where schemas are that hold where they stand.
_APPLIED = frozenset(
    {
        *("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "additionalItems"),
        *("allOf", "anyOf", "oneOf"),
    }
)
_COMBINING = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref", "minProperties")

# RFC 3339, with days that exist (the engine's own have a 30 February) in years that Python's dates know, 1 to 9999.
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_HEX = "[0-9a-f]"
_FORMATS = {
    "date": _DATE,
    "date-time": rf"{_DATE}T{_CLOCK}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})",
    # Pydantic's names for UUIDs of one version.
    **{
        f"uuid{n}": f"{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}"
        for n in (1, 3, 4, 5, 6, 7, 8)
    },
}


class Prepared(NamedTuple):
    """A schema for the engine, and what of the user's it does not hold, in sentences."""

    schema: Any
    notes: tuple[str, ...]


def prepared(schema: Any) -> Prepared:
    """The schema that the engine is given. Raises SettingError for what cannot be followed, with the place."""
    return _Preparation(schema).result()


@lru_cache(maxsize=512)
def engine_refusal(definition: str) -> str | None:
    """Why the engine refuses a JSON Schema, given as text; None if it does not."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(definition))
    return " ".join(messages[0].split()) if failed else None


@final
class _Preparation:
    def __init__(self, schema: Any) -> None:
        self._root = schema
        # Where parts are combined, closing one would forbid what another asks for.
        text = json.dumps(schema, default=str)
        self._may_close = not any(f'"{word}"' in text for word in ("allOf", "unevaluatedProperties"))
        self._notes: dict[str, None] = {}
        self._alternatives = Alternatives(schema)

    def result(self) -> Prepared:
        schema = self._walk(self._root, "")
        schema = _Ends(schema).pruned()
        if schema is False and self._root is not False:
            raise SettingError(
                "The schema is unsatisfiable: nothing fits it, or a required part of it needs itself without an end. Make a "
                "member of the circle optional, or give it another type to choose."
            )
        _check_multiples(schema)
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
            if key not in _ANNOTATIONS
        }
        here = path or "the top level"
        for step in (self._values, self._counts, self._string, self._numbers, self._choices, self._object):
            step(walked, schema, here)
        return walked

    def _walk_value(self, key: str, value: Any, path: str) -> Any:
        if key in _DATA:
            return value
        if key in NAMED_SCHEMAS and isinstance(value, Mapping):  # names, which may look like keywords
            return {name: self._walk(item, f"{path}.{name}") for name, item in value.items()}
        return self._walk(value, path)

    def _note(self, sentence: str) -> None:
        self._notes[sentence] = None

    def _values(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        if "const" in walked and not _is_writable(walked["const"]):
            raise SettingError(
                f"The const at {here} has a number that cannot be followed ({_shown(walked['const'])}): whole numbers are "
                f"written up to 2^53, and others with few digits. Use a string."
            )
        if isinstance(walked.get("enum"), (list, tuple)):
            values = [value for value in walked["enum"] if _is_writable(value)]
            if len(values) < len(walked["enum"]):
                odd = next(value for value in walked["enum"] if not _is_writable(value))
                if not values:
                    raise SettingError(
                        f"The enum at {here} has only numbers that cannot be followed ({_shown(odd)}): whole numbers are "
                        f"written up to 2^53, and others with few digits. Use strings."
                    )
                self._note(f"The value {_shown(odd)} of the enum at {here} is left out: it is too large to be written.")
            walked["enum"] = values

    def _counts(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        for kind in ("Length", "Items", "Properties"):
            low, high = walked.get(f"min{kind}"), walked.get(f"max{kind}")
            if low is not None and low > _MOST_COUNT:
                raise SettingError(
                    f"min{kind} at {here} is {_shown(low)}, and no answer is so long: at most {_MOST_COUNT:,} are followed."
                )
            if low is not None:
                walked[f"min{kind}"] = int(low)
            if high is not None and high > _MOST_COUNT:
                del walked[f"max{kind}"]  # never reached
            elif high is not None:
                walked[f"max{kind}"] = int(high)
        if walked.get("uniqueItems") is False:
            del walked["uniqueItems"]  # the default, which the engine does not know
        if walked.get("uniqueItems") is True and walked.get("maxItems", 2) <= 1:
            del walked["uniqueItems"]

    def _string(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        name = walked.get("format")
        if isinstance(name, str):
            if not _may_be(walked, "string"):
                del walked["format"]  # int32, double, ...: of numbers it says nothing more
            elif name in _FORMATS:
                del walked["format"]
                self._add_pattern(walked, f"^{_FORMATS[name]}$")
            elif engine_refusal(json.dumps({"type": "string", "format": name})) is not None:
                del walked["format"]
                self._note(f"The format {name!r} at {here} is not held: any string is taken there.")

    def _add_pattern(self, walked: dict[str, Any], pattern: str) -> None:
        if "pattern" in walked:
            # The engine holds a string to all of them.
            walked["allOf"] = [*walked.get("allOf", ()), {"type": "string", "pattern": pattern}]
            if walked.get("type") != "string":
                walked["allOf"][-1] = {"anyOf": [walked["allOf"][-1], {"type": _OTHER_TYPES}]}
        else:
            walked["pattern"] = pattern

    def _numbers(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        multiple = walked.get("multipleOf")
        if multiple is not None and _engine_multiple(multiple) is None:
            raise SettingError(
                f"multipleOf at {here} is {_shown(multiple)}, which cannot be followed: give a whole number up to "
                f"{_MOST_MULTIPLE:,}, or one with few decimals such as 0.01 or 0.5."
            )
        low, high = _bounds(walked)
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            walked.pop(key, None)
        if low is None and high is None:
            return
        kinds = walked.get("type")
        is_whole = kinds == "integer" or (
            isinstance(kinds, (list, tuple)) and "integer" in kinds and "number" not in kinds
        )
        new = _whole_bounds(low, high) if is_whole else _fraction_bounds(low, high)
        if new is None:
            shown = " and ".join(f"{k} {_shown(schema[k])}" for k in _BOUND_NAMES if k in schema)
            if _may_be(walked, "number") and not _may_be_other(walked):
                raise SettingError(
                    f"The bounds at {here} ({shown}) make it unsatisfiable: they leave no number that can be written (whole "
                    f"numbers reach from -2^63 to 2^63, others up to 1e15). Change the bounds, or use a string."
                )
            walked["type"] = [k for k in (kinds if isinstance(kinds, list) else _OTHER_TYPES) if k in _OTHER_TYPES]
            return
        walked.update(new)

    def _choices(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        self._check_pattern(walked, here)
        if isinstance(walked.get("anyOf"), list):
            walked["anyOf"] = self._followed(walked["anyOf"], here)
        if isinstance(walked.get("oneOf"), list) and isinstance(schema.get("oneOf"), (list, tuple)):
            branches, one = self._alternatives.apart(list(schema["oneOf"]), walked["oneOf"])
            if branches is None:
                first, second = one
                raise SettingError(
                    f"The oneOf at {here} cannot be followed: its alternatives {first} and {second} may both fit one value, "
                    f"which oneOf forbids. Use anyOf, or give each alternative a required member with a const of its own."
                )
            del walked["oneOf"]
            if "anyOf" in walked:
                walked["allOf"] = [*walked.get("allOf", ()), {"anyOf": branches}]
            else:
                walked["anyOf"] = branches

    def _check_pattern(self, walked: dict[str, Any], here: str) -> None:
        pattern = walked.get("pattern")
        if isinstance(pattern, str) and (reason := engine_refusal(json.dumps({"type": "string", "pattern": pattern}))):
            # `_followed` looks for this mark where there is another choice.
            walked[_REFUSED] = f"The pattern {_shown(pattern)} at {here} cannot be followed: {reason[:200]}."

    def _followed(self, branches: list[Any], here: str) -> list[Any]:
        """The alternatives that can be followed, where some can."""
        kept = [each for each in branches if not (isinstance(each, dict) and _REFUSED in each)]
        if not kept:
            return branches
        for each in branches:
            if isinstance(each, dict) and _REFUSED in each:
                self._note(f"{each[_REFUSED]} This alternative is left out.")
        return kept

    # --- Objects ------------------------------------------------------------------------------------------------------

    def _object(self, walked: dict[str, Any], schema: Mapping[str, Any], here: str) -> None:
        if isinstance(walked.get("patternProperties"), dict):
            self._separate(walked, here)
        properties: Any = walked.get("properties")
        required: Any = walked.get("required", ())
        closes = self._may_close and isinstance(properties, dict) and not any(key in walked for key in _COMBINING)
        if closes and all(name in properties for name in required):
            walked["additionalProperties"] = False

    def _separate(self, walked: dict[str, Any], here: str) -> None:
        """A name that both a property and a pattern mean is a dead end to the engine: patterns give way to properties."""
        patterns: dict[str, Any] = walked["patternProperties"]
        for pattern in patterns:
            if reason := engine_refusal(json.dumps({"type": "string", "pattern": pattern})):
                raise SettingError(f"The pattern {_shown(pattern)} at {here} cannot be followed: {reason[:200]}.")
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
            return
        kept = {pattern: each for pattern, each in patterns.items() if pattern not in overlapping}
        walked["properties"], walked["patternProperties"] = properties, kept
        if not kept:
            del walked["patternProperties"]
        walked["additionalProperties"] = False  # others could match a pattern that is not there any more
        names = ", ".join(map(repr, sorted(overlapping)))
        self._note(
            f"At {here} a property's name matches patternProperties ({names}): of these names only the listed properties "
            f"are written, and no additional ones."
        )


_REFUSED = "\x00refused"
_BOUND_NAMES = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_OTHER_TYPES = ["string", "boolean", "null", "array", "object"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not _is_huge(value) else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 4000  # Python refuses to print those


def _may_be(schema: Mapping[str, Any], kind: str) -> bool:
    kinds = schema.get("type")
    if kinds is None:
        return True
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return kind in kinds or (kind == "number" and "integer" in kinds)


def _may_be_other(schema: Mapping[str, Any]) -> bool:
    return any(_may_be(schema, kind) for kind in _OTHER_TYPES)


def fits(pattern: str, text: str) -> bool:
    """Whether JSON Schema's `pattern` matches `text`; one that the engine cannot read matches nothing."""
    return matches(pattern, text) is True


@lru_cache(maxsize=4096)
def matches(pattern: str, text: str) -> bool | None:
    """Whether JSON Schema's `pattern` is found in `text`, in linear time and in the engine's own reading of it.

    None where the engine cannot say: it does not read the pattern, or gives up on its size.
    """
    from llguidance import LLMatcher

    definition = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    matcher = LLMatcher(_bytes_tokenizer(), definition, log_level=0)
    if matcher.is_error():
        return None
    data = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    is_match = matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()
    return None if matcher.is_error() else is_match


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> Any:
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
        special_token_ids = (256,)

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _exact(value: int | float) -> Fraction:
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))


def _is_writable(value: Any) -> bool:
    """Whether the engine writes this value as it is. Whole numbers go through floats there."""
    if isinstance(value, Mapping):
        return all(map(_is_writable, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_writable, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    if isinstance(value, int) or value == int(value):
        return abs(value) <= 2**53
    return 1e-15 < abs(value) < _LARGEST_NUMBER


class _Bound(NamedTuple):
    value: Fraction
    is_open: bool


def _bounds(schema: Mapping[str, Any]) -> tuple[_Bound | None, _Bound | None]:
    """The narrowest lower and upper bound. Draft 4 has booleans that open the other bound."""
    found: list[_Bound | None] = []
    for name, narrowest in (("Minimum", max), ("Maximum", min)):
        closed, opened = schema.get(name.lower()), schema.get(f"exclusive{name}")
        each: list[_Bound] = []
        if closed is not None:
            each.append(_Bound(_exact(closed), opened is True))
        if opened is not None and not isinstance(opened, bool):
            each.append(_Bound(_exact(opened), True))
        if not each:
            found.append(None)
            continue
        value = narrowest(bound.value for bound in each)
        found.append(_Bound(value, any(bound.is_open for bound in each if bound.value == value)))
    return found[0], found[1]


def _whole_bounds(low: _Bound | None, high: _Bound | None) -> dict[str, int] | None:
    """Bounds of whole numbers that the engine can write, as near as it can; None if no number is left."""
    first = last = None
    if low is not None:
        first = math.floor(low.value) + 1 if low.is_open else math.ceil(low.value)
        first = _next_float(max(first, -_LARGEST), math.inf)
    if high is not None:
        last = math.ceil(high.value) - 1 if high.is_open else math.floor(high.value)
        last = _next_float(min(last, _LARGEST), -math.inf)
    # Ranges without another end are written by the number of digits, of which 64 bits have 18.
    if first is not None and last is None and first >= 10**18:
        last = _LARGEST
    if last is not None and first is None and last <= -(10**18):
        first = -_LARGEST
    if first is not None and last is not None and first > last:
        return None
    if (first is not None and first > _LARGEST) or (last is not None and last < -_LARGEST):
        return None
    return {name: value for name, value in (("minimum", first), ("maximum", last)) if value is not None}


def _next_float(value: int, towards: float) -> int:
    """`value`, or the nearest whole number in this direction that a float holds exactly."""
    as_float = float(value)
    if int(as_float) != value and (int(as_float) < value) == (towards > 0):
        as_float = math.nextafter(as_float, towards)
    return int(as_float)


def _fraction_bounds(low: _Bound | None, high: _Bound | None) -> dict[str, float | int] | None:
    limit = Fraction(_LARGEST_NUMBER)
    if low is not None and low.value < -limit:
        low = _Bound(-limit, False)
    if high is not None and high.value > limit:
        high = _Bound(limit, False)
    if (low is not None and low.value > limit) or (high is not None and high.value < -limit):
        return None
    if (
        low is not None
        and high is not None
        and (low.value > high.value or (low.value == high.value and (low.is_open or high.is_open)))
    ):
        return None
    bounds: dict[str, float | int] = {}
    for name, bound in (("Minimum", low), ("Maximum", high)):
        if bound is not None:
            whole = bound.value.denominator == 1
            value = int(bound.value) if whole else float(bound.value)
            bounds[f"exclusive{name}" if bound.is_open else name.lower()] = value
    return bounds


def _engine_multiple(value: int | float) -> tuple[int, int] | None:
    """multipleOf as the engine reads it, (coefficient, decimals); None if it would get it wrong."""
    if _is_huge(value) or not value or value > _MOST_MULTIPLE:
        return None
    number, decimals = float(value), 0
    while number != int(number) and decimals < 16:
        number *= 10.0
        decimals += 1
    if number != int(number) or number > _MOST_MULTIPLE or Fraction(int(number), 10**decimals) != _exact(value):
        return None
    return int(number), decimals


def _check_multiples(schema: Any) -> None:
    """Where parts are combined the engine multiplies in 32 bits."""
    found = {_engine_multiple(node["multipleOf"]) for node in _nodes(schema) if "multipleOf" in node}
    pairs = sorted(each for each in found if each is not None)
    if len(pairs) < 2 or not any("allOf" in node or "$ref" in node for node in _nodes(schema)):
        return
    decimals = max(each[1] for each in pairs)
    product = math.prod(coefficient * 10 ** (decimals - own) for coefficient, own in pairs)
    if product > _MOST_MULTIPLE:
        raise SettingError(
            "The schema combines several multipleOf whose common multiple is too large to be followed: use one of them."
        )


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema that may be a schema."""
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key in _DATA:
                continue
            if key in NAMED_SCHEMAS and isinstance(value, Mapping):
                for item in value.values():
                    yield from _nodes(item)
            else:
                yield from _nodes(value)
    elif isinstance(schema, (list, tuple)):
        for item in schema:
            yield from _nodes(item)


# --- Ends -------------------------------------------------------------------------------------------------------------


@final
class _Ends:
    """Which parts of a schema have values that end; the others are left out where that is allowed.

    A definition that needs itself has none. What has an end is found as a least fixed point: nothing has, until shown.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._finite: set[int] = set()
        self._nodes = list(_nodes(schema))
        for _ in range(len(self._nodes) + 1):
            before = len(self._finite)
            self._finite.update(id(n) for n in reversed(self._nodes) if id(n) not in self._finite and self._ends(n))
            if len(self._finite) == before:
                break

    def pruned(self) -> Any:
        """The schema without the parts that have no end; False if it has none itself. Raises for a pattern refused."""
        if not self._has_end(self._root):
            return False
        for node in self._nodes:
            assert isinstance(node, dict)
            if id(node) in self._finite:
                self._prune(node)
        for node in self._reached(self._root, set()):
            if _REFUSED in node:
                raise SettingError(node[_REFUSED])
        for node in self._nodes:
            node.pop(_REFUSED, None)  # type: ignore[attr-defined]  # they are dicts, made by the walk
        return self._root

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
