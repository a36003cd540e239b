"""The secret that machines share: in a file that nobody else can read, never in a command's arguments."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..errors import SettingError
from ..files import expanded, read_bytes

LEAST_BYTES, MOST_BYTES = 16, 4096


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """The secret in a file, without white space around it.

    Raises SettingError for a file that is not there, that others can read, or that is too short to be a secret.
    """
    place = expanded(path, SettingError)
    name = shlex.quote(str(place))
    if not place.exists():
        raise SettingError(
            f"There is no secret file {place}: make one with `(umask 077; openssl rand -hex 32 > {name})`, and copy it to "
            "the other machine."
        )
    _check_private(place, name)
    secret = read_bytes(place, SettingError, MOST_BYTES).strip()
    if len(secret) < LEAST_BYTES:
        raise SettingError(
            f"The secret in {place} has {len(secret)} bytes, and at least {LEAST_BYTES} are needed: make one with "
            f"`openssl rand -hex 32 > {name}`."
        )
    return secret


def _check_private(place: Path, name: str) -> None:
    mode = place.stat().st_mode & 0o777
    if mode & 0o077:
        raise SettingError(f"The secret file {place} can be read by others (mode {mode:o}): run `chmod 600 {name}`.")
