"""Random gpt-oss checkpoints of any size in OpenAI's own layouts, real or sparse, to measure without a download.

The weights are scaled so that activations stay in the usual range: a matrix has the standard deviation columns^-0.5,
MXFP4 ones too (by the choice of their scales).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint.gpt_oss_layouts import openai_tensors
from ..checkpoint.released import gpt_oss_config_file
from ..checkpoint.safetensors_plan import MAX_FILE_BYTES, OutputFile, OutputTensor, plan_files, write_sparse
from ..checkpoint.writer import CheckpointWriter
from ..specs import spec_from_config

Layout = Literal["openai-hf", "openai-original"]

# Bytes drawn at a time.
SLICE_BYTES = 64 * 2**20
# Root mean square of the eight magnitudes of E2M1 (OCP Microscaling Formats 1.0, table 5), each equally likely.
_E2M1_RMS = math.sqrt((0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 8)


def write_random_gpt_oss(
    destination: Path,
    config: Mapping[str, Any],
    layout: Layout = "openai-hf",
    seed: int = 0,
    max_file_bytes: int = MAX_FILE_BYTES,
    sparse: bool = False,
) -> Path:
    """Write a random gpt-oss of this config as OpenAI lays its files out, in the memory of one slice of a tensor.

    layout: "openai-hf" (the repository's own files) or "openai-original" (its folder original/). sparse: real headers, but
    tensors that read as zeros and take no space on most file systems, even 65 GB of them. The same seed gives
    the same bytes. Raises ConfigError, SettingError and DestinationError.
    """
    spec = spec_from_config(config)
    tensors = [OutputTensor(*each) for each in openai_tensors(spec, layout)]
    files = _with_openai_names(plan_files(tensors, max_file_bytes), layout)
    others = {
        "config.json": _json(_original_config(config) if layout == "openai-original" else gpt_oss_config_file(config))
    }
    if layout == "openai-original":
        others["dtypes.json"] = _json({tensor.name: _openai_dtype(tensor) for tensor in tensors})
    if sparse:
        return write_sparse(destination, files, others)
    fingerprint = f"random gpt-oss, seed {seed}, {json.dumps(dict(config), sort_keys=True)}, {layout}"
    with CheckpointWriter(destination, files, fingerprint) as writer:
        numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
        for tensor in writer.remaining:  # in the writer's order, with unaligned tensors last
            random = np.random.Generator(np.random.SFC64([seed, numbers[tensor.name]]))
            writer.write(tensor.name, _random_bytes(tensor, random))
        writer.assemble(others)
        writer.publish()
    return writer.destination


def _random_bytes(tensor: OutputTensor, random: np.random.Generator) -> Iterator[memoryview]:
    for start in range(0, tensor.nbytes, SLICE_BYTES):
        count = min(SLICE_BYTES, tensor.nbytes - start)
        if tensor.name.endswith("blocks"):
            yield random.integers(0, 2**64, -(-count // 8), np.uint64).view(np.uint8)[:count].data
        elif tensor.name.endswith("scales"):
            # Two neighbouring powers of two around the wanted size; 127 is 2^0 (E8M0).
            wanted = 127 + math.log2((tensor.shape[-1] * 32) ** -0.5 / _E2M1_RMS)
            yield random.integers(math.floor(wanted), math.floor(wanted) + 2, count, np.uint8).data
        else:
            yield _bfloat16(_values(tensor, count // 2, random)).view(np.uint8).data


def _values(tensor: OutputTensor, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` random float32 numbers on the scale of such a tensor."""
    if tensor.name.endswith(("norm.weight", "norm.scale")):
        return 1 + 0.1 * random.standard_normal(count, np.float32)
    if len(tensor.shape) == 2 and not tensor.name.endswith("bias"):
        # Uniform, which is drawn several times faster than normal; of the same standard deviation.
        return (random.random(count, np.float32) - 0.5) * np.float32((12 / tensor.shape[-1]) ** 0.5)
    return 0.1 * random.standard_normal(count, np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers: bfloat16, rounded towards zero."""
    return np.ascontiguousarray(values.view(np.uint16)[1::2])


def _with_openai_names(files: tuple[OutputFile, ...], layout: Layout) -> tuple[OutputFile, ...]:
    """OpenAI counts its shards from 0, and the second number is the last one; original/ has two dashes and counts from 1."""
    if len(files) == 1:
        return files
    names = [
        f"model--{number:05d}-of-{len(files):05d}.safetensors"
        if layout == "openai-original"
        else f"model-{number - 1:05d}-of-{len(files) - 1:05d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    return tuple(dataclasses.replace(file, name=name) for file, name in zip(files, names, strict=True))


def _original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    spec = spec_from_config(config)
    layer, yarn = spec.layers[0], spec.yarn
    assert yarn is not None
    return {
        "num_hidden_layers": len(spec.layers), "num_experts": layer.num_experts,
        "experts_per_token": layer.experts_per_token, "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
        "intermediate_size": layer.intermediate_size, "swiglu_limit": spec.swiglu_limit, "head_dim": layer.head_dim,
        "num_attention_heads": layer.num_heads, "num_key_value_heads": layer.num_kv_heads,
        "sliding_window": layer.window, "initial_context_length": yarn.original_context_length,
        "rope_theta": spec.rope_theta, "rope_scaling_factor": yarn.factor, "rope_ntk_alpha": yarn.beta_slow,
        "rope_ntk_beta": yarn.beta_fast,
    }  # fmt: skip


def _openai_dtype(tensor: OutputTensor) -> str:
    if tensor.name.endswith("blocks"):
        return "FP4"
    return "UE8" if tensor.name.endswith("scales") else "BF16"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
