"""`python convert.py` and `python -m openelm_mlx convert`: rename, cast and quantize a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..conversion import ConversionReport, Verification
    from ..conversion.source import Progress

HELP = "convert a checkpoint: rename, cast and quantize it"
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", help="a folder, a weight file, or a Hugging Face repository as owner/name")
    parser.add_argument("destination", nargs="?", help="the folder to write, which must not exist yet")

    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="2, 3, 4, 5, 6 or 8 (bits), mxfp4, mxfp8, nvfp4, or mixed (4 bits, and 8 where rounding hurts most)",
    )
    weights.add_argument(
        "--group-size", type=int, metavar="N", help="so many numbers share a scale: 32, 64 (default), 128"
    )
    weights.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of what is not quantized (default: as stored, but bfloat16 for OpenELM-3B, and 16 bits beside quantized "
        "weights); unpacks the weights of a quantized source",
    )
    weights.add_argument("--revision", help="branch, tag or commit of the repository")
    weights.add_argument(
        "--max-file-size", type=float, default=5.0, metavar="GB", help="divide larger files (default: 5)"
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
    from ..conversion import convert

    try:
        with progress_bars(args.quiet) as progress:
            report = convert(
                args.source,
                args.destination,
                quantize=args.quantize,
                dtype=args.dtype,
                group_size=args.group_size,
                tokenizer=args.tokenizer,
                chat_template=args.chat_template,
                revision=args.revision,
                max_file_bytes=max_file_bytes(args.max_file_size),
                verify=args.verify,
                dry_run=args.dry_run,
                upload=args.upload,
                private=args.private,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"\n{interruption(args)}", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print(json.dumps(asdict(report), default=str))
    elif args.dry_run:
        print_plan(report)
    else:
        print_report(report)
    return 0


def interruption(args: argparse.Namespace) -> str:
    """What Ctrl-C leaves, and what to do about it."""
    if args.dry_run:
        return "Interrupted: a dry run leaves nothing."
    if args.upload and os.path.exists(os.path.join(os.path.expanduser(args.destination), "config.json")):
        return f"Interrupted: {args.destination} is whole; `hf upload {args.upload} {args.destination}` sends it."
    return f"Interrupted: {args.destination} was not written; the same command goes on where this one stopped."


def max_file_bytes(gigabytes: float) -> int:
    """Bytes of --max-file-size. Raises SettingError."""
    from ..errors import SettingError

    if not 0.001 <= gigabytes < 1e6:
        raise SettingError(f"--max-file-size is {gigabytes}: give a number of gigabytes, at least 0.001.")
    return int(gigabytes * 1e9)


def print_plan(report: ConversionReport) -> None:
    """Every tensor with its old and new name, shape, type and bytes, and the totals."""
    rows = [("source", "shape", "type", "destination", "shape", "type", "bytes")]
    for tensor in report.tensors:
        more = (
            f" +{len(tensor.sources) - 1}" if len(tensor.sources) > 1 else ""
        )  # adapters, or the parts of a packed one
        old = (tensor.sources[0] + more, _shape(tensor.source_shape), tensor.source_dtype)
        rows.append((*old, tensor.name, _shape(tensor.shape), tensor.dtype, f"{tensor.nbytes:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *cells, nbytes = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells), nbytes.strip().rjust(widths[-1]))
    print(f"\n{len(report.tensors)} tensors, {report.nbytes:,} bytes ({_of_source(report)}); nothing was written.")


def print_report(report: ConversionReport) -> None:
    """What was written, and what verification found."""
    kind = report.dtype if report.quantization is None else f"quantized, the rest {report.dtype}"
    print(
        f"{report.destination}: {len(report.tensors)} tensors, {report.nbytes:,} bytes ({_of_source(report)}), {kind}"
    )
    if report.num_resumed:
        print(f"{report.num_resumed} of the tensors were there from an interrupted conversion.")
    print(f"tokenizer: {', '.join(report.tokenizer) or 'none found; add one with --tokenizer'}")
    if report.verification is not None:
        print_verification(report.verification)
    if report.upload_url is not None:
        print(f"uploaded to {report.upload_url}")


def print_verification(verification: Verification) -> None:
    """Checksums, the error of each layer, and the divergence of the next-token distributions."""
    print("\nverified, SHA-256 as written:")
    for name, checksum in verification.checksums.items():
        print(f"  {checksum}  {name}")
    print("\nrelative rms error     weights  residual stream")
    for layer in verification.layers:
        print(f"{layer.name:<20} {layer.weights:9.2e}        {layer.stream:9.2e}")
    print(
        f"\nKL divergence of the next token: {verification.kl_divergence:.3e} nats on average, "
        f"{verification.max_kl_divergence:.3e} at most; the likeliest token is the same at "
        f"{verification.same_top_token:.1%} of {verification.num_tokens} positions ({verification.sample})"
    )


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr for each stage, in a terminal; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bars = _Bars()
    try:
        yield bars.show
    finally:
        bars.close()


class _Bars:
    """One tqdm bar at a time."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage` to `done` of `total`."""
        from tqdm import tqdm

        if stage != self._stage or self._bar is None:
            self.close()
            in_bytes = stage != "verify"
            unit = "B" if in_bytes else "layer"
            # What an interrupted run left is there from the start, and not part of the rate.
            self._bar = tqdm(desc=stage, total=total, initial=done, unit=unit, unit_scale=in_bytes, file=sys.stderr)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _of_source(report: ConversionReport) -> str:
    return f"{report.nbytes / report.source_nbytes:.1%} of the source's"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
