"""Classes of characters as sorted ranges of code points: `\\w`, `[^a-f]`, `\\p{L}` and their unions and complements.

`\\w` and `\\p{...}` have all letters outside ASCII, so that a class has at least the characters that the engine's has.
"""

from __future__ import annotations

from collections.abc import Iterable

LAST = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]  # of code points, sorted and apart
ANY: Ranges = ((0, LAST),)
BEYOND_ASCII = (0x80, LAST)
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
CLASSES: dict[str, Ranges] = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
NAMED: dict[str, Ranges] = {
    "alpha": ((0x41, 0x5A), (0x61, 0x7A)),
    "alnum": ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)),
    "ascii": ((0, 0x7F),),
    "blank": ((0x09, 0x09), (0x20, 0x20)),
    "cntrl": ((0, 0x1F), (0x7F, 0x7F)),
    "digit": _DIGIT,
    "graph": ((0x21, 0x7E),),
    "lower": ((0x61, 0x7A),),
    "print": ((0x20, 0x7E),),
    "punct": ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)),
    "space": _SPACE,
    "upper": ((0x41, 0x5A),),
    "word": _WORD,
    "xdigit": ((0x30, 0x39), (0x41, 0x46), (0x61, 0x66)),
}
PROPERTIES: dict[str, Ranges] = {"L": NAMED["alpha"], "Lu": NAMED["upper"], "Ll": NAMED["lower"], "N": _DIGIT}
PROPERTIES |= {"Letter": NAMED["alpha"], "Alphabetic": NAMED["alpha"], "Nd": _DIGIT, "P": NAMED["punct"]}
# Taken for a class when it has them; then other printable characters, and what JSON would have to escape last.
PREFERRED = [ord(c) for c in "a0A-_.:/@, ;+"]
PREFERRED += [code for code in range(0x21, 0x7F) if chr(code) not in '"\\' and code not in PREFERRED]
PREFERRED += [ord('"'), ord("\\"), 0x0A, 0x09]


def union(parts: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for low, high in ranges:
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    return tuple(found) if start > LAST else (*found, (start, LAST))


def intersection(first: Ranges, second: Ranges) -> Ranges:
    return complement(union((*complement(first), *complement(second))))


def contains(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def a_character_of(ranges: Ranges) -> str | None:
    """A character of a class, a plain one where it has any."""
    for code in PREFERRED:
        if contains(ranges, code):
            return chr(code)
    for low, high in ranges:
        code = max(low, 0xA1) if high >= 0xA1 else low
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)
        if high > 0xDFFF:
            return chr(0xE000)
    return None


def preference(character: str) -> int:
    code = ord(character)
    return PREFERRED.index(code) if code in PREFERRED else 1000
