"""Sizes in bytes as people write them: "8GB", "1.5 GiB"."""

from __future__ import annotations

import re

from ..checks import is_number
from ..errors import SettingError
from ..files import shown

_LETTERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# A number without a unit below this is not a number of bytes that anybody means.
FEWEST_BARE_BYTES = 2**20


def parse_size(value: int | float | str, name: str) -> int:
    """Bytes from a number or text: "10GB", "10G" and "10g" are 10 times 10^9, "1.5 GiB" 1.5 times 2^30.

    name: of the setting, for the SettingError that anything else raises; so does a number without a unit that is too small
    to be meant in bytes.
    """
    number: float | None = None
    unit = ""
    if is_number(value) and not abs(value) >= 2**63:  # a number that is too large may be none that a float holds
        number = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(
            r"\s*(\d+(?:\.\d*)?|\.\d+)\s*((?:([kmgt])(i?)b?)|b|bytes?)?\s*", value, re.IGNORECASE | re.ASCII
        )
        if match is not None:
            unit, power = match[2] or "", _LETTERS[(match[3] or "").lower()]
            number = float(match[1]) * (1024 if match[4] else 1000) ** power
    if number is None or not 1 <= number < 2**63:
        raise SettingError(f'{name} is {shown(value)}: give bytes above 0, or text such as "8GB" or "1.5GiB".')
    if not unit and number < FEWEST_BARE_BYTES:
        raise SettingError(f'{name} is {shown(value)}, which means {number:,g} bytes: did you mean "{number:g}GB"?')
    return int(number)


def parse_memory(value: int | str | None) -> int | None:
    """Bytes of a memory limit, as `parse_size` reads them; None for None. Raises SettingError."""
    return None if value is None else parse_size(value, "memory_limit")
