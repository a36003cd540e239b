"""`python -m openelm_mlx export`: a model as a graph that C++ runs, with the program that does."""

from __future__ import annotations

import argparse
import shlex

from . import INTERRUPTED
from .options import add_preset_argument, bits_asked_for
from .output import report, report_json, say

HELP = "export a model as a graph for C++ programs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", help="a folder, a weight file, or a Hugging Face repository as owner/name")
    parser.add_argument("destination", help="the folder to write, which must not exist yet")
    parser.add_argument(
        "--places",
        default="512,2048",
        metavar="N,N",
        help="how long prompt and answer together may be, a step for each (default: 512,2048)",
    )
    parser.add_argument(
        "--chunk", type=int, default=64, metavar="N", help="tokens of a prompt that go through at once (default: 64)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type (default: as stored)"
    )
    add_preset_argument(parser)
    parser.add_argument(
        "--dense-bits",
        type=int,
        choices=[8, 6, 5, 4],
        help="instead of a preset: quantize matrices that are not quantized yet to N bits",
    )
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="keep to so much memory, for example 8GB (default: what there is)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="a tokenizer's file, folder or repository")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="openelm-instruct or plain (default: as stored, or by the name)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was done. Returns the exit code."""
    from ..exporting import export
    from .progress import byte_bar

    try:
        result = export(
            args.source,
            args.destination,
            places=_numbers(args.places),
            chunk=args.chunk,
            dtype=args.dtype,
            dense_bits=bits_asked_for(args),
            memory_limit=args.memory_limit,
            tokenizer=args.tokenizer,
            chat_template=args.chat_template,
            revision=args.revision,
            progress=None if args.quiet else byte_bar(args.source),
        )
    except KeyboardInterrupt:
        say(f"\nInterrupted: {args.destination} was not written; the same command begins anew.")
        return INTERRUPTED
    if args.json:
        from dataclasses import asdict

        report_json(asdict(result))
        return 0
    folder, build = (shlex.quote(str(each)) for each in (result.destination, result.destination / "build"))
    total = sum(result.files.values())
    report(f"{result.destination}: {len(result.files)} files, {total:,} bytes, {result.dtype}")
    report(f"steps for {_listed(result.places)} places and {_listed(result.lengths)} new tokens")
    report(f"read back: {result.num_compared} of {result.num_compared} tokens as the model answers, in each size")
    report(f'to build: cmake -S {folder} -B {build} -DMLX_ROOT="$(python -m mlx --cmake-dir)" && cmake --build {build}')
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of --places. Raises SettingError."""
    from ..errors import SettingError

    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise SettingError(
            f"--places is {text!r}: give whole numbers with commas between them, such as 512,2048."
        ) from None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
