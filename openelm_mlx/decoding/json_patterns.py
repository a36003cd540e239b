"""Patterns as the engine has to be given them so that it holds them in a JSON string.

The engine (llguidance 1.9) turns a class of characters into what JSON writes for them. A class with every control character,
or with all but the line feed, gets every escape there is, and with them the quote's and the backslash's, whether they belong
to it or not: `[^"]` takes `\\"`. It reads a class exactly that misses one more of them. So such classes lose one control
character here, which only narrows what is written.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from .engine_schema import bytes_tokenizer

# Control characters that may be missed, those first that no text has. The line feed is none: a class is misread without it.
_MISSED = "".join(map(chr, (*range(9), 0x0B, *range(0x0E, 0x20), 0x0C, 0x0D, 0x09)))
_CONTROLS = frozenset(_MISSED)
_CLASSES = "[", r"\P", r"\p", r"\s"
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{([0-9a-fA-F]{1,8})\}|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))",
    re.DOTALL,
)
_LETTERS = {"a": "\x07", "f": "\x0c", "t": "\t", "r": "\r", "v": "\x0b"}


def fits(pattern: str, text: str) -> bool:
    """Whether JSON Schema's `pattern` matches `text`; one that the engine cannot read matches nothing."""
    return matches(pattern, text) is True


@lru_cache(maxsize=4096)
def matches(pattern: str, text: str) -> bool | None:
    """Whether JSON Schema's `pattern` is found in `text`, in linear time and in the engine's own reading of it.

    None where the engine cannot say: it does not read the pattern, or gives up on its size.
    """
    from llguidance import LLMatcher

    held = held_pattern(pattern, "".join(sorted({c for c in text if c < " "})))
    if held is None or "\x7f" in text:  # which the engine writes nowhere
        return None
    definition = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": held}))
    matcher = LLMatcher(bytes_tokenizer(), definition, log_level=0)
    if matcher.is_error():
        return None
    data = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    is_match = matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()
    return None if matcher.is_error() else is_match


@lru_cache(maxsize=1024)
def held_pattern(pattern: str, text: str = "") -> str | None:
    """The pattern as the engine reads it exactly; None if there is no such one, or the engine
    reads none at all.

    text: is matched by the pattern that is returned if it is by this one. Of others some may not be matched any more, those
    with a certain control character; none is matched that was not.
    """
    parts = _parts(pattern)
    if parts is None:
        return None
    # A class with quote and backslash cannot be misread. Others may be alternatives, which the engine makes one class of.
    classes = {i: _ascii_of(part) for i, part in enumerate(parts) if part.startswith(_CLASSES)}
    if any(members is None for members in classes.values()):
        return None
    narrow = {i: members for i, members in classes.items() if members is not None and not members >= {'"', "\\"}}
    singles = {_single(part) for i, part in enumerate(parts) if i not in classes}
    if not singles.union(*narrow.values()) >= _CONTROLS:
        return pattern
    missed = next((c for c in _MISSED if c not in singles and c not in text), None)
    if missed is None:
        return None
    changed = [i for i, members in narrow.items() if missed in members]
    for i in changed:
        parts[i] = f"[{_all_but(missed)}&&{parts[i]}]"
    return "".join(parts)


@lru_cache(maxsize=1024)
def _ascii_of(part: str) -> frozenset[str] | None:
    """The ASCII characters of a class, as the engine reads it; None if it does not."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(bytes_tokenizer(), LLMatcher.grammar_from_regex(part), log_level=0)
    except ValueError:
        return None
    if matcher.is_error():
        return None
    words = memoryview(matcher.compute_bitmask()).cast("B")
    return frozenset(chr(byte) for byte in range(0x80) if words[byte >> 3] >> (byte & 7) & 1)


def _all_but(character: str) -> str:
    code = ord(character)
    before = f"\\x00-\\x{code - 1:02x}" if code else ""
    return f"{before}\\x{code + 1:02x}-\\x{{10FFFF}}"


def _parts(pattern: str) -> list[str] | None:
    """The pattern in pieces: classes, escapes, and single characters; None if a class or an escape has no end."""
    parts, at = [], 0
    while at < len(pattern):
        end: int | None = at + 1
        if pattern[at] == "[":
            end = _end_of_class(pattern, at)
        elif pattern[at] == "\\":
            match = _ESCAPE.match(pattern, at)
            end = match.end() if match else None
        if end is None:
            return None
        parts.append(pattern[at:end])
        at = end
    return parts


def _end_of_class(pattern: str, at: int) -> int | None:
    """Where the class ends that begins here. Classes may stand in each other; a first `]` is one of the characters."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
        elif pattern[at] == "[":
            depth += 1
            match = re.compile(r"\[\^?-*\]?").match(pattern, at)
            assert match is not None
            at = match.end()
        else:
            depth -= pattern[at] == "]"
            at += 1
            if not depth:
                return at
    return None


def _single(part: str) -> str | None:
    """The character that a piece stands for by itself, where it may be a control character."""
    if not part.startswith("\\"):
        return part
    match = _ESCAPE.fullmatch(part)
    assert match is not None
    code = next(filter(None, match.groups()[:4]), None)
    if code is not None:
        return chr(int(code, 16)) if int(code, 16) < 0x20 else None
    return _LETTERS.get(match[5] or "")
