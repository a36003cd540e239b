"""Names of answers and their items."""

from __future__ import annotations

import secrets


def new_id(kind: str) -> str:
    """A name that no other has: `new_id("resp")` is "resp_" and 48 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(24)}"
