"""Tool definitions: from JSON Schema to the TypeScript-like text that gpt-oss reads.

The text is byte for byte what openai-harmony 0.0.8 writes: gpt-oss was trained to read it, so its oddities (an array of
an enum without brackets, `anyOf` and `$ref` as `any`) are kept; docs/harmony.md lists them. harmony.py puts the text into
a prompt.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import SettingError
from openelm_mlx.text.schema_check import check_schema


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

    Whatever the notation cannot express (`anyOf`, `$ref`, `const`, a schema without a type) is `any`.
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
    """Compact JSON: no spaces, only the necessary escapes, numbers as short as possible (`1e20`, not `1e+20`)."""
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
    if exponent == "-05":  # Python switches to exponents one power of ten earlier
        digits = mantissa.replace(".", "")
        return f"-0.0000{digits[1:]}" if digits[0] == "-" else f"0.0000{digits}"
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
