"""Arrays in, arrays out: the models and what they share. No disk, no text, no `mx.eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..specs import ModelSpec

if TYPE_CHECKING:
    from .gpt_oss import GptOss
    from .openelm import OpenELM
    from .precision import KernelChoices

    Model = OpenELM | GptOss


def build_model(spec: ModelSpec, choices: KernelChoices | None = None) -> Model:
    """The module for `spec`, its parameters not yet loaded (and, MLX being lazy, not yet allocated).

    choices: which of equivalent kernels it uses; None: the backend's defaults.
    """
    # One line for each family; its file is imported only when needed.
    if spec.family == "openelm":
        from .openelm import OpenELM

        return OpenELM(spec, choices)
    if spec.family == "gpt_oss":
        from .gpt_oss import GptOss

        return GptOss(spec, choices)
    raise AssertionError(f"no model for family {spec.family!r}")
