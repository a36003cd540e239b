"""A model with all of its weights trained, as a folder that appears complete: Apple's layout, this library's of gpt-oss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten

from ..checkpoint.destination import write_folder
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
    files: dict[str, bytes | Path] = {
        **others,
        **{file.name: file for file in base.tokenizer.files},
        CONFIG: as_json(config),
    }
    return write_folder(output, WEIGHTS, weights, files, {"format": "mlx"})


def as_json(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, default=dict) + "\n").encode()
