"""Names of answers and their items."""

from __future__ import annotations

import secrets


def new_id(kind: str, between: str = "_") -> str:
    """A name that no other has: `new_id("resp")` is "resp_" and 48 hexadecimal digits."""
    return f"{kind}{between}{secrets.token_hex(24)}"
