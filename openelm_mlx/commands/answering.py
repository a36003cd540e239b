"""What `generate` and `chat` share: options for the answer, its format and speculative decoding, and their statistics."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import add_kv_bits_argument

if TYPE_CHECKING:
    from ..engine.statistics import Statistics


def add_answer_arguments(group: argparse._ArgumentGroup) -> None:
    """Options for the end of an answer, the prompt's chunks and the cache, beside those for sampling."""
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    group.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens computed at once (default: what memory allows)"
    )
    add_kv_bits_argument(group)


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for speculative decoding."""
    draft = parser.add_argument_group("speculative decoding (the answer stays the same; pauses while it gains nothing)")
    draft.add_argument(
        "--draft-model", metavar="SOURCE", help="draft tokens with a smaller model with the same tokenizer"
    )
    draft.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="draft tokens from earlier text: what followed the same words before",
    )
    draft.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="draft N tokens at once (default: 4, or 8 with --prompt-lookup)",
    )


def add_form_arguments(parser: argparse.ArgumentParser, what: str = "the answer") -> None:
    """Options for the format of an answer."""
    form = parser.add_argument_group(f"format of {what}")
    form.add_argument("--json-schema", metavar="FILE", help=f"{what} is JSON that follows the JSON Schema in FILE")
    form.add_argument("--regex", metavar="PATTERN", help=f"the whole of {what} matches this regular expression")
    form.add_argument("--grammar", metavar="FILE", help=f"{what} follows the grammar in FILE, in Lark's syntax")


def add_reasoning_arguments(group: argparse._ArgumentGroup, default: str) -> None:
    """Whether reasoning is shown; None means the default, which the help describes with `default`."""
    group.add_argument(
        "--show-reasoning", action=argparse.BooleanOptionalAction,
        help=f"show gpt-oss's reasoning, dimmed, on stderr (default: {default})",
    )  # fmt: skip
    # The former name of --no-show-reasoning.
    group.add_argument(
        "--hide-reasoning", dest="show_reasoning", action="store_const", const=False, help=argparse.SUPPRESS
    )


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `stream_generate` for those options."""
    return {"stop": args.stop, "prefill_chunk": args.prefill_chunk, "kv_bits": args.kv_bits}


def acceptance_clause(statistics: Statistics, is_wanted: bool) -> str:
    """Acceptance and gain of speculative decoding, as a clause with a semicolon; empty if it was not requested."""
    drafted, speedup = statistics.drafted_tokens, statistics.speculation_speedup
    if not is_wanted:
        return ""
    if not drafted:
        return "no draft was tried, so nothing was gained; "
    right = f"{statistics.accepted_tokens} of {drafted} drafted tokens accepted"
    if speedup is None:
        return f"{right}, too few to measure a gain; "
    if speedup > 1.02:
        return f"{right}: {speedup:.2f} times as fast as without; "
    return f"{right}, no gain: {speedup:.2f} times as fast as without; "
