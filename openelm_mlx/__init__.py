"""Apple OpenELM and OpenAI gpt-oss on Apple MLX: exact, in the memory the machine has, as fast as it allows.

import openelm_mlx as om

model, tokenizer = om.load("demo-openelm")
print(om.generate(model, tokenizer, "What is a banjo?"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import openelm_mlx` costs a millisecond and touches no device.
_PUBLIC = {
    "load": "loading",
    "generate": "generate",
    "stream_generate": "generate",
    "Chunk": "generate",
    "Statistics": "generate",
    "SamplingParams": "decoding.sampling",
    "PromptLookup": "decoding.drafts",
    "DraftModel": "decoding.drafts",
    "PrefixCache": "decoding.prefix_cache",
    "convert": "conversion",
    "plan": "planning",
    "Chat": "agents.chat",
    "UserError": "errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .agents.chat import Chat as Chat
    from .conversion import convert as convert
    from .decoding.drafts import DraftModel as DraftModel
    from .decoding.drafts import PromptLookup as PromptLookup
    from .decoding.prefix_cache import PrefixCache as PrefixCache
    from .decoding.sampling import SamplingParams as SamplingParams
    from .errors import UserError as UserError
    from .generate import Chunk as Chunk
    from .generate import Statistics as Statistics
    from .generate import generate as generate
    from .generate import stream_generate as stream_generate
    from .loading import load as load
    from .planning import plan as plan


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    # The module `generate` is callable: the one object is both what `om.generate` and `import openelm_mlx.generate` name.
    value = module if name == "generate" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
