"""Adapters on disk: which format a folder or file has, and reading and writing each of them.

    format    written by                files
    peft      Hugging Face PEFT, TRL,   adapter_config.json ("peft_type"), adapter_model.safetensors
              this library
    mlx-lm    mlx-lm's tuner            adapter_config.json ("fine_tune_type"), adapters.safetensors
    corenet   Apple's CoreNet           one .pt (or .safetensors) with base and adapters, and the YAML of the run

Whatever the format, an adapter is `models.low_rank.Adapter`: pairs of factors by the name of their matrix. It is checked
against the model it is to be used with: names, shapes, finite numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, ConfigError, SettingError
from ..files import expanded, read_object, shown
from ..models.adapters import check_belongs
from ..models.low_rank import Adapter
from ..specs import ModelSpec
from .adapter_mlx_lm import mlx_lm_files, read_mlx_lm
from .adapter_peft import peft_files, read_peft
from .adapter_tensors import open_tensors
from .destination import write_folder

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_LM_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
FORMATS = ("peft", "mlx-lm", "corenet")


def adapter_format(path: str | Path) -> tuple[str, Path]:
    """The format of an adapter, and its folder, or CoreNet's file or folder. Raises CheckpointError where there is none."""
    place = expanded(os.fspath(path), CheckpointError)
    if place.name in (PEFT_WEIGHTS, MLX_LM_WEIGHTS, CONFIG):
        place = place.parent
    if not os.path.lexists(place):
        raise CheckpointError(f"There is no adapter at {place}: check the path.")
    if place.is_file() and place.suffix in (".pt", ".pth", ".safetensors"):
        return "corenet", place
    if place.is_dir() and os.path.lexists(place / CONFIG):
        config = read_object(place / CONFIG, CheckpointError)
        if "peft_type" in config:
            return "peft", place
        if "fine_tune_type" in config or os.path.lexists(place / MLX_LM_WEIGHTS):
            return "mlx-lm", place
        raise CheckpointError(
            f"{place / CONFIG} is no adapter's config of PEFT or mlx-lm: it has neither peft_type nor fine_tune_type."
        )
    if place.is_dir() and _holds_corenet(place):
        return "corenet", place
    raise CheckpointError(
        f"{place} holds no adapter: there is no {CONFIG} in it (PEFT's or mlx-lm's), and no CoreNet checkpoint with adapters."
    )


def read_adapter(path: str | Path, spec: ModelSpec) -> Adapter:
    """The adapter at `path`, for a model of this shape; its arrays are evaluated.

    Raises CheckpointError or ConfigError where it is damaged, of a kind that is not read, or of another model.
    """
    found, place = adapter_format(path)
    if found == "corenet":
        from .adapter_corenet import read_corenet

        adapter = read_corenet(place, spec)
    else:
        config = read_object(place / CONFIG, CheckpointError)
        weights = place / (PEFT_WEIGHTS if found == "peft" else MLX_LM_WEIGHTS)
        adapter = (read_peft if found == "peft" else read_mlx_lm)(config, open_tensors(weights), spec)
    check_belongs(adapter, spec)
    _refuse_not_finite(adapter, place)
    return adapter


def write_adapter(
    folder: str | Path,
    adapter: Adapter,
    spec: ModelSpec,
    format: str = "peft",
    others: Mapping[str, bytes] | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Write an adapter into a new folder, which appears complete; returns it.

    format: "peft" or "mlx-lm". others: name -> content of further files (a README). replace: the files of an existing folder
    give way one by one, for a run that saves again what it wrote itself.

    Raises DestinationError where the folder exists or cannot be written, SettingError for what a format cannot hold.
    """
    if format not in ("peft", "mlx-lm"):
        raise SettingError(f'format is {shown(format)}: adapters are written as "peft" or "mlx-lm".')
    if format == "peft":
        (config, tensors), name = peft_files(adapter, spec), PEFT_WEIGHTS
    else:
        (config, tensors), name = mlx_lm_files(adapter, spec), MLX_LM_WEIGHTS
    metadata = {
        "format": "pt" if format == "peft" else "mlx",
        **{f"base_{key}": each for key, each in adapter.base.items()},
    }
    return write_folder(folder, name, tensors, {**(others or {}), CONFIG: config}, metadata, replace=replace)


def _holds_corenet(folder: Path) -> bool:
    from .reader import open_checkpoint

    try:
        return any(".base_layer." in name for name in open_checkpoint(folder).entries)
    except (CheckpointError, ConfigError):
        return False


def _refuse_not_finite(adapter: Adapter, place: Path) -> None:
    arrays = {
        name: [pair.a, pair.b, *([] if pair.magnitude is None else [pair.magnitude])]
        for name, pair in adapter.pairs.items()
    }
    try:
        fine = mx.stack([mx.all(mx.isfinite(each)) for of_one in arrays.values() for each in of_one])
        if bool(mx.all(fine).item()):
            return
    except RuntimeError as error:  # MLX reads the file here
        raise CheckpointError(f"{place} could not be read to the end ({error}): copy it again.") from error
    bad = next(name for name, each in arrays.items() if not all(mx.all(mx.isfinite(one)).item() for one in each))
    raise CheckpointError(
        f"The adapter at {place} has numbers that are not finite, in {bad}: its training went wrong; take an earlier state."
    )
