"""The protocol of a tool, tools made of Python functions, and how a set of tools is shown to the model.

A tool has a namespace, as Harmony calls it: `functions` for an application's own, `python` and `browser` for the two
that gpt-oss was trained with, and any other word for a server's tools.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_type_hints

from ..arguments import checked_call
from ..decoding.grammar import AnswerFormat, Engine, answer_format
from ..errors import SettingError, ToolError, UserError
from ..text.builtin_tools import BROWSER, PYTHON
from ..text.conversation import CHANNELS, resolve_recipient
from ..text.schema import Tool as ToolDefinition
from ..text.schema import ToolNamespace

FUNCTIONS = "functions"
# Shown to the model in the system message, with the wording it was trained with.
BUILT_IN = {"python": PYTHON, "browser": BROWSER}
# Names with another meaning in a message's header.
RESERVED = {FUNCTIONS, *BUILT_IN, *CHANNELS, "assistant", "user", "system", "developer", "tool", "all"}

# How many parts of a schema definitions may be expanded to.
_MOST_INLINED = 4_000

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class Tool(Protocol):
    """Something that the model may call.

    parameters: a JSON Schema of the arguments, whose type is "object"; None for a tool that takes plain text. Raising
    any exception from the call tells the model the exception's text instead of a result.
    """

    @property
    def name(self) -> str:
        """Its name within its namespace; the namespace's own name if the tool is the namespace (python)."""

    @property
    def description(self) -> str:
        """What the model is told about it."""

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """The JSON Schema of its arguments."""

    @property
    def namespace(self) -> str | None:
        """The namespace it is called in; None for a tool that is its own namespace (python)."""

    def __call__(self, arguments: Any) -> str:
        """Call the tool. arguments: a dictionary that follows `parameters`, or the text if there are none."""


@dataclass(frozen=True)
class FunctionTool:
    """A Python function as a tool: type hints say what it takes, the docstring what it does.

    Made by `function_tool`. The arguments are checked and converted by pydantic before the function sees them.
    """

    function: Callable[..., Any]
    name: str
    description: str
    parameters: Mapping[str, Any]
    arguments_model: Any
    namespace: str = FUNCTIONS

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """Call the function; what it returns as text: a string as it is, anything else as JSON."""
        values = self.arguments_model.model_validate(arguments)
        return result_text(self.function(**{name: getattr(values, name) for name in type(values).model_fields}))


@checked_call("function_tool", ToolError)
def function_tool(function: Callable[..., Any]) -> FunctionTool:
    """The tool that `function` is. Google's, NumPy's and reST's docstring styles describe its arguments.

    Raises ToolError for a function without a usable name, with *args, or with types that JSON Schema cannot express.
    """
    import docstring_parser
    import pydantic

    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function) or not _NAME.fullmatch(name):
        raise ToolError(f"{function!r} cannot be a tool: give a function with a name of letters, digits and '_'.")
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {each.arg_name: each.description for each in documentation.params}
    try:
        hints = get_type_hints(function, include_extras=True)
        fields = {
            each.name: _field(each, hints, described.get(each.name), name)
            for each in inspect.signature(function).parameters.values()
        }
        model = pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
        parameters = plain_schema(model.model_json_schema())
        if "return" in hints:
            pydantic.TypeAdapter(hints["return"]).json_schema(mode="serialization")
    except (NameError, TypeError, pydantic.errors.PydanticUserError) as error:
        reason = str(error).splitlines()[0]
        raise ToolError(
            f"The tool {name} has a type that JSON cannot express ({reason}): change its type hints."
        ) from error
    text = "\n".join(filter(None, (documentation.short_description, documentation.long_description)))
    return FunctionTool(function, name, text, parameters, model)


def _field(parameter: inspect.Parameter, hints: Mapping[str, Any], description: str | None, tool: str) -> Any:
    import pydantic

    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise ToolError(f"The tool {tool} takes {parameter}: the model gives arguments by name, so name each of them.")
    default = ... if parameter.default is parameter.empty else parameter.default
    hint = hints.get(parameter.name, Any)
    return (hint, default if description is None else pydantic.Field(default, description=description))


