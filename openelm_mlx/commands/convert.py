"""`python convert.py` and `python -m openelm_mlx convert`: rename, cast and quantize a checkpoint."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from . import INTERRUPTED
from .options import add_preset_argument, bits_asked_for
from .output import can_draw_bars, report, report_json, say, typed
from .progress import StageBars

if TYPE_CHECKING:
    from ..conversion import ConversionReport, GgufVerification, StageProgress, Verification

HELP = "convert a checkpoint: rename, cast and quantize it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source", help="a folder, a weight file, a GGUF file, or a Hugging Face repository as owner/name"
    )
    parser.add_argument(
        "destination",
        nargs="?",
        help="the folder to write, or the file where the name ends in .gguf; neither may exist yet",
    )

    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="2, 3, 4, 5, 6 or 8 (bits), mxfp4, mxfp8, nvfp4, or mixed (4 bits, and 8 for the most sensitive matrices)",
    )
    add_preset_argument(weights)
    weights.add_argument(
        "--group-size", type=int, metavar="N", help="how many numbers share a scale: 32, 64 (default), 128"
    )
    weights.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights that are not quantized (default: as stored, but bfloat16 for OpenELM-3B, and 16 bits beside "
        "quantized weights); unpacks the weights of a quantized source",
    )
    weights.add_argument("--revision", help="branch, tag or commit of the repository")
    weights.add_argument(
        "--adapter", metavar="PATH",
        help="merge this adapter into the weights; how much of it the rounding keeps is said before anything is written",
    )  # fmt: skip
    weights.add_argument(
        "--merge-anyway", action="store_true", help="merge an adapter also where rounding loses more than half of it"
    )
    weights.add_argument(
        "--max-file-size", default="5GB", metavar="SIZE", help="divide larger files, for example 500MB (default: 5GB)"
    )

    weights.add_argument(
        "--for",
        dest="target",
        choices=["swift"],
        help="swift: a folder for apps with mlx-swift-lm; a model that it cannot run is refused",
    )

    gguf = parser.add_argument_group("GGUF, for llama.cpp, Ollama, LM Studio and phones")
    gguf.add_argument(
        "--gguf-type",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or mxfp4 (default: the source's own numbers)",
    )
    gguf.add_argument(
        "--gguf-experts", metavar="TYPE", help="the same for gpt-oss's experts (default: mxfp4 where they are in it)"
    )

    text = parser.add_argument_group("text")
    text.add_argument("--tokenizer", metavar="SOURCE", help="store the tokenizer of this file, folder or repository")
    text.add_argument("--chat-template", metavar="NAME", help="store openelm-instruct or plain (default: by the name)")

    output = parser.add_argument_group("output")
    output.add_argument("--dry-run", action="store_true", help="list every tensor, old and new, and write nothing")
    output.add_argument(
        "--verify", action="store_true", help="read the result back and measure what the conversion changed"
    )
    output.add_argument("--upload", metavar="REPO", help="send the result to a Hugging Face repository, as owner/name")
    output.add_argument("--private", action="store_true", help="make that repository a private one")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument("--quiet", "-q", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done. Returns the exit code."""
    quantize = bits_asked_for(args, "--quantize")
    from ..conversion import convert

    try:
        with progress_bars(args.quiet) as progress:
            result = convert(
                args.source,
                args.destination,
                quantize=quantize,
                dtype=args.dtype,
                group_size=args.group_size,
                target=args.target,
                gguf_type=args.gguf_type,
                gguf_experts=args.gguf_experts,
                tokenizer=args.tokenizer,
                chat_template=args.chat_template,
                revision=args.revision,
                adapter=args.adapter,
                merge_anyway=args.merge_anyway,
                on_merge=lambda merge: say(typed(merge.sentence())),
                max_file_bytes=max_file_bytes(args.max_file_size),
                verify=args.verify,
                dry_run=args.dry_run,
                upload=args.upload,
                private=args.private,
                progress=progress,
            )
    except KeyboardInterrupt:
        say(f"\n{interruption(args)}")
        return INTERRUPTED
    if args.json:
        from dataclasses import asdict

        report_json(asdict(result))
    elif args.dry_run:
        print_plan(result)
    else:
        print_report(result)
    return 0


