"""What a request may call: functions that are told to gpt-oss, whether it has to call one, and what their arguments are.

Beside functions there are the two tools that gpt-oss was trained with, python and browser, as the namespaces PYTHON and
BROWSER of text/builtin_tools.py: it is told of them in the system message, and calls them by names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..decoding.headers import HeaderRule
from ..errors import SettingError
from ..files import shown
from ..text.builtin_tools import BROWSER, PYTHON
from ..text.conversation import FUNCTIONS
from ..text.schema import Tool, ToolNamespace, check_unique

AUTO, NONE, REQUIRED = "auto", "none", "required"
# The arguments of a function that takes none.
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Calling:
    """See the module. choice: "auto", "required", or the one that has to be called, "functions.f"."""

    tools: tuple[Tool, ...]
    choice: str = AUTO
    built_in: tuple[ToolNamespace, ...] = ()

    @property
    def recipients(self) -> tuple[str, ...]:
        """Those that may be called."""
        every = recipients_of(self.tools, self.built_in)
        return every if self.choice in (AUTO, REQUIRED) else (self.choice,)

    def schemas(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The schemas of arguments by recipient. given: instead of the tools' own. python takes text, which has none."""
        if given is not None:
            return dict(given)
        named = [(FUNCTIONS, tool) for tool in self.tools]
        named += [(namespace.name, tool) for namespace in self.built_in for tool in namespace.tools]
        return {
            f"{namespace}.{tool.name}": NO_ARGUMENTS if tool.parameters is None else tool.parameters
            for namespace, tool in named
        }


def recipients_of(tools: Sequence[Tool], built_in: Sequence[ToolNamespace]) -> tuple[str, ...]:
    """The names by which tools are called: "functions.f", "browser.search", "python"."""
    names = [f"{FUNCTIONS}.{tool.name}" for tool in tools]
    for namespace in built_in:
        names += [f"{namespace.name}.{tool.name}" for tool in namespace.tools] or [namespace.name]
    return tuple(names)


def rule_of(calling: Calling | None, choice: str | None, has_format: bool, may_think: bool) -> HeaderRule | None:
    """What a completion may consist of; None: nobody has said.

    has_format: whether its answer has a format. may_think: whether it may reason.
    """
    if calling is not None:
        return HeaderRule(calling.recipients, calling.choice != AUTO, may_think, has_format)
    return HeaderRule((), False, may_think, has_format) if choice == NONE or not may_think else None


def calling_of(tools: Sequence[Tool | ToolNamespace | Mapping[str, Any]], choice: str | None) -> Calling | None:
    """What a request's `tools` and `tool_choice` mean; None where it has no tools, or may not call any.

    Raises SettingError.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise SettingError(f"tools is {shown(tools)}: give a list of functions as OpenAI writes them.")
    built_in = tuple(tool for tool in tools if isinstance(tool, ToolNamespace))
    for namespace in built_in:
        if namespace not in (BROWSER, PYTHON):
            raise SettingError(
                f"The namespace {namespace.name!r} is none that gpt-oss was trained with: give its tools as functions."
            )
    check_unique((namespace.name for namespace in built_in), "tools")
    functions = [tool for tool in tools if not isinstance(tool, ToolNamespace)]
    own = tuple(tool if isinstance(tool, Tool) else Tool.from_dict(tool) for tool in functions)
    check_unique((tool.name for tool in own), "tools")
    names = recipients_of(own, built_in)
    if choice not in (None, AUTO, NONE, REQUIRED, *names):
        named = choice.removeprefix(f"{FUNCTIONS}.") if isinstance(choice, str) else shown(choice)
        known = ", ".join(name.removeprefix(f"{FUNCTIONS}.") for name in names) or "none"
        raise SettingError(
            f"tool_choice is {named}, and the tools are {known}: choose one of them, auto, none or required."
        )
    if not names and choice not in (None, AUTO, NONE):
        raise SettingError(f"tool_choice is {choice}, and the request has no tools: add some, or leave it out.")
    return Calling(own, choice or AUTO, built_in) if names and choice != NONE else None
