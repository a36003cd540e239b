"""`python -m benchmarks.speculation`: what guessing ahead gains on this machine, beside what it could gain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openelm_mlx.commands.options import add_preset_argument
from openelm_mlx.commands.output import report, report_json
from openelm_mlx.errors import SettingError, TokenizerError

from .command import run_benchmark

if TYPE_CHECKING:
    from openelm_mlx.decoding.drafts import Drafts

# What a model that knows a dictionary is asked.
WORDS = ("banjo", "piano", "river", "teacher", "hammer", "cathedral")

HELP = (
    "measure what guessing ahead gains: by looking up, and with --draft-model; of demo-openelm, four times as deep, guessed "
    "for by itself in 4 bits"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-openelm", metavar="SOURCE", help="default: demo-openelm")
    add_preset_argument(parser)
    parser.add_argument("--draft-model", metavar="SOURCE", help="a smaller model that guesses")
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="N", help="tokens to decode (default: 64)")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="runs of each way, whose median counts (default: 7)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure guessing. Returns 0 when it gains nine tenths of what could be gained, and never loses more than 3 %."""
    from openelm_mlx.bench.benchmark import machine_description
    from openelm_mlx.decoding.drafts import DraftModel, PromptLookup
    from openelm_mlx.engine.prompt import encode_prompt
    from openelm_mlx.loading import prepare
    from openelm_mlx.models.openelm import OpenELM
    from openelm_mlx.tokenizers import missing_tokenizer_message

    from .measurements.speculation import made_pair, measure_speculation, speculation_lines

    for name, number in {"rounds": 1, "completion_tokens": 2}.items():
        if getattr(args, name) < number:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {number}.")
    prepared = prepare(args.model, preset=args.preset)
    if prepared.tokenizer is None:
        raise TokenizerError(missing_tokenizer_message(prepared.model.spec))
    small_one = None if args.draft_model is None else prepare(args.draft_model)
    if small_one is not None:
        DraftModel(small_one.model, small_one.tokenizer).check(prepared.model, prepared.tokenizer)
    model, tokenizer = prepared.read()
    drafts: dict[str, Drafts] = {"looked up": PromptLookup()}
    if small_one is not None:
        small, small_tokenizer = small_one.read()
        drafts["draft model"] = DraftModel(small, small_tokenizer)
    elif args.model == "demo-openelm" and isinstance(model, OpenELM):
        model, small = made_pair(model)
        drafts["draft model"] = DraftModel(small, tokenizer)
    for draft in drafts.values():
        draft.check(model, tokenizer)
    prompts = [encode_prompt(model, tokenizer, f"What is a {word}?").tokens for word in WORDS]
    found = {}
    if not args.json:
        report(f"{args.model} on {machine_description()}")
    for name, draft in drafts.items():
        found[name] = measure_speculation(model, draft, prompts, args.completion_tokens, args.rounds)
        if not args.json:
            report("\n".join(speculation_lines(name, found[name])))
    if args.json:
        results = {name: each.as_dict() for name, each in found.items()}
        report_json({"machine": machine_description(), "model": args.model, "results": results})
    return 0 if all(each.efficiency >= 0.9 and each.gain >= 0.97 for each in found.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("speculation", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
