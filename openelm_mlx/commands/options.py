"""Options that several commands have: which model, and how tokens are chosen."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import SettingError
from ..memory.presets import HELP as PRESET_HELP
from ..memory.presets import PRESETS, preset_bits

DEFAULT_MODEL = "demo-openelm"


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Which model, and how it is loaded."""
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="SOURCE",
        help="demo-openelm (the default: a pocket dictionary that comes with the package), a folder, a weight file, or a "
        "Hugging Face repository as owner/name",
    )
    add_loading_arguments(group)
    group.add_argument(
        "--wire",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="wire the model's memory, so that macOS never pages it out (default: only if it needs most of the GPU's memory)",
    )
    group.add_argument(
        "--chat-template", metavar="NAME", help="openelm-instruct or plain (default: as stored, or by the name)"
    )


def add_loading_arguments(group: argparse._ArgumentGroup, whose: str = "") -> None:
    """How a model is loaded. whose: said of what makes another form of it."""
    group.add_argument("--revision", help="branch, tag or commit of the repository")
    group.add_argument(
        "--adapter", metavar="PATH",
        help="a LoRA or DoRA adapter beside the weights: a folder of PEFT's or mlx-lm's, CoreNet's file, or a "
        f"repository{whose}",
    )  # fmt: skip
    group.add_argument("--tokenizer", metavar="SOURCE", help="a tokenizer's file, folder or repository")
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type (default: as stored)"
    )
    add_preset_argument(group)
    group.add_argument(
        "--dense-bits",
        type=int,
        choices=[8, 6, 5, 4],
        help=f"instead of a preset: quantize matrices that are not quantized yet to N bits as they are read{whose}",
    )
    group.add_argument(
        "--expert-slots",
        type=int,
        metavar="N",
        help="keep N of each layer's experts in memory and read the others from disk when they are chosen",
    )
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory limit, for example 8GB; experts that do not fit stay on disk (default: what the machine has)",
    )
    group.add_argument("--context-length", type=int, metavar="N", help="use at most N tokens of the model's context")


def add_kv_bits_argument(group: argparse._ArgumentGroup, whose: str = "") -> None:
    """How exact keys and values are."""
    group.add_argument(
        "--kv-bits",
        type=int,
        choices=[8, 16],
        help=f"8: keys and values in half the memory (default: 16, or the plan's){whose}",
    )


def add_worker_arguments(group: argparse._ActionsContainer) -> None:
    """Other machines that have some of the layers."""
    group.add_argument(
        "--workers",
        metavar="HOST:PORT,...",
        help="run the model over this machine and these, where `openelm_mlx serve-layers` runs; or a file with one a line",
    )
    group.add_argument(
        "--secret-file", metavar="FILE", help="the secret that all of them have a copy of, which nobody else can read"
    )
    group.add_argument(
        "--layers",
        metavar="N,N,...",
        help="how many layers each machine gets, this one first (default: the fastest is filled first)",
    )
    group.add_argument(
        "--worker-timeout",
        type=float,
        metavar="SECONDS",
        help="give up a worker that is silent for so long (default: 10; with --parallel: 60)",
    )


def worker_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `openelm_mlx.load` for those options, where any is given."""
    names = ("workers", "secret_file", "layers", "worker_timeout")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def add_overwrite(group: argparse._ActionsContainer) -> None:
    """For commands that write a file which the user names."""
    group.add_argument("--overwrite", action="store_true", help="replace an existing file, whatever wrote it")


def add_preset_argument(group: argparse._ActionsContainer) -> None:
    """How much quality is traded for memory and speed."""
    explained = PRESET_HELP.replace("%", "%%")  # argparse formats help with %
    group.add_argument("--preset", choices=list(PRESETS), help=f"{explained} (default: exact)")


def bits_asked_for(args: argparse.Namespace, option: str = "--dense-bits") -> Any:
    """The bits from --preset or from the option for bits. Raises SettingError for both."""
    return preset_bits(args.preset, getattr(args, option[2:].replace("-", "_")), ("--preset {}", option))


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `openelm_mlx.load` for those options."""
    from .progress import byte_bar

    return {
        "context_length": args.context_length,
        "dtype": args.dtype,
        "dense_bits": bits_asked_for(args),
        "kv_bits": args.kv_bits,  # so that the plan counts them
        "expert_slots": args.expert_slots,
        "memory_limit": args.memory_limit,
        "wire": args.wire,
        "tokenizer": args.tokenizer,
        "chat_template": args.chat_template,
        "revision": args.revision,
        "adapter": args.adapter,
        "progress": None if args.quiet else byte_bar(args.model),
        **worker_options(args),
        "parallel": getattr(args, "parallel", None),
    }


def add_sampling_arguments(group: argparse._ArgumentGroup, max_tokens: str) -> None:
    """How tokens are chosen, and how many; max_tokens: the default limit, in words."""
    group.add_argument("--max-tokens", type=int, metavar="N", help=f"stop after N tokens (default: {max_tokens})")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest token"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens (0: all)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest with total probability P"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest's probability"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="over prompt and answer (1: off)"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="once for each token in the answer"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="for each occurrence in the answer"
    )
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="TOKEN=X", help="add X to a token's logit (repeatable)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingParams` for those options."""
    return {
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty, "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty, "logit_bias": parse_logit_bias(args.logit_bias), "seed": args.seed,
    }  # fmt: skip


def parse_logit_bias(values: list[str]) -> dict[int, float]:
    """TOKEN=X pairs as a dictionary."""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise SettingError(
                f"--logit-bias {value!r} is not of the form TOKEN=NUMBER, for example 1234=-5."
            ) from None
    return biases
