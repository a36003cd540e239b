"""Checks and texts shared by the whole library: whole numbers from a caller, and sizes in bytes."""

from __future__ import annotations

from typing import Any, TypeGuard

from .errors import SettingError
from .files import ErrorClass, shown


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number. True and False are not, although Python counts them as integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number, whole or not, and neither True nor False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(
    name: str,
    value: Any,
    low: int = 1,
    high: int | None = None,
    *,
    whose: str = "",
    error: ErrorClass = SettingError,
) -> int:
    """`value`, if it is a whole number from `low` to `high` (None: no upper limit). Raises `error` otherwise.

    name: what the error calls it. whose: said before the largest, as in "at most the model's 2,048".
    """
    if not is_whole(value) or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {whose}{high:,}"
        raise error(f"{name} is {shown(value)}: it must be a whole number, at least {low}{most}.")
    return int(value)


def size(num_bytes: int) -> str:
    """Bytes for people: 12.71 GB, 3.1 MB, 1.2 kB, 17 bytes."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 10**6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.1f} kB" if num_bytes >= 1000 else f"{num_bytes} bytes"
