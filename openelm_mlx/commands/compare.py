"""`openelm_mlx compare`: how far one model's predictions are from another's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .evaluation_options import add_evaluated_model, add_workers, count_bar, loading_options
from .output import report, report_json

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison

HELP = "measure how far one model's predictions are from another's on a text: KL, the likeliest token, perplexity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("reference", metavar="A", help="the model that is compared with")
    parser.add_argument("model", metavar="B", help="the model that is compared: a quantized or adapted form of it")
    parser.add_argument(
        "--text", action="append", required=True, metavar="FILE",
        help="a text file, or a .jsonl file with \"text\" or \"messages\" (a chat) in each line (repeatable)",
    )  # fmt: skip
    parser.add_argument("--window", type=int, metavar="N", help="read at most N tokens at once (default: the context)")
    add_evaluated_model(parser, " (of B)")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns the exit code."""
    from ..evaluation.comparison import compare
    from ..evaluation.texts import read_documents

    documents = read_documents(args.text)
    options = loading_options(args)
    # What makes another form of the model is about B: A is what it is compared with.
    of_a = {**options, "dense_bits": None, "kv_bits": None, "adapter": None}
    with count_bar("tokens", None, args.quiet) as add:
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            add(now - done, total)
            done = now

        found = compare(
            args.reference,
            args.model,
            documents,
            window=args.window,
            load_options=of_a,
            other_load_options=options,
            progress=progress,
        )
    if args.json:
        report_json({"reference": args.reference, "model": args.model, **found.as_dict()})
    else:
        print_comparison(args.reference, args.model, found)
        if found.at_a_time == 1:
            why = (
                "The models do not fit into memory together"
                if args.workers is None
                else "Workers have one model at a time"
            )
            report(f"  {why}: they were loaded one after the other.")
    return 0


def print_comparison(a: str, b: str, found: Comparison) -> None:
    """What was found, a line each."""
    quantiles = ", ".join(f"{float(share):.1%} {value:.2e}" for share, value in found.kl_quantiles.items())
    report(f"{b} compared with {a} on {found.num_tokens:,} tokens, windows of {found.window:,}")
    report(
        f"  KL divergence {found.kl.value:.3e} ± {found.kl.error:.1e} nats, at most {found.max_kl:.2e} ({quantiles})"
    )
    report(f"  the same likeliest token at {found.same_top.value:.2%} ± {found.same_top.error:.2%}")
    report(
        f"  perplexity ratio {found.perplexity_ratio.value:.5f} ± {found.perplexity_ratio.error:.5f} "
        f"({found.nll.value:.4f} to {found.other_nll.value:.4f} nats a token)"
    )
    report(
        f"  probability of the right token {found.probability_change.value:+.3%} ± {found.probability_change.error:.3%}, "
        f"root mean square {found.probability_change_rms:.3%}"
    )
