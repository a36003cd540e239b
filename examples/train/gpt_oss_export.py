"""Write a trained demo-gpt-oss as OpenAI's Hugging Face repositories are laid out: MXFP4 experts, bfloat16, Harmony."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from gpt_oss_model import TrainingGptOss, is_packed, packed
from gpt_oss_prepare import SPECIAL_TOKENS, VOCAB_SIZE
from mlx.utils import tree_flatten


def special_token(name: str) -> int:
    """The number of one of Harmony's special tokens in the demo's vocabulary."""
    return VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(name)


RETURN, END_OF_TEXT, CALL = special_token("<|return|>"), special_token("<|endoftext|>"), special_token("<|call|>")

# The keys are those of openai/gpt-oss-20b's config.json, in its order; so are the values but for the sizes.
NUM_LAYERS = 6
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": RETURN,
    "experts_per_token": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(NUM_LAYERS)],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": END_OF_TEXT,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG = {
    "bos_token_id": special_token("<|startoftext|>"),
    "do_sample": True,
    "eos_token_id": [RETURN, END_OF_TEXT, CALL],
    "pad_token_id": END_OF_TEXT,
    "transformers_version": "4.55.0.dev0",
}
TOKENIZER_CONFIG = {
    "added_tokens_decoder": {
        str(special_token(name)): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name in SPECIAL_TOKENS
    },
    "bos_token": "<|startoftext|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|return|>",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def write_demo(model: TrainingGptOss, tokenizer_file: Path, destination: Path, config: dict[str, Any] = CONFIG) -> None:
    """Write `model` to the folder `destination`, weights, configs and tokenizer; licences are not written."""
    destination.mkdir(parents=True, exist_ok=True)
    weights = openai_tensors(model)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, {"format": "pt"})
    _write_json(destination / "config.json", config)
    _write_json(destination / "generation_config.json", GENERATION_CONFIG)
    _write_json(destination / "tokenizer_config.json", TOKENIZER_CONFIG)
    shutil.copyfile(tokenizer_file, destination / "tokenizer.json")


def openai_tensors(model: TrainingGptOss) -> dict[str, mx.array]:
    """The model's parameters under the names of OpenAI's Hugging Face files, in their types."""
    tensors: dict[str, mx.array] = {}
    layer = model.spec.layers[0]
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    for name, parameter in tree_flatten(model.parameters()):
        module, _, part = name.rpartition(".")
        if is_packed(name):
            words, scales = packed(parameter)
            # One group is four words, the same 16 bytes that OpenAI calls a block.
            tensors[f"{module}_blocks"] = words.view(mx.uint8).reshape(*scales.shape, 16)
            tensors[f"{module}_scales"] = scales
        elif ".experts." in name:
            tensors[f"{module}_{part}"] = parameter.astype(mx.bfloat16)
        elif module.endswith("qkv_proj"):
            rows = [sum(heads[:i]) * layer.head_dim for i in (1, 2)]
            for letter, piece in zip("qkv", mx.split(parameter, rows, axis=0), strict=True):
                tensors[f"{module.removesuffix('qkv_proj')}{letter}_proj.{part}"] = piece.astype(mx.bfloat16)
        else:
            tensors[name] = parameter.astype(mx.bfloat16)
    return tensors


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
