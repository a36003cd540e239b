"""GGUF's tensor names for both families, and the corresponding names in MLX checkpoints.

The MLX names are those of split modules (apart.py): q, k, v and gate, up in gpt-oss, gate and up in OpenELM. gpt-oss's
sinks, a parameter without a module of its own, get the suffix .weight in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping

ARCHITECTURES = {"openelm": "openelm", "gpt_oss": "gpt-oss"}
FAMILIES = {architecture: family for family, architecture in ARCHITECTURES.items()}

# Path of a split module -> GGUF's name without .weight or .bias.
_GPT_OSS = {
    "model.embed_tokens": "token_embd",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.mlp.router": "blk.{i}.ffn_gate_inp",
    "model.layers.{i}.mlp.experts.gate_proj": "blk.{i}.ffn_gate_exps",
    "model.layers.{i}.mlp.experts.up_proj": "blk.{i}.ffn_up_exps",
    "model.layers.{i}.mlp.experts.down_proj": "blk.{i}.ffn_down_exps",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OPENELM = {
    "transformer.token_embeddings": "token_embd",
    "transformer.layers.{i}.attn_norm": "blk.{i}.attn_norm",
    "transformer.layers.{i}.attn.qkv_proj": "blk.{i}.attn_qkv",
    "transformer.layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "transformer.layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "transformer.layers.{i}.attn.out_proj": "blk.{i}.attn_output",
    "transformer.layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "transformer.layers.{i}.ffn.gate": "blk.{i}.ffn_gate",
    "transformer.layers.{i}.ffn.up": "blk.{i}.ffn_up",
    "transformer.layers.{i}.ffn.proj_2": "blk.{i}.ffn_down",
    "transformer.norm": "output_norm",
}
_NAMES: Mapping[str, Mapping[str, str]] = {"openelm": _OPENELM, "gpt_oss": _GPT_OSS}
_SINKS = ("model.layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks.weight")


def gguf_name(family: str, name: str) -> str:
    """GGUF's name of a parameter of a split module: "blk.0.attn_q.bias"."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    general = name.replace(f".{number}.", ".{i}.", 1) if number else name
    if general == _SINKS[0]:
        return _SINKS[1].format(i=number)
    module, _, part = general.rpartition(".")
    return f"{_NAMES[family][module]}.{part}".format(i=number)


def mlx_name(family: str, name: str) -> str | None:
    """The MLX name of a GGUF tensor; None if the family has no such tensor."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    general = name.replace(f".{number}.", ".{i}.", 1) if number else name
    if family == "gpt_oss" and general == _SINKS[1]:
        return _SINKS[0].format(i=number)
    stem, _, part = general.rpartition(".")
    module = next((path for path, each in _NAMES[family].items() if each == stem), None)
    if module is None or part not in ("weight", "bias"):
        return None
    return f"{module}.{part}".format(i=number)
