"""Apple OpenELM and OpenAI gpt-oss on Apple MLX: exact, in the memory the machine has, as fast as it allows.

import openelm_mlx as om

model, tokenizer = om.load("demo-openelm")
print(om.generate(model, tokenizer, "What is a banjo?"))
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # true for type checkers; `typing` itself would take seven times as long to import as the rest

__version__ = "0.1.0"

# Apple's own Python is 3.9. pip refuses it by itself; a clone of the repository would fail somewhere in the middle.
if sys.version_info < (3, 10):  # noqa: UP036
    _told = (
        f"openelm_mlx needs Python 3.10 or later, and this is Python {sys.version_info[0]}.{sys.version_info[1]} "
        f"({sys.executable}): install a newer one, for example with `brew install python`, and make a new virtual "
        "environment with it."
    )
    if sys.argv[:1] == ["-m"]:  # python -m openelm_mlx: the command line prints a sentence, never a traceback
        sys.stderr.write("openelm_mlx: " + _told + "\n")
        raise SystemExit(2)
    raise ImportError(_told)

# Public name -> module. Loaded on first use, so that `import openelm_mlx` costs a millisecond and touches no device.
_PUBLIC = {
    "load": "loading",
    "add_adapter": "adapters",
    "remove_adapter": "adapters",
    "use_adapter": "adapters",
    "adapter_names": "adapters",
    "convert_adapter": "adapters",
    "generate": "generate",
    "stream_generate": "generate",
    "Engine": "engine.many",
    "Chunk": "engine.sequence",
    "Statistics": "engine.statistics",
    "SamplingParams": "decoding.sampling",
    "PromptLookup": "decoding.drafts",
    "DraftModel": "decoding.drafts",
    "PrefixCache": "decoding.prefix_cache",
    "convert": "conversion",
    "export": "exporting",
    "plan": "planning",
    "score": "evaluation",
    "perplexity": "evaluation",
    "compare": "evaluation",
    "finetune": "training.finetuning",
    "train": "training.pretraining",
    "Chat": "conversation",
    "UserError": "errors",
    "EngineFullError": "errors",
    "NoAnswerWarning": "errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from typing import Any

    from .adapters import adapter_names as adapter_names
    from .adapters import add_adapter as add_adapter
    from .adapters import convert_adapter as convert_adapter
    from .adapters import remove_adapter as remove_adapter
    from .adapters import use_adapter as use_adapter
    from .conversation.session import Chat as Chat
    from .conversion import convert as convert
    from .decoding.drafts import DraftModel as DraftModel
    from .decoding.drafts import PromptLookup as PromptLookup
    from .decoding.prefix_cache import PrefixCache as PrefixCache
    from .decoding.sampling import SamplingParams as SamplingParams
    from .engine.many import Engine as Engine
    from .engine.sequence import Chunk as Chunk
    from .engine.statistics import Statistics as Statistics
    from .errors import EngineFullError as EngineFullError
    from .errors import NoAnswerWarning as NoAnswerWarning
    from .errors import UserError as UserError
    from .evaluation import compare as compare
    from .evaluation import perplexity as perplexity
    from .evaluation import score as score
    from .exporting import export as export
    from .generate import generate as generate
    from .generate import stream_generate as stream_generate
    from .loading import load as load
    from .planning import plan as plan
    from .training.finetuning import finetune as finetune
    from .training.pretraining import train as train


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "mlx":
            importlib.import_module(
                ".platforms", __name__
            ).require_mlx()  # raises PlatformError, which says what is wrong with this computer
        raise
    # The module `generate` is callable, so `om.generate` and `import openelm_mlx.generate` are the same object.
    value = module if name == "generate" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
