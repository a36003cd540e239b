"""Write a trained demo as the package ships it: 8-bit weights in Apple's Hugging Face layout, tokenizer, configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from openelm_mlx.models.openelm import OpenELM
from openelm_mlx.specs import ModelSpec, openelm_config
from openelm_mlx.text.chat import OPENELM_INSTRUCT

QUANTIZATION = {"group_size": 128, "bits": 8}

# What transformers and mlx-lm need to make the same prompts; the library reads the template's name in config.json. The
# space after BOS is the one that Llama's tokenizer puts before a text.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": "{{ bos_token + ' ' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
}


def write_demo(model: OpenELM, spec: ModelSpec, tokenizer_file: Path, destination: Path) -> OpenELM:
    """Quantize a copy of `model` and write it to the folder `destination`; the copy comes back.

    Scales and biases stay float32: MLX's CPU kernels are some twenty times slower in half precision, and the first
    command has to be quick on any machine.
    """
    quantized = OpenELM(spec)
    quantized.update(model.parameters())
    nn.quantize(quantized, **QUANTIZATION)
    destination.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(destination / "model.safetensors"), dict(tree_flatten(quantized.parameters())), {"format": "mlx"}
    )
    config = openelm_config(spec) | {
        "quantization": QUANTIZATION,
        "quantization_config": QUANTIZATION,
        "openelm_mlx": {"chat_template": OPENELM_INSTRUCT},
    }
    _write_json(destination / "config.json", config)
    _write_json(destination / "tokenizer_config.json", TOKENIZER_CONFIG)
    shutil.copyfile(tokenizer_file, destination / "tokenizer.model")
    return quantized


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
