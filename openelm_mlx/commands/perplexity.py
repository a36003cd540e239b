"""`openelm_mlx perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .evaluation_options import add_evaluated_model, add_workers, count_bar, loading_options
from .output import report, report_json

if TYPE_CHECKING:
    from ..evaluation.likelihood import Perplexity

HELP = "measure how well a model predicts a text: perplexity, and bits a byte"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default="demo-openelm", metavar="SOURCE", help="default: demo-openelm")
    parser.add_argument(
        "--text", action="append", required=True, metavar="FILE",
        help="a text file, or a .jsonl file with a \"text\" in each line (repeatable); documents are read apart",
    )  # fmt: skip
    parser.add_argument("--window", type=int, metavar="N", help="read at most N tokens at once (default: the context)")
    add_evaluated_model(parser)
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns the exit code."""
    from ..errors import PromptError
    from ..evaluation.likelihood import perplexity
    from ..evaluation.texts import read_documents
    from ..loading import load

    documents = read_documents(args.text)
    texts = [each for each in documents if isinstance(each, str)]
    if len(texts) < len(documents):
        raise PromptError('The text has chats ("messages"), and perplexity reads plain text: give "text" in each line.')
    model, tokenizer = load(args.model, **loading_options(args))
    with count_bar("windows", None, args.quiet) as add:
        found = perplexity(model, tokenizer, texts, window=args.window, on_scores=lambda scores: add(len(scores)))
    if args.json:
        report_json({"model": str(args.model), **found.as_dict()})
    else:
        print_perplexity(str(args.model), found)
    return 0


def print_perplexity(model: str, found: Perplexity) -> None:
    """What was found, a line each."""
    report(f"{model}: perplexity {found.perplexity} over {found.num_tokens:,} tokens, windows of {found.window:,}")
    report(f"  {found.nll.value:.4f} ± {found.nll.error:.4f} nats a token, {found.bits_per_byte:.4f} bits a byte")
    documents = "document" if found.num_documents == 1 else "documents"
    report(
        f"  word perplexity {found.word_perplexity:,.4g}; {found.num_documents:,} {documents}, {found.num_words:,} words, "
        f"{found.num_bytes:,} bytes"
    )
