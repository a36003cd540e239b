"""Tool definitions: JSON Schema in, the TypeScript-like text that gpt-oss reads out.

The text is the one openai-harmony 0.0.8 writes, to the byte: gpt-oss was trained to read it, so its odd corners (an
array of an enum without brackets, `anyOf` and `$ref` as `any`) are kept; docs/harmony.md lists them. `check_schema`
refuses what is not valid JSON Schema. Where the text stands in a prompt is harmony.py's business.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import SettingError


@dataclass(frozen=True)
class Tool:
    """A function the model may call; `parameters` is a JSON Schema of its arguments, or None when it takes none.

    Raises SettingError when the name cannot be written as one word, or `parameters` is not valid JSON Schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, "tool")
        if not isinstance(self.description, str):
            raise SettingError(f"The description of tool {self.name!r} is {self.description!r}; give a string.")
        if self.parameters is not None:
            if not isinstance(self.parameters, Mapping):
                kind = type(self.parameters).__name__
                raise SettingError(
                    f"The parameters of tool {self.name!r} are a {kind}; give a JSON Schema as a dict, or None."
                )
            check_schema(self.parameters, f"The parameters of tool {self.name!r}")

    @classmethod
    def from_dict(cls, definition: Mapping[str, Any]) -> Tool:
        """Read OpenAI's `{"type": "function", "function": {"name": ..., ...}}`, or the same without the inner dict."""
        if not isinstance(definition, Mapping):
            raise SettingError(f"A tool is {reprlib.repr(definition)}; give a dict with name, description, parameters.")
        kind = definition.get("type", "function")
        if kind != "function":
            raise SettingError(f"A tool has type {kind!r}; only 'function' tools are defined with a schema.")
        function = definition.get("function", definition)
        if not isinstance(function, Mapping) or "name" not in function:
            raise SettingError(f"The tool {reprlib.repr(definition)} has no name; add one under 'function'.")
        return cls(function["name"], function.get("description") or "", function.get("parameters"))


@dataclass(frozen=True)
class ToolNamespace:
    """Tools that are called as `name.tool`; without tools, `name` itself is the tool and takes plain text (python)."""

    name: str
    description: str | None = None
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, "tool namespace")
        check_unique((tool.name for tool in self.tools), f"tools of {self.name!r}")


def tools_section(namespaces: Iterable[ToolNamespace]) -> str:
    """The section `# Tools` of a system or developer message; namespaces by name, tools in the given order."""
    by_name = sorted(namespaces, key=lambda namespace: namespace.name)
    check_unique((namespace.name for namespace in by_name), "tool namespaces")
    return "\n\n".join(["# Tools", *map(_namespace_text, by_name)])