def plain_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without pydantic's titles, with its definitions expanded where they are used unless one contains itself.

    gpt-oss is shown a schema as a TypeScript type, in which a reference would be `any`. Definitions are not expanded if the
    schema would become huge.
    """
    definitions = schema.get("$defs", {})
    num_left = _MOST_INLINED

    def plain(node: Any, inside: tuple[str, ...] = ()) -> Any:
        nonlocal num_left
        num_left -= 1
        if isinstance(node, list):
            return [plain(each, inside) for each in node]
        if not isinstance(node, dict):
            return node
        name = str(node.get("$ref", "")).removeprefix("#/$defs/")
        if "$ref" in node and name in definitions and name not in inside and num_left > 0:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return {**plain(definitions[name], (*inside, name)), **plain(rest, inside)}
        return {
            key: {k: plain(v, inside) for k, v in value.items()} if key == "properties" else plain(value, inside)
            for key, value in node.items()
            if key not in ("title", "$defs") or not isinstance(value, (str, dict))
        }

    result = plain(dict(schema))
    if num_left <= 0:  # nothing is inlined from here on
        result = plain(dict(schema))
    if "'$ref'" in repr(result):
        result["$defs"] = {name: plain(each, (name,)) for name, each in definitions.items()}
    return result


def result_text(value: Any) -> str:
    """A tool's return value as text for the model. Raises TypeError for what JSON cannot express."""
    import pydantic_core

    if isinstance(value, str):
        return value
    if value is None:
        return "The tool is done. It returned nothing."
    try:
        return pydantic_core.to_json(value).decode()
    except (pydantic_core.PydanticSerializationError, ValueError) as error:
        try:
            return json.dumps(value, ensure_ascii=False)  # lone surrogates, which pydantic refuses
        except (TypeError, ValueError, RecursionError):
            raise TypeError(f"the result is a {type(value).__name__}, which JSON cannot express") from error


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments that a model wrote, a JSON object. Raises ValueError, with the reason, for anything else."""
    try:
        arguments = json.loads(text or "{}", parse_constant=_no_number)
    except RecursionError:
        raise ValueError("the arguments are nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the arguments are not valid JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments are a {type(arguments).__name__}, not a JSON object")
    return arguments


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def arguments_of(arguments: Any, name: str) -> dict[str, Any]:
    """The arguments of a call as a dictionary, from that or from the JSON that a model wrote. ToolError if they are not."""
    if isinstance(arguments, str):
        try:
            return read_arguments(arguments)
        except ValueError as error:
            raise ToolError(f"{name} cannot be called: {error}.") from None
    if not isinstance(arguments, Mapping):
        raise ToolError(f"The arguments of {name} are a {type(arguments).__name__}: give an object.")
    return dict(arguments)


class ToolSet:
    """A set of tools: how they are shown to the model, and which one a call means.

    tools: `Tool`s or plain functions. Raises ToolError for two tools of one name, for a reserved name, for an invalid schema,
    and for one that the engine cannot follow, unless the tool `is_lenient`: then its calls are checked when complete.
    """

    def __init__(self, tools: Sequence[Tool | Callable[..., Any]] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        # The formats that calls' arguments must follow while they are written, by full name.
        self.formats: dict[str, AnswerFormat] = {}
        for each in tools:
            tool = _as_tool(each)
            recipient = recipient_of(tool)
            if recipient in self._tools:
                raise ToolError(f"Two tools are called {recipient}: rename one of them.")
            if tool.namespace == FUNCTIONS and tool.name in RESERVED:
                raise ToolError(
                    f"A tool is called {tool.name!r}, which means something else in gpt-oss's format: rename it."
                )
            self._tools[recipient] = tool
            self._note_format(recipient, tool)
        try:
            self.functions = tuple(_definition(tool) for tool in self._tools.values() if tool.namespace == FUNCTIONS)
            self.built_in = tuple(
                content
                for name, content in BUILT_IN.items()
                if any(namespace_of(t) == name for t in self._tools.values())
            )
            self.namespaces = self._other_namespaces()
        except ToolError:
            raise
        except UserError as error:
            raise ToolError(str(error)) from error

    def _note_format(self, recipient: str, tool: Tool) -> None:
        if tool.parameters is None:
            return
        try:
            found = answer_format(tool.parameters)
        except UserError as error:
            if getattr(tool, "is_lenient", False):
                return
            raise ToolError(
                f"The arguments' schema of the tool {recipient} cannot be enforced: {error} Use simpler types."
            ) from None
        if found is not None:
            self.formats[recipient] = found

    def check_ends(self, engine: Engine) -> None:
        """Raise ToolError for a tool whose calls could never be finished. For a server's tool the schema is then ignored."""
        for name, call in list(self.formats.items()):
            reason = "its arguments' schema contains itself without an end"
            try:
                if engine.matcher(call).completion() is not None:
                    continue
            except SettingError as error:
                reason = str(error).rstrip(".")
            if not getattr(self._tools[name], "is_lenient", False):
                raise ToolError(f"No call of the tool {name} could be finished: {reason}.")
            del self.formats[name]

    def __bool__(self) -> bool:
        return bool(self._tools)

    @property
    def names(self) -> list[str]:
        """The tools' full names, in the given order."""
        return list(self._tools)

    @property
    def unfollowed(self) -> list[str]:
        """The tools (of servers) whose schema the engine cannot follow."""
        return [name for name, tool in self._tools.items() if tool.parameters is not None and name not in self.formats]

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The schemas that can be enforced while calls are written, by full name.

        A server's schema may have parts that the engine cannot follow; such calls are only checked when they are complete.
        """
        schemas = {name: tool.parameters for name, tool in self._tools.items()}
        return {name: each for name, each in schemas.items() if each is not None and name in self.formats}

    def find(self, recipient: str) -> tuple[str, Tool] | None:
        """The tool that a call's recipient means, and its full name; None when there is none."""
        found = resolve_recipient(recipient, self._tools.keys())
        return None if found is None else (found, self._tools[found])

    def _other_namespaces(self) -> tuple[ToolNamespace, ...]:
        own = dict.fromkeys(map(namespace_of, self._tools.values()))
        return tuple(
            ToolNamespace(
                name, tools=tuple(_definition(tool) for tool in self._tools.values() if namespace_of(tool) == name)
            )
            for name in own
            if name not in (FUNCTIONS, *BUILT_IN)
        )


def recipient_of(tool: Tool) -> str:
    """A tool's full name: "functions.search", or "python" for the tool that is its own namespace."""
    namespace = namespace_of(tool)
    return tool.name if tool.name == namespace else f"{namespace}.{tool.name}"


def namespace_of(tool: Tool) -> str:
    """The namespace that a tool is called in."""
    return tool.name if tool.namespace is None else tool.namespace


def _as_tool(tool: Any) -> Tool:
    if inspect.isroutine(tool) or isinstance(tool, type) or not hasattr(tool, "namespace"):
        return function_tool(tool)
    return tool


def _definition(tool: Tool) -> ToolDefinition:
    return ToolDefinition(tool.name, tool.description, tool.parameters)
