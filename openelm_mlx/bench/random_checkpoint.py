"""Random weights in the shape of a real model, to measure memory and speed without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.layouts import FLOAT_TYPES
from ..checkpoint.safetensors_plan import MAX_FILE_BYTES, OutputTensor, plan_files
from ..checkpoint.writer import CheckpointWriter
from ..placement import parse_dtype
from ..specs import openelm_config, spec_from_config

# Numbers drawn at a time: 64 MB in float32.
SLICE_ELEMENTS = 16 * 2**20


def write_random_checkpoint(
    destination: Path,
    config: Mapping[str, Any],
    dtype: str | mx.Dtype = "float32",
    seed: int = 0,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write an OpenELM of this config with random weights, under Apple's names, in the memory of one slice of a tensor.

    Matrices are normal with the standard deviation that CoreNet starts training from, columns^-0.5; gains are around 1.
    The same seed gives the same bytes. Raises ConfigError, SettingError and DestinationError.
    """
    spec = spec_from_config(config)
    target = parse_dtype(dtype)
    type_name = next(name for name, each in FLOAT_TYPES.items() if each == target)
    tensors = [OutputTensor(name, type_name, shape) for name, shape in spec.parameter_shapes().items()]
    numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
    files = plan_files(tensors, max_file_bytes)
    with CheckpointWriter(destination, files, f"random, seed {seed}, {json.dumps(dict(config))}, {dtype}") as writer:
        for tensor in writer.remaining:
            key = mx.random.key(seed * len(tensors) + numbers[tensor.name])
            writer.write(tensor.name, _slices(tensor.shape, FLOAT_TYPES[type_name], key))
        text = json.dumps(openelm_config(spec) | {"torch_dtype": str(dtype)}, indent=2)
        writer.assemble({"config.json": text.encode()})
        writer.publish()
    return writer.destination


def _slices(shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> Iterator[memoryview]:
    columns = shape[-1] if len(shape) > 1 else 1
    step = max(1, SLICE_ELEMENTS // columns)
    for start in range(0, shape[0], step):
        key, drawn = mx.random.split(key)
        rows = min(step, shape[0] - start)
        if len(shape) == 1:
            values = 1.0 + 0.1 * mx.random.normal((rows,), key=drawn)
        else:
            values = mx.random.normal((rows, *shape[1:]), key=drawn) * columns**-0.5
        yield np.array(values.astype(dtype).view(mx.uint8), copy=False).reshape(-1).data
