"""Reasoning in the fields that hosted services encrypt: OpenAI's `encrypted_content`, Anthropic's `signature`.

Clients send these fields back as they got them. Here they hold the text itself, which is no secret to whoever has it.
"""

from __future__ import annotations

import base64
import binascii

_MARK = "openelm-mlx-reasoning:"


def encode_reasoning(text: str) -> str:
    """The text in a form that clients pass on unread. `decode_reasoning` reads it."""
    return _MARK + base64.b64encode(text.encode("utf-8", "replace")).decode()


def decode_reasoning(value: str | None) -> str:
    """The text of a sealed field; "" for one that another service has encrypted.

    Other local servers put the text there as it is.
    """
    if not value:
        return ""
    if not value.startswith(_MARK):
        return value if any(character.isspace() for character in value.strip()) else ""
    try:
        return base64.b64decode(value.removeprefix(_MARK), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