def check_unique(names: Iterable[str], what: str) -> None:
    """Raise SettingError when two of `names` are equal; `what` names the collection in the sentence."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SettingError(f"Two {what} are called {name!r}; rename one of them.")
        seen.add(name)


def _check_name(name: object, what: str) -> None:
    # A name becomes a word of a message header (`to=functions.NAME`), where a space would end it.
    if not isinstance(name, str) or not name or any(c.isspace() for c in name):
        raise SettingError(f"A {what} is called {name!r}; use a word of letters, digits, '_', '-' and '.'.")


# --- Layout -----------------------------------------------------------------------------------------------------------


def _namespace_text(namespace: ToolNamespace) -> str:
    lines = [f"## {namespace.name}\n"]
    description = namespace.description or ""
    if not namespace.tools:
        return "\n".join(lines + _lines(description))
    lines += [*comment_lines(description), f"namespace {namespace.name} {{\n"]
    for tool in namespace.tools:
        lines += comment_lines(tool.description)
        arguments = "" if tool.parameters is None else f"_: {type_text(tool.parameters)}"
        lines.append(f"type {tool.name} = ({arguments}) => any;\n")
    lines.append(f"}} // namespace {namespace.name}")
    return "\n".join(lines)


def comment_lines(text: str) -> list[str]:
    """The lines of `text` as comments; none for an empty text."""
    return [f"// {line}" for line in _lines(text)]


def _lines(text: str) -> list[str]:
    """Lines end at LF or CR LF only, and a last empty one does not count: `str.splitlines` would cut at U+2028 too."""
    lines = text.split("\n")
    last = lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    return [*lines, last] if last else lines


# --- JSON Schema to a type --------------------------------------------------------------------------------------------


def type_text(schema: object, indent: str = "") -> str:
    """The type of one schema, for example `{"type": "array", "items": {"type": "integer"}}` -> `number[]`.

    What the notation has no word for (`anyOf`, `$ref`, `const`, a schema without a type) is `any`.
    """
    if not isinstance(schema, Mapping):
        return "any"  # true and false are schemas, too
    if "oneOf" in schema:
        return "".join(f"\n{indent} | {_variant_text(variant, indent)}" for variant in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, Sequence) and not isinstance(kind, str):
        return " | ".join("number" if name == "integer" else name for name in kind)
    if kind == "object":
        return _object_text(schema, indent)
    if kind == "array":
        return f"{type_text(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        values = [f'"{value}"' for value in schema.get("enum", ()) if isinstance(value, str)]
        return " | ".join(values) or "string"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _object_text(schema: Mapping[str, Any], indent: str) -> str:
    lines = [f"{indent}// {schema['description']}"] if "description" in schema else []
    lines.append("{")
    required = schema.get("required", ())
    for name, value in schema.get("properties", {}).items():
        lines += _property_lines(name if name in required else f"{name}?", value, indent)
    lines.append(indent + "}")
    return "\n".join(lines)


def _property_lines(name: str, schema: object, indent: str) -> list[str]:
    if not isinstance(schema, Mapping):
        return [f"{indent}{name}: any,"]
    lines = []
    if "title" in schema:
        lines += [f"{indent}// {schema['title']}", f"{indent}//"]
    if "oneOf" not in schema and "description" in schema:
        lines.append(f"{indent}// {schema['description']}")
    if schema.get("examples"):
        lines.append(f"{indent}// Examples:")
        lines += [f'{indent}// - "{example}"' for example in schema["examples"] if isinstance(example, str)]
    if "oneOf" in schema:
        return lines + _choice_lines(name, schema, indent)
    comment = f" // default: {_default_text(schema)}" if "default" in schema else ""
    return [*lines, f"{indent}{name}: {_nullable(schema, indent + '    ')},{comment}"]


def _choice_lines(name: str, schema: Mapping[str, Any], indent: str) -> list[str]:
    """A property with `oneOf`: one line for each variant, the description above and not repeated in the first."""
    variants = schema["oneOf"]
    description = schema.get("description")
    first = variants[0].get("description") if isinstance(variants[0], Mapping) else None
    described_above = description is not None and description != first
    lines = [f"{indent}// {description}"] if described_above else []
    if "default" in schema:
        lines.append(f"{indent}// default: {_default_text(schema)}")
    lines.append(f"{indent}{name}:")
    for i, variant in enumerate(variants):
        comments = []
        if isinstance(variant, Mapping):
            own = variant.get("description")
            if own is not None and own != description and not (i == 0 and described_above):
                comments.append(own)
            if "default" in variant:
                comments.append(f"default: {_default_text(variant)}")
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}{_trailing(comments)}")
    return [*lines, f"{indent},"]


def _variant_text(variant: object, indent: str) -> str:
    """One variant of a `oneOf` that is not a property's own: inside an array, or as the parameters themselves."""
    comments = []
    if isinstance(variant, Mapping):
        if "description" in variant:
            comments.append(variant["description"])
        if "default" in variant:
            default = variant["default"]
            quoted = isinstance(default, str) and not variant.get("enum")
            comments.append(f'default: "{default}"' if quoted else f"default: {json_text(default)}")
    return _nullable(variant, indent + "   ") + _trailing(comments)


