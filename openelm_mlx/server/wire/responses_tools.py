"""The tools of a Responses request: functions, free-text ("custom") tools, and namespaces of both, as functions of the model.

Tools of other kinds (web_search, file_search, mcp, ...) would have to run on OpenAI's servers. They are left out: clients
offer them to every server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...files import shown
from ...text.schema import Tool
from ..failures import ApiError, bad_request
from ..generation import NamedTool, ToolChoice
from .custom_input import as_function
from .functions import function_of

FUNCTION, CUSTOM, NAMESPACE = "function", "custom", "namespace"


@dataclass(frozen=True)
class ClientTool:
    """A tool as the client defined it. name, namespace: its own; `function` is what the model calls it."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None
    function: Tool
    is_strict: bool


@dataclass(frozen=True)
class Tools:
    """The tools that a request offers.

    echoed: their definitions as the answer repeats them. offered: those the model is told of, after tool_choice.
    """

    known: tuple[ClientTool, ...] = ()
    echoed: tuple[Mapping[str, Any], ...] = ()
    offered: tuple[ClientTool, ...] = ()
    choice: ToolChoice = "auto"
    by_function: Mapping[str, ClientTool] = field(default_factory=dict)

    @property
    def functions(self) -> tuple[Tool, ...]:
        return tuple(tool.function for tool in self.offered)

    @property
    def lenient(self) -> frozenset[str]:
        """Functions whose schemas need not be enforced where the engine cannot follow them."""
        return frozenset(tool.function.name for tool in self.offered if not tool.is_strict)

    def function_name(self, name: str, namespace: str | None = None) -> str:
        """What the model calls a tool that a client names; a tool that is not offered any more keeps its name."""
        tool = self.named(name, namespace)
        return name if tool is None else tool.function.name

    def named(self, name: Any, namespace: Any = None) -> ClientTool | None:
        """The tool that a client names. Clients may leave a namespace out where no other tool has the name."""
        same = [tool for tool in self.known if tool.name == name and namespace in (None, tool.namespace)]
        return next((tool for tool in same if tool.namespace == namespace), same[0] if same else None)


def read_tools(definitions: Sequence[tuple[str, Any]], choice: Any = None) -> Tools:
    """The tools of `definitions`, each with the place it came from ("tools[0]"), and tool_choice. Raises ApiError."""
    found: list[tuple[str, Mapping[str, Any], str | None]] = []  # place, definition, namespace
    echoed = []
    for place, definition in definitions:
        kind = _mapping(definition, place).get("type")
        if kind == NAMESPACE:
            found += _within(place, definition)
            echoed.append({"description": "", **definition})
        elif kind in (FUNCTION, CUSTOM):
            found.append((place, definition, None))
            echoed.append({"parameters": None, "strict": None, **definition} if kind == FUNCTION else definition)
    names = Counter(_name(definition, place) for place, definition, _ in found)
    known = tuple(_tool(*each, is_unique=names[each[1]["name"]] == 1) for each in found)
    by_function = {tool.function.name: tool for tool in known}
    if len(by_function) < len(known):
        double = next(name for name, count in Counter(tool.function.name for tool in known).items() if count > 1)
        raise bad_request(f"Two tools are called {shown(double)}: rename one of them.", "tools")
    tools = Tools(known, tuple(echoed), known, by_function=by_function)
    return replace(tools, **_chosen(tools, choice))


def _within(place: str, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    name, tools = _name(namespace, place), namespace.get("tools") or ()
    if not isinstance(tools, (list, tuple)):
        raise bad_request(f"{place}.tools is {shown(tools)}: it should be a list.", f"{place}.tools")
    for number, tool in enumerate(tools):
        if _mapping(tool, f"{place}.tools[{number}]").get("type") in (FUNCTION, CUSTOM):
            yield f"{place}.tools[{number}]", tool, name


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise bad_request(f"{place} is {shown(value)}: it should be an object.", place)
    return value


def _name(definition: Mapping[str, Any], place: str) -> str:
    name = definition.get("name")
    if not isinstance(name, str) or not name:
        given = "missing" if name is None else shown(name)
        raise bad_request(f"{place}.name is {given}: it should be a word.", f"{place}.name")
    return name


def _tool(place: str, definition: Mapping[str, Any], namespace: str | None, is_unique: bool) -> ClientTool:
    """A name alone is what the model reads in its other instructions; two namespaces may have the same one."""
    name = definition["name"]
    called = name if is_unique or namespace is None else f"{namespace}__{name}"
    description, parameters = definition.get("description"), definition.get("parameters")
    is_custom = definition["type"] == CUSTOM
    if is_custom:
        description, parameters = as_function(definition, place)
    function = function_of(called, description, parameters, place)
    return ClientTool(
        "custom" if is_custom else "function", name, namespace, function, definition.get("strict") is True
    )


# --- tool_choice --------------------------------------------------------------------------------------------------------


def _chosen(tools: Tools, choice: Any) -> dict[str, Any]:
    """What tool_choice changes: the tools that are offered, and whether one has to be called."""
    if choice is None or choice in ("auto", "none"):
        return {"choice": choice or "auto"}
    if choice == "required":
        return {"choice": _required(tools.offered)}
    if not isinstance(choice, Mapping):
        wanted = 'it should be "none", "auto", "required", or an object that names a tool'
        raise bad_request(f"tool_choice is {shown(choice)}: {wanted}.", "tool_choice")
    kind = choice.get("type")
    if kind in (FUNCTION, CUSTOM):
        return {"choice": NamedTool(_named(tools, choice).function.name)}
    if kind == "allowed_tools":
        return _allowed(tools, choice)
    raise bad_request(
        f"tool_choice asks for {shown(kind)}, and only tools of type function or custom are called here: "
        "the client has to run them.",
        "tool_choice",
    )


def _allowed(tools: Tools, choice: Mapping[str, Any]) -> dict[str, Any]:
    names, mode = choice.get("tools"), choice.get("mode", "auto")
    if not isinstance(names, (list, tuple)) or mode not in ("auto", "required"):
        wanted = 'allowed_tools has a list of tools, and a mode, "auto" or "required"'
        raise bad_request(f"tool_choice is {shown(choice)}: {wanted}.", "tool_choice")
    allowed = [_mapping(each, "tool_choice.tools") for each in names]
    offered = tuple(_named(tools, each) for each in allowed if each.get("type") in (FUNCTION, CUSTOM, None))
    return {"offered": offered, "choice": _required(offered) if mode == "required" else "auto"}


def _required(offered: tuple[ClientTool, ...]) -> ToolChoice:
    if not offered:
        raise bad_request("tool_choice asks for a call, and there is no tool to call: give tools.", "tool_choice")
    return "required"


def _named(tools: Tools, choice: Mapping[str, Any]) -> ClientTool:
    name = choice.get("name")
    tool = tools.named(name, choice.get("namespace"))
    if tool is None:
        raise ApiError(400, f"tool_choice names {shown(name)}, which is not among the tools.", param="tool_choice")
    return tool
