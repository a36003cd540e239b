"""What a request may call: functions that are told to gpt-oss, whether it has to call one, and what their arguments are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..decoding.headers import HeaderRule
from ..errors import SettingError
from ..files import shown
from ..text.conversation import FUNCTIONS
from ..text.schema import Tool, check_unique

AUTO, NONE, REQUIRED = "auto", "none", "required"
# The arguments of a function that takes none.
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Calling:
    """See the module. choice: "auto", "required", or the one that has to be called, "functions.f"."""

    tools: tuple[Tool, ...]
    choice: str = AUTO

    @property
    def recipients(self) -> tuple[str, ...]:
        """Those that may be called."""
        every = tuple(f"{FUNCTIONS}.{tool.name}" for tool in self.tools)
        return every if self.choice in (AUTO, REQUIRED) else (self.choice,)

    def schemas(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The schemas of arguments by recipient. given: instead of the tools' own."""
        if given is not None:
            return dict(given)
        own = zip((f"{FUNCTIONS}.{tool.name}" for tool in self.tools), self.tools, strict=True)
        return {name: NO_ARGUMENTS if tool.parameters is None else tool.parameters for name, tool in own}


def rule_of(calling: Calling | None, choice: str | None, has_format: bool, may_think: bool) -> HeaderRule | None:
    """What a completion may consist of; None: nobody has said.

    has_format: whether its answer has a format. may_think: whether it may reason.
    """
    if calling is not None:
        return HeaderRule(calling.recipients, calling.choice != AUTO, may_think, has_format)
    return HeaderRule((), False, may_think, has_format) if choice == NONE or not may_think else None


def calling_of(tools: Sequence[Tool | Mapping[str, Any]], choice: str | None) -> Calling | None:
    """What a request's `tools` and `tool_choice` mean; None where it has no tools, or may not call any.

    Raises SettingError.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise SettingError(f"tools is {shown(tools)}: give a list of functions as OpenAI writes them.")
    own = tuple(tool if isinstance(tool, Tool) else Tool.from_dict(tool) for tool in tools)
    check_unique((tool.name for tool in own), "tools")
    names = [f"{FUNCTIONS}.{tool.name}" for tool in own]
    known = (None, AUTO, NONE, REQUIRED, *names)
    if choice not in known:
        named = choice.removeprefix(f"{FUNCTIONS}.") if isinstance(choice, str) else shown(choice)
        raise SettingError(
            f"tool_choice is {named}, and the tools are {', '.join(tool.name for tool in own) or 'none'}: choose one of "
            "them, auto, none or required."
        )
    if not own and choice not in (None, AUTO, NONE):
        raise SettingError(f"tool_choice is {choice}, and the request has no tools: add some, or leave it out.")
    return Calling(own, choice or AUTO) if own and choice != NONE else None
