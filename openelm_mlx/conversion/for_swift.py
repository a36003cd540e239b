"""Which models mlx-swift-lm, Apple's Swift package for apps, can run.

According to its sources (Libraries/MLXLLM/Models/OpenELM.swift and GPTOSS.swift) it reads only some fields of a config.
A model that differs in the others would fail to load, or compute wrong numbers without an error, so it is refused.
"""

from __future__ import annotations

import math

from ..errors import ConversionError
from ..specs import ModelSpec, apple_shape

# Constants in GPTOSS.swift.
_SWIGLU = (7.0, 1.702)


def check_swift(spec: ModelSpec) -> None:
    """Raise ConversionError if mlx-swift-lm cannot load the model, or would compute it wrongly."""
    reason = _openelm_reason(spec) if spec.family == "openelm" else _gpt_oss_reason(spec)
    if reason is not None:
        raise ConversionError(
            f'mlx-swift-lm cannot run this model: {reason}. Leave out target="swift", or take a GGUF file to the phone '
            "instead: name a destination that ends in .gguf."
        )


def _openelm_reason(spec: ModelSpec) -> str | None:
    if apple_shape(spec) is None:
        return "it computes heads and widths by Apple's rule alone, whatever a config says, and this model has others"
    if not spec.tied_head:
        return "it builds an untied output head with the wrong width"
    if spec.rope_theta != 10_000:
        return f"its rotary embedding always has theta 10,000, and this model's is {spec.rope_theta:,.0f}"
    return None


def _gpt_oss_reason(spec: ModelSpec) -> str | None:
    yarn = spec.yarn
    if yarn is None or not math.isclose(yarn.concentration, 0.1 * math.log(yarn.factor) + 1.0, rel_tol=1e-6):
        return "its rotary embedding is always YaRN with the usual concentration, and this model has another one"
    if spec.tied_head:
        return "it needs an untied output head, and this model's head is its embedding"
    if (spec.swiglu_limit, spec.swiglu_alpha) != _SWIGLU:
        return "its activation always has limit 7 and slope 1.702, and this model has others"
    if all(layer.window is None for layer in spec.layers):
        return "it needs a sliding window, and no layer of this model has one"
    return None
