"""Stored measurements of this machine: one small JSON file for each subject and machine.

They are in the user's cache folder, since they can be measured again. A file that is damaged, in another format, or of
another machine is ignored.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import DestinationError
from ..files import read_json

FORMAT = 1


def cache_folder(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> Path:
    """The folder for files that can be made again: OPENELM_MLX_CACHE, else the system's cache folder for applications."""
    if environment.get("OPENELM_MLX_CACHE"):
        return Path(environment["OPENELM_MLX_CACHE"]).expanduser()
    if system == "darwin":
        return Path.home() / "Library" / "Caches" / "openelm_mlx"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "openelm_mlx"


def machine_key() -> str:
    """This machine and MLX's version: measurements of one release's kernels do not apply to the next."""
    info = mx.device_info()
    name = str(info.get("device_name") or platform.processor() or platform.machine())
    try:
        release = ".".join(version("mlx").split(".")[:2])
    except PackageNotFoundError:
        release = "unknown"
    return f"{name}, {mx.default_device().type.name}, mlx {release}"


def load_stored(subject: str, machine: str | None = None) -> dict[str, Any]:
    """The values that `store` kept under `subject` for this machine; empty if there are none that can be used."""
    machine = machine_key() if machine is None else machine
    try:
        content = read_json(_file(subject, machine), DestinationError)
    except DestinationError:
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("machine") != machine:
        return {}
    values = content.get("values")
    return values if isinstance(values, dict) else {}


def store(subject: str, values: Mapping[str, Any], machine: str | None = None) -> Path:
    """Store `values` (JSON types) under `subject` for this machine, completely or not at all; return the file.

    Raises DestinationError when the folder cannot be written.
    """
    machine = machine_key() if machine is None else machine
    file = _file(subject, machine)
    text = json.dumps({"format": FORMAT, "machine": machine, "values": dict(values)}, indent=2)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise DestinationError(
            f"{file} cannot be written ({error.strerror}): make its folder writable, or set OPENELM_MLX_CACHE to another."
        ) from error
    return file


def _file(subject: str, machine: str) -> Path:
    return cache_folder() / f"{subject}-{re.sub(r'[^a-z0-9.]+', '-', machine.lower()).strip('-')}.json"
