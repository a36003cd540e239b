"""The tools that come with the library, by the names that `--tools` knows them under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ToolError


@dataclass(frozen=True)
class Kit:
    """Tools that are asked for with one word. make: the value behind "=" (None without one) -> the tools."""

    description: str
    make: Callable[[str | None], list[Any]]
    value: str | None = None  # what stands behind "=", as the help shows it; None when nothing may


def _calculator(value: str | None) -> list[Any]:
    from .calculator import calculator

    return [calculator]


KITS: dict[str, Kit] = {
    "calculator": Kit("arithmetic", _calculator),
}


def make_tools(wanted: str, kits: Mapping[str, Kit] = KITS) -> list[Any]:
    """The tools of a list such as "calculator,files=~/notes". Raises ToolError for a name or a value that is none."""
    tools: list[Any] = []
    for word in filter(None, (each.strip() for each in wanted.split(","))):
        name, has_value, value = word.partition("=")
        kit = kits.get(name)
        if kit is None:
            raise ToolError(f"There is no tool {name!r}: choose among {', '.join(usage(each, kits) for each in kits)}.")
        if bool(has_value and value) != (kit.value is not None):
            raise ToolError(f"The tool {name} is asked for as {usage(name, kits)}, and {word!r} is not of that form.")
        tools += kit.make(value or None)
    return tools


def usage(name: str, kits: Mapping[str, Kit] = KITS) -> str:
    """How a tool is asked for: "calculator", "files=DIR"."""
    value = kits[name].value
    return name if value is None else f"{name}={value}"
