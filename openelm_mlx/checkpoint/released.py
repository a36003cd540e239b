"""The shapes that Apple and OpenAI released, as configs and as files with headers but without data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..files import shown
from ..specs import gpt_oss_config, openelm_config, spec_from_config
from .gpt_oss_layouts import openai_tensors
from .safetensors_plan import MAX_FILE_BYTES, OutputTensor, plan_files, write_sparse

# Layers and experts.
GPT_OSS_SIZES = {"20b": (24, 32), "120b": (36, 128)}


def released_openelm_config(size: str) -> dict[str, Any]:
    """The config of a released OpenELM size: "270M", "450M", "1.1B" or "3B"."""
    name = f"OpenELM-{size.replace('.', '_')}"
    return {"model_name": name, "vocab_size": 32000, "max_context_length": 2048}


def released_gpt_oss_config(size: str) -> dict[str, Any]:
    """The config of a released size, "20b" or "120b", as its config.json has it. Raises SettingError for another."""
    if size not in GPT_OSS_SIZES:
        raise SettingError(f"size is {shown(size)}: gpt-oss was released as {' and '.join(GPT_OSS_SIZES)}.")
    num_layers, num_experts = GPT_OSS_SIZES[size]
    return {
        "model_type": "gpt_oss", "num_hidden_layers": num_layers, "num_local_experts": num_experts,
        "num_experts_per_tok": 4, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 150000, "swiglu_limit": 7.0,
        "eos_token_id": 200002, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
    }  # fmt: skip


def gpt_oss_config_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of OpenAI's repositories: with the packing of the experts."""
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    spelled = gpt_oss_config(spec_from_config(config))
    return {**spelled, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}


def write_released_headers(destination: Path, repo: str) -> bool:
    """Write files with the headers of a released repository and no data, enough for a plan. False for other names."""
    openelm = re.fullmatch(r"apple/OpenELM-(270M|450M|1_1B|3B)(-Instruct)?", repo, re.IGNORECASE)
    gpt_oss = re.fullmatch(r"openai/gpt-oss-(20b|120b)", repo, re.IGNORECASE)
    if openelm:
        spec = spec_from_config(released_openelm_config(openelm[1].upper().replace("_", ".")))
        tensors = [OutputTensor(name, "BF16", shape) for name, shape in spec.parameter_shapes().items()]
        config = openelm_config(spec) | {"torch_dtype": "bfloat16"}
    elif gpt_oss:
        released = released_gpt_oss_config(gpt_oss[1].lower())
        tensors = [OutputTensor(*each) for each in openai_tensors(spec_from_config(released), "openai-hf")]
        config = gpt_oss_config_file(released)
    else:
        return False
    write_sparse(destination, plan_files(tensors, MAX_FILE_BYTES), {"config.json": json.dumps(config).encode()})
    return True
