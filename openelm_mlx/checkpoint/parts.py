"""A part of a checkpoint: the parameters of a few successive layers, under the names that a model of only them has."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from ..files import open_regular, unreadable
from .layouts import Contents, Parameter
from .reader import Checkpoint

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..*)$")
# Bytes of each tensor that are part of a checkpoint's identity: two trainings of one shape differ in them.
SAMPLE_BYTES = 16


def layer_of(name: str) -> int | None:
    """The layer that a parameter or module belongs to; None where it belongs to none."""
    found = _LAYER.match(name)
    return None if found is None else int(found[2])


def part_name(name: str, start: int, stop: int) -> str | None:
    """What a parameter or module is called in the model of layers start ... stop - 1; None where it is not part of it.

    The first part has everything that belongs to no layer.
    """
    found = _LAYER.match(name)
    if found is None:
        return name if start == 0 else None
    number = int(found[2])
    return f"{found[1]}{number - start}{found[3]}" if start <= number < stop else None


def part_of(contents: Contents, start: int, stop: int) -> Contents:
    """The contents of the model with layers start ... stop - 1 alone; its tensors are still the whole checkpoint's."""
    parameters: dict[str, Parameter] = {}
    for name, parameter in contents.parameters.items():
        new = part_name(name, start, stop)
        if new is not None:
            parameters[new] = replace(parameter, name=new)
    quantized = {
        new: each for module, each in contents.quantized.items() if (new := part_name(module, start, stop)) is not None
    }
    return replace(contents, spec=contents.spec.part(start, stop), parameters=parameters, quantized=quantized)


def identity(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """A hash that two copies of the same checkpoint share, and no others: of config, headers, and some bytes of each tensor.

    File names do not count. Raises CheckpointError where a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for file in checkpoint.files:
        entries = sorted(
            (each for each in checkpoint.entries.values() if each.file == file), key=lambda each: each.name
        )
        try:
            with open_regular(file, CheckpointError) as stream:
                for each in entries:
                    digest.update(repr((each.name, each.dtype, each.shape, each.nbytes)).encode())
                    middle = each.start + max(0, each.nbytes // 2 - SAMPLE_BYTES // 2)
                    digest.update(os.pread(stream.fileno(), min(SAMPLE_BYTES, each.nbytes), middle))
        except OSError as error:
            raise unreadable(file, error, CheckpointError) from error
    return digest.hexdigest()
