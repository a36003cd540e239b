"""What may reach a terminal: text that others wrote, with everything in it that a terminal would obey made visible.

A model's answer, a tool's result, a file's name or a repository's text may hold escape sequences that set the clipboard or
the title, move the cursor, or hide what stands before them. No sequence is parsed here: the one character that begins it is
shown as a picture of itself, and the rest is plain text. So nothing can hide behind a sequence that never ends, and it does
not matter where a stream is divided.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, final

from .unicode import whole_characters

# C0, DEL and C1; what turns the direction of lines (a name that reads backwards); what separates lines; half characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIGH_SURROGATES = ("\ud800", "\udbff")
_BREAKS = re.compile(r"\s*[\n\u2028\u2029\x85]\s*")
# What JSON lets stand in a string and a terminal obeys.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` for a terminal: line breaks and tabs stay, and every other control character is shown and does nothing.

    A character of half a pair (from a name that is not UTF-8, or a broken escape) becomes U+FFFD. "\r\n" is a line break.

        visible("a\x1b[2Jb")   # "a␛[2Jb"
    """
    text = text.replace("\r\n", "\n")
    if _CONTROLS.search(text) is None:
        return text
    return _CONTROLS.sub(_picture, whole_characters(text))


def visible_line(text: str) -> str:
    """`visible`, in one line: where lines break, and around it, there is one space."""
    return visible(_BREAKS.sub(" ", text.strip())).replace("\t", " ")


@final
class TerminalStream:
    """`visible` for text that comes in pieces: `add` each, then `finish`. What they give together is the whole text's."""

    def __init__(self) -> None:
        self._pending = ""

    def add(self, text: str) -> str:
        """What of the text so far can be shown; the half of a line break or of a character waits for the next piece."""
        text = self._pending + text
        last = text[-1:]
        waits = last == "\r" or _HIGH_SURROGATES[0] <= last <= _HIGH_SURROGATES[1]
        self._pending = last if waits else ""
        return visible(text[:-1] if waits else text)

    def finish(self) -> str:
        """What was still waiting."""
        text, self._pending = self._pending, ""
        return visible(text)


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON that a terminal may be shown: control characters are escaped in it, and a reader gets the value as it is.

    Infinities and what is not a number, which JSON does not know, are null; what has no form in JSON is its `str`.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=ascii_only, indent=indent, default=str)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _picture(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    if 0xD800 <= number <= 0xDFFF:
        return "\ufffd"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