def interruption(args: argparse.Namespace) -> str:
    """The message after Ctrl-C: what is left, and how to resume."""
    if args.dry_run:
        return "Interrupted: a dry run leaves nothing."
    if args.upload and os.path.exists(os.path.join(os.path.expanduser(args.destination), "config.json")):
        again = f"hf upload {args.upload} {shlex.quote(args.destination)}"
        return f"Interrupted: {args.destination} is complete; `{again}` sends it."
    return f"Interrupted: {args.destination} was not written; the same command resumes where this one stopped."


def max_file_bytes(text: str) -> str:
    """--max-file-size with its unit; a number without one means gigabytes. Raises SettingError."""
    from ..errors import SettingError
    from ..memory.sizes import parse_size

    size = f"{text}GB" if text.strip(" .0123456789") == "" else text
    if parse_size(size, "--max-file-size") < 10**6:
        raise SettingError(f"--max-file-size is {text}: give at least 1MB.")
    return size


def print_plan(result: ConversionReport) -> None:
    """Every tensor with its old and new name, shape, type and bytes, and the totals."""
    rows = [("source", "shape", "type", "destination", "shape", "type", "bytes")]
    for tensor in result.tensors:
        more = (
            f" +{len(tensor.sources) - 1}" if len(tensor.sources) > 1 else ""
        )  # adapters, or the parts of a packed one
        old = (tensor.sources[0] + more, _shape(tensor.source_shape), tensor.source_dtype)
        rows.append((*old, tensor.name, _shape(tensor.shape), tensor.dtype, f"{tensor.nbytes:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *cells, nbytes = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        report("  ".join([*cells, nbytes.strip().rjust(widths[-1])]))
    report(f"\n{len(result.tensors)} tensors, {result.nbytes:,} bytes ({_of_source(result)}); nothing was written.")


def print_report(result: ConversionReport) -> None:
    """What was written, and what verification found."""
    kind = result.dtype if result.quantization is None else f"quantized, the rest {result.dtype}"
    report(
        f"{result.destination}: {len(result.tensors)} tensors, {result.nbytes:,} bytes ({_of_source(result)}), {kind}"
    )
    if result.num_resumed:
        report(f"Resumed: {result.num_resumed} of the tensors were there from an interrupted conversion.")
    if result.gguf_types is not None:
        report(f"types: {', '.join(f'{count} {name}' for name, count in result.gguf_types.items())}")
    report(f"tokenizer: {', '.join(result.tokenizer) or 'none found; add one with --tokenizer'}")
    for note in result.notes:
        say(typed(note))
    if result.verification is not None:
        if result.gguf_types is None:
            print_verification(cast("Verification", result.verification))
        else:
            print_gguf_verification(cast("GgufVerification", result.verification))
    if result.upload_url is not None:
        report(f"uploaded to {result.upload_url}")


def print_verification(verification: Verification) -> None:
    """Checksums, the error of each layer, and the divergence of the next-token distributions."""
    report("\nverified, SHA-256 as written:")
    for name, checksum in verification.checksums.items():
        report(f"  {checksum}  {name}")
    report("\nrelative rms error     weights  residual stream")
    for layer in verification.layers:
        report(f"{layer.name:<20} {layer.weights:9.2e}        {layer.stream:9.2e}")
    report(
        f"\nKL divergence of the next token: {verification.kl_divergence:.3e} nats on average, "
        f"{verification.max_kl_divergence:.3e} at most; the likeliest token is the same at "
        f"{verification.same_top_token:.1%} of {verification.num_tokens} positions ({verification.sample})"
    )


def print_gguf_verification(verification: GgufVerification) -> None:
    """The checksum, how many tensors are exact, and how far the others were moved."""
    report("\nverified, SHA-256 as written:")
    for name, checksum in verification.checksums.items():
        report(f"  {checksum}  {name}")
    report(f"{verification.num_exact} of {verification.num_tensors} tensors hold the source's own numbers")
    for kind, error in verification.errors.items():
        report(f"rounded to {kind}: relative rms error of a tensor {error:.1e} at most")


@contextmanager
def progress_bars(quiet: bool) -> Iterator[StageProgress | None]:
    """A bar on stderr for each stage, in a terminal; None if stderr is not a terminal."""
    if quiet or not can_draw_bars():
        yield None
        return
    bars = StageBars()
    try:
        yield bars.show
    finally:
        bars.close()


def _of_source(result: ConversionReport) -> str:
    return f"{result.nbytes / result.source_nbytes:.1%} of the source's"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
