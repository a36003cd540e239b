"""What `generate` and `chat` have in common: options for the answer, its form and guessing ahead, and words about them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.statistics import Statistics


def add_answer_arguments(group: argparse._ArgumentGroup) -> None:
    """Where an answer ends, and how its tokens are held, beside the options of sampling."""
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    group.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens in flight at once (default: what memory allows)"
    )
    group.add_argument(
        "--kv-bits",
        type=int,
        choices=[8, 16],
        help="8: keys and values in half the memory (default: 16, or the plan's)",
    )


def add_guess_arguments(parser: argparse.ArgumentParser) -> None:
    """Who guesses the next tokens."""
    guess = parser.add_argument_group("guessing ahead (the answer stays the same; off while it does not pay)")
    guess.add_argument("--draft-model", metavar="SOURCE", help="a smaller model with the same tokenizer guesses")
    guess.add_argument(
        "--prompt-lookup", action="store_true", help="guess that what followed the same words follows again"
    )
    guess.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="guess N tokens at once (default: 4, or 8 looked up)"
    )


def add_form_arguments(parser: argparse.ArgumentParser, what: str = "the answer") -> None:
    """What an answer has to be."""
    form = parser.add_argument_group(f"form of {what}")
    form.add_argument("--json-schema", metavar="FILE", help=f"{what} is JSON that follows the JSON Schema in FILE")
    form.add_argument("--regex", metavar="PATTERN", help=f"the whole of {what} matches this regular expression")
    form.add_argument("--grammar", metavar="FILE", help=f"{what} follows the grammar in FILE, in Lark's syntax")


def add_reasoning_arguments(group: argparse._ArgumentGroup, default: str) -> None:
    """Whether reasoning is shown; None: by `default`, which the help says in words."""
    group.add_argument(
        "--show-reasoning", action=argparse.BooleanOptionalAction,
        help=f"show gpt-oss's reasoning, dimmed, on stderr (default: {default})",
    )  # fmt: skip
    # What --no-show-reasoning was once called.
    group.add_argument(
        "--hide-reasoning", dest="show_reasoning", action="store_const", const=False, help=argparse.SUPPRESS
    )


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `stream_generate` that those options mean."""
    return {"stop": args.stop, "prefill_chunk": args.prefill_chunk, "kv_bits": args.kv_bits}


def guessing(statistics: Statistics, is_wanted: bool) -> str:
    """What guessing ahead did, and whether it paid, in words and with a semicolon; nothing where it was not asked for."""
    drafted, speedup = statistics.drafted_tokens, statistics.speculation_speedup
    if not is_wanted:
        return ""
    if not drafted:
        return "no guess was tried, so nothing was gained; "
    right = f"{statistics.accepted_tokens} of {drafted} guesses right"
    if speedup is None:
        return f"{right}, too few to say whether it paid; "
    if speedup > 1.02:
        return f"{right}, which paid: {speedup:.2f} times as fast as without; "
    return f"{right}, which did not pay: {speedup:.2f} times as fast as without; "
