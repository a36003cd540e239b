"""Custom tools of Responses, which take text: gpt-oss calls functions with JSON, so the text is the one string in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...files import shown
from ..failures import bad_request

_INPUT = "input"


def wrapped(text: str) -> str:
    """A custom tool's input as arguments of the function that stands for it."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def as_function(definition: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """The description and the parameters of the function that stands for a custom tool. Raises ApiError."""
    description = definition.get("description") or ""
    if not isinstance(description, str):
        raise bad_request(f"{place}.description is {shown(description)}: it should be text.", f"{place}.description")
    schema: dict[str, Any] = {"type": "string", "description": "The whole input, as text."}
    layout = definition.get("format") or {}
    if not isinstance(layout, Mapping):
        raise bad_request(f"{place}.format is {shown(layout)}: it should be an object.", f"{place}.format")
    if layout.get("type") == "grammar":
        syntax, rules = layout.get("syntax"), layout.get("definition")
        if syntax not in ("lark", "regex") or not isinstance(rules, str):
            wanted = "a grammar has a syntax, lark or regex, and a definition"
            raise bad_request(f"{place}.format is {shown(layout)}: {wanted}.", f"{place}.format")
        description = f"{description}\n\nThe input follows this {syntax} grammar:\n{rules}".strip()
        if syntax == "regex":
            schema["pattern"] = f"^(?:{rules})$"
    parameters = {
        "type": "object", "properties": {_INPUT: schema}, "required": [_INPUT], "additionalProperties": False,
    }  # fmt: skip
    return description, parameters


class CustomInput:
    """The text of a custom tool's input, from the JSON of the arguments as they are written.

    >>> custom = CustomInput()
    >>> custom.more('{"input": "a'), custom.more('\\\\n'), custom.more('b"}'), custom.whole('{"input": "a\\\\nb"}')
    ('a', '\\n', 'b', 'a\\nb')
    """

    def __init__(self) -> None:
        self._ahead = ""  # what cannot be read yet: the opening, or half an escape
        self._is_open = self._is_ended = False
        self.given = ""

    def more(self, text: str) -> str:
        """What the next characters of the arguments add to the input."""
        if self._is_ended:
            return ""
        self._ahead += text
        if not self._is_open:
            opening = _opening(self._ahead)
            if opening is None:
                return ""
            self._is_open, self._ahead = True, self._ahead[opening:]
        end, self._is_ended = _readable(self._ahead)
        inside, self._ahead = self._ahead[:end], self._ahead[end:]
        try:
            read = json.loads(f'"{inside}"', strict=False)
        except ValueError:  # an escape that JSON does not have
            read = inside
        self.given += read
        return read

    def whole(self, arguments: str) -> str:
        """The whole input, which begins with what was given. Arguments of another form are taken as the text itself."""
        try:
            value = json.loads(arguments, strict=False)
        except ValueError:
            return self.given or arguments
        text = value.get(_INPUT) if isinstance(value, dict) else None
        return text if isinstance(text, str) and text.startswith(self.given) else self.given or arguments


def _opening(text: str) -> int | None:
    """Where the string begins: after `{`, the name, a colon and a quote, with any blanks between."""
    place = 0
    for token in ("{", json.dumps(_INPUT), ":", '"'):
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        if not text.startswith(token, place):
            return None
        place += len(token)
    return place


def _readable(text: str) -> tuple[int, bool]:
    """How much of a JSON string's inside can be read already, and whether the string ends there."""
    place = 0
    while place < len(text) and text[place] != '"':
        if text[place] != "\\":
            place += 1
            continue
        length = 6 if text[place + 1 : place + 2] == "u" else 2
        escape = text[place : place + length]
        # The second half of a pair belongs to the first.
        if escape[:2] == "\\u" and escape[2:3].lower() == "d" and escape[3:4].lower() in tuple("89ab"):
            length = 12 if text[place + 6 : place + 8] in ("\\u", "\\", "") else 6
        if place + length > len(text):
            return place, False
        place += length
    return place, place < len(text)
