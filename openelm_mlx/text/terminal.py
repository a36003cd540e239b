"""Text from others made safe for a terminal: control characters become visible symbols.

A model's answer, a tool's result, a file's name or a repository's text may hold escape sequences that set the clipboard or
the title, move the cursor, or hide the text before them. Sequences are not parsed here: the character that begins one is
replaced by its symbol, and the rest is plain text. So nothing can hide behind an endless sequence, and a stream may be
divided anywhere.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, final

from .unicode import whole_characters

# C0, DEL and C1; direction marks (a name that reads backwards); line and paragraph separators; lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIGH_SURROGATES = ("\ud800", "\udbff")
_BREAKS = re.compile(r"\s*[\n\u2028\u2029\x85]\s*")
# Control characters that JSON allows unescaped in a string.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` for a terminal: line breaks and tabs stay, every other control character becomes a visible symbol.

    A lone surrogate (from a name that is not UTF-8, or a broken escape) becomes U+FFFD. "\r\n" is a line break.

        visible("a\x1b[2Jb")   # "a␛[2Jb"
    """
    text = text.replace("\r\n", "\n")
    if _CONTROLS.search(text) is None:
        return text
    return _CONTROLS.sub(_picture, whole_characters(text))


def visible_line(text: str) -> str:
    """`visible`, in one line: line breaks become spaces."""
    return visible(_BREAKS.sub(" ", text.strip())).replace("\t", " ")


@final
class TerminalStream:
    """`visible` for text in pieces: `add` each, then `finish`. Together they give `visible` of the whole text."""

    def __init__(self) -> None:
        self._pending = ""

    def add(self, text: str) -> str:
        """The text that can be shown so far; half a line break or half a character waits for the next piece."""
        text = self._pending + text
        last = text[-1:]
        waits = last == "\r" or _HIGH_SURROGATES[0] <= last <= _HIGH_SURROGATES[1]
        self._pending = last if waits else ""
        return visible(text[:-1] if waits else text)

    def finish(self) -> str:
        """The text that was still waiting."""
        text, self._pending = self._pending, ""
        return visible(text)


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON that is safe in a terminal: control characters are escaped, and parsing it gives the same value.

    Infinities and NaN, which JSON does not have, are null; a value without a form in JSON is its `str`.
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
