"""What was measured on this very machine and is used from then on: one small JSON file for each subject and machine.

Kept in the user's cache folder, so that losing it costs a measurement and nothing else. A file that is damaged, of
another format, or of another machine counts as not there.
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
    """Where files are kept that can be made again: OPENELM_MLX_CACHE, else the system's place for an application's."""
    if environment.get("OPENELM_MLX_CACHE"):
        return Path(environment["OPENELM_MLX_CACHE"]).expanduser()
    if system == "darwin":
        return Path.home() / "Library" / "Caches" / "openelm_mlx"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "openelm_mlx"


def machine_key() -> str:
    """Names this machine and MLX's version: what was measured with one kernel says nothing of the next release's."""
    info = mx.device_info()
    name = str(info.get("device_name") or platform.processor() or platform.machine())
    try:
        release = ".".join(version("mlx").split(".")[:2])
    except PackageNotFoundError:
        release = "unknown"
    return f"{name}, {mx.default_device().type.name}, mlx {release}"


def load_stored(subject: str, machine: str | None = None) -> dict[str, Any]:
    """What `store` kept under `subject` for this machine; empty when there is nothing that can be used."""
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
    """Keep `values` (of JSON's types) under `subject` for this machine, whole or not at all; returns the file.

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