def _nullable(schema: object, indent: str) -> str:
    text = type_text(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _default_text(schema: Mapping[str, Any]) -> str:
    default = schema["default"]
    if not isinstance(default, str):
        return json_text(default)
    return default if schema.get("enum") else f'"{default}"'


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def json_text(value: object) -> str:
    """Compact JSON: no spaces, no escapes beyond the necessary, numbers as short as they go (`1e20`, not `1e+20`)."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json_text(str(key))}:{json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(json_text, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        value = float(value)  # JSON readers with machine integers, openai-harmony's among them, do the same
    if isinstance(value, float):
        return _float_text(value)
    return json.dumps(value, ensure_ascii=False)


def _float_text(value: float) -> str:
    mantissa, _, exponent = repr(value).partition("e")
    if exponent == "-05":  # Python goes over to exponents one power of ten earlier
        digits = mantissa.replace(".", "")
        return f"-0.0000{digits[1:]}" if digits[0] == "-" else f"0.0000{digits}"
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


# --- Is it JSON Schema? -----------------------------------------------------------------------------------------------

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
MAX_DEPTH = 64  # also what ends a dict that contains itself
# Each counted as often as it is referred to: dictionaries may share parts, and double at every level.
_MOST_PARTS = 100_000


def check_schema(schema: object, what: str) -> None:
    """Raise SettingError unless `schema` is a JSON Schema (drafts 6 to 2020-12, and OpenAPI's `nullable`).

    `what` opens the sentence, for example "The parameters of tool 'f'". Checked is the form: each keyword's value is of
    the kind that the standard gives it. `$ref` is not followed; unknown keywords are allowed, as the standard says.
    """
    try:
        _check_size(schema)
        _check(schema, "", 0)
    except _Invalid as error:
        raise SettingError(f"{what} cannot be read as JSON Schema: {error}.") from None


class _Invalid(Exception):
    pass


def _check_size(schema: object) -> None:
    waiting, count = [(schema, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        count += len(parts)
        if count > _MOST_PARTS:
            raise _Invalid(f"it has more than {_MOST_PARTS:,} parts")
        if depth <= 2 * MAX_DEPTH:  # deeper ones are refused below; names lie between two levels
            waiting += [(part, depth + 1) for part in parts]


# One branch for each kind of keyword: parted, nobody would see that none is missing.
def _check(schema: object, path: str, depth: int) -> None:  # noqa: C901
    here = path or "the top level"
    if depth > MAX_DEPTH:
        raise _Invalid(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _Invalid(f"{here} is {_shown(schema)}, where an object (a dict) belongs")
    for key, value in schema.items():
        if not isinstance(key, str):
            raise _Invalid(f"the key {key!r} at {here} is not a string")
        at = f"{path}.{key}" if path else key
        if key in SIMPLE:
            is_valid, expected = SIMPLE[key]
            if not is_valid(value):
                raise _Invalid(f"{at} is {_shown(value)}, where {expected} belongs")
        elif key in MAPS_OF_SCHEMAS:
            if not isinstance(value, Mapping):
                raise _Invalid(f"{at} is {_shown(value)}, where an object of schemas belongs")
            for name, item in value.items():
                if not isinstance(name, str):
                    raise _Invalid(f"the key {name!r} at {at} is not a string")
                _check(item, f"{at}.{name}", depth + 1)
        elif key in LISTS_OF_SCHEMAS or (key == "items" and isinstance(value, list)):
            if not isinstance(value, (list, tuple)) or not value:
                raise _Invalid(f"{at} is {_shown(value)}, where a list of schemas belongs")
            for i, item in enumerate(value):
                _check(item, f"{at}[{i}]", depth + 1)
        elif key in SCHEMAS:
            _check(value, at, depth + 1)
        elif not is_json(value, depth):
            raise _Invalid(f"{at} is {_shown(value)}, which JSON cannot say")


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits, which Python refuses to print
        return "something with a huge number"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)  # it may be too large for a float
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_number(value) and value == int(value) and value >= 0  # type: ignore[call-overload,operator]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and is_json(value)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_type(value: object) -> bool:
    return value in _TYPES if isinstance(value, str) else _is_names(value) and bool(value) and set(value) <= set(_TYPES)  # type: ignore[call-overload]


def _is_names_by_key(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_names(names) for names in value.values())


def is_json(value: object, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_json(item, depth + 1) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_json(item, depth + 1) for item in value)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


SIMPLE: dict[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, f"one or several of {', '.join(_TYPES)}"),
    "required": (_is_names, "a list of different property names"),
    "enum": (_is_list, "a list of values"),
    "examples": (_is_list, "a list of values"),
    "dependentRequired": (_is_names_by_key, "an object of lists of property names"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above zero"),  # type: ignore[operator]
    **dict.fromkeys(("minimum", "maximum"), (_is_number, "a number")),
    # Draft 4, and so OpenAPI 3.0, have true and false here.
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"), (lambda value: _is_bool(value) or _is_number(value), "a number")
    ),
    **dict.fromkeys(
        (
            *("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"),
            *("minProperties", "maxProperties"),
        ),
        (_is_count, "a count (0, 1, 2, ...)"),
    ),
    **dict.fromkeys(("uniqueItems", "deprecated", "readOnly", "writeOnly", "nullable"), (_is_bool, "true or false")),
    **dict.fromkeys(
        (
            *("title", "description", "format", "pattern", "contentEncoding", "contentMediaType"),
            *("$id", "$schema", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$comment"),
        ),
        (_is_text, "a string"),
    ),
}
MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SCHEMAS = frozenset(
    {
        *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"),
        *("contentSchema", "unevaluatedItems", "unevaluatedProperties"),
    }
)


# --- The tools that gpt-oss was trained with --------------------------------------------------------------------------

# The wording below is trained, so it is data: it comes from openai-harmony (https://github.com/openai/harmony,
# src/chat.rs, Apache License 2.0), as do the defaults. tests/test_text_schema.py holds its SHA-256.

BROWSER = ToolNamespace(
    "browser",
    "Tool for browsing.\n"
    "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
    "Cite information from the tool using the following format:\n"
    "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
    "Do not quote more than 10 words directly from the tool output.\n"
    "sources=web (default: web)",
    (
        Tool(
            "search",
            "Searches for information related to `query` and displays `topn` results.",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        ),
        Tool(
            "open",
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, "
            "showing `num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
            "If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on "
            "the most relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page.",
            {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": {"type": "number", "default": -1},
                    "loc": {"type": "number", "default": -1},
                    "num_lines": {"type": "number", "default": -1},
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        ),
        Tool(
            "find",
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": {"type": "number", "default": -1}},
                "required": ["pattern"],
            },
        ),
    ),
)

PYTHON = ToolNamespace(
    "python",
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool "
    "should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when "
    "creating plots, tables, or files).\n"
    "\n"
    "When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook "
    "environment. python will respond with the output of the execution or time out after 120.0 seconds. The drive at "
    "'/mnt/data' can be used to save and persist user files. Internet access for this session is UNKNOWN. Depends on "
    "the cluster.",
)
