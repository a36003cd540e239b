"""Text that every encoding of Unicode can write."""

from __future__ import annotations

import re

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")


def whole_characters(text: str) -> str:
    """`text` with halves of surrogate pairs joined, and lone ones replaced by U+FFFD.

    Lone halves come from file names that are not UTF-8, from a terminal, and from escapes in JSON such as "\\ud83d".
    """
    if text.isascii() or _HALF.search(text) is None:
        return text
    joined = _PAIR.sub(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
    return _HALF.sub("\ufffd", joined)
