"""A model with all of its weights trained, as a folder with this library's names (Apple's, of OpenELM), which appears complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.destination import check_destination, check_free_space, folder_beside, put_in_place, save_tensors
from ..errors import DestinationError
from ..files import expanded
from ..specs import gpt_oss_config, openelm_config
from .base import Base

if TYPE_CHECKING:
    from ..models import Model

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_model(output: str | os.PathLike[str], model: Model, base: Base, others: Mapping[str, bytes]) -> Path:
    """Write the model, its tokenizer and `others` (name -> content) to a new folder. Raises DestinationError."""
    weights = {
        name: array if base.spec.keeps_float32(name) else array.astype(base.dtype)
        for name, array in tree_flatten(model.parameters())
    }
    if base.spec.family == "openelm":
        config = openelm_config(base.spec) | {"openelm_mlx": {"chat_template": base.template.template}}
    else:
        config = gpt_oss_config(base.spec)
    files = {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), **others}
    copied = {file.name: file for file in base.tokenizer.files}
    return write_folder(output, weights, files, copied)


def write_folder(
    output: str | os.PathLike[str],
    weights: Mapping[str, mx.array],
    files: Mapping[str, bytes],
    copied: Mapping[str, Path],
) -> Path:
    """A folder of weights, of contents by name and of copied files; renamed into its place when it is whole."""
    destination = Path(os.path.realpath(expanded(output, DestinationError)))
    check_destination(destination)
    with folder_beside(destination) as beside:
        check_free_space(destination, sum(array.nbytes for array in weights.values()))
        save_tensors(beside / WEIGHTS, weights, {"format": "mlx"})
        for name, content in files.items():
            (beside / name).write_bytes(content)
        for name, file in copied.items():
            shutil.copyfile(file, beside / name)
        put_in_place(beside, destination)
    return destination
