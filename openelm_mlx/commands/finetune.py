"""`openelm_mlx finetune`: train an adapter, or all weights, on a person's own data."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ..checks import size
from .output import report_json, say
from .training_progress import (
    TrainingBar,
    add_result_arguments,
    show_interrupted,
    show_result,
    watched,
)

if TYPE_CHECKING:
    from ..training.finetuning import Finetuning

HELP = "train an adapter, or all weights, on your own data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source", help="demo-openelm, demo-gpt-oss, a folder, or a Hugging Face repository as owner/name"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", required=True, metavar="FILE",
        help='a .jsonl file whose lines have "messages", "prompt" and "completion", "text", or "chosen" and "rejected"; a '
        "folder with train.jsonl (and valid.jsonl); or a dataset of the Hugging Face Hub as owner/name",
    )  # fmt: skip
    data.add_argument("--validation", metavar="FILE", help="other data to measure with, or a share of the data, as 0.1")
    data.add_argument(
        "--learn", metavar="WHICH", help="answers (every turn of the assistant, the default), last, or all tokens"
    )
    data.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (default: the model's context)")
    data.add_argument(
        "--too-long", metavar="WHAT", help="what becomes of longer rows: error (default), cut, skip, or split (texts)"
    )
    data.add_argument("--reasoning-effort", metavar="EFFORT", help="of gpt-oss's chats: low, medium (default) or high")
    data.add_argument("--date", metavar="YYYY-MM-DD", help="the date in gpt-oss's prompts (default: today)")

    method = parser.add_argument_group("method")
    method.add_argument("--method", metavar="NAME", help="lora (default), dora, rslora, or full: all weights")
    method.add_argument("--recipe", metavar="NAME", help="Apple's settings for OpenELM: apple-peft or apple-dpo")
    method.add_argument("--rank", type=int, metavar="N", help="of the adapter (default: 16)")
    method.add_argument("--alpha", type=float, metavar="X", help="its factor is X / rank (default: twice the rank)")
    method.add_argument("--dropout", type=float, metavar="P", help="share of an adapter's inputs that is dropped")
    method.add_argument(
        "--targets", nargs="+", metavar="NAME",
        help="what is adapted: q_proj, proj_1, ..., attention, experts, router, embedding, head, all-linear (default)",
    )  # fmt: skip
    method.add_argument("--layers", nargs="+", type=int, metavar="N", help="which layers are adapted (default: all)")
    method.add_argument("--preference", metavar="LOSS", help="of preferences: sigmoid (DPO, the default) or hinge")
    method.add_argument("--beta", type=float, metavar="X", help="of preferences (default: 0.1)")

    run = parser.add_argument_group("the run")
    run.add_argument("--steps", type=int, metavar="N", help="how many steps (default: 3 epochs, at least 80 steps)")
    run.add_argument("--epochs", type=float, metavar="X", help="how often the data are seen")
    run.add_argument("--batch-size", type=int, metavar="N", help="examples a step (default: 8; of few examples 4 to 8)")
    run.add_argument(
        "--learning-rate", type=float, metavar="X", help="default: 2e-3 for adapters, 2e-4 for all weights"
    )
    run.add_argument("--final-learning-rate", type=float, metavar="X", help="at the end (default: a tenth)")
    run.add_argument("--warmup-steps", type=int, metavar="N", help="steps until the rate is reached (default: 5 %%)")
    run.add_argument("--weight-decay", type=float, metavar="X", help="of matrices (default: 0)")
    run.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="gradients are clipped to it (default: 1; 0: never)"
    )
    run.add_argument("--z-loss", type=float, metavar="X", help="keeps logits from drifting (default: 0)")
    run.add_argument("--validate-every", type=int, metavar="N", help="steps (default: ten times in the run)")
    run.add_argument(
        "--patience", type=int, metavar="N", help="end once validation has not improved N times in a row; keep the best"
    )
    run.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same run")

    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory-limit", metavar="SIZE", help="for example 8GB (default: what the machine has)")
    memory.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=None,
        help="compute layers again instead of keeping them (default: where memory is short)",
    )  # fmt: skip
    memory.add_argument("--tokens-at-once", type=int, metavar="N", help="changes memory, not the result")
    memory.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type")

    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", metavar="SOURCE", help="a tokenizer's file, folder or repository")
    model.add_argument("--chat-template", metavar="NAME", help="openelm-instruct or plain (default: as stored)")
    model.add_argument("--revision", help="branch, tag or commit of the repository")

    output = parser.add_argument_group("output")
    add_result_arguments(output)
    output.add_argument("--format", metavar="NAME", help="of the adapter: peft (default) or mlx-lm")
    output.add_argument("--dry-run", action="store_true", help="check and plan, and train nothing")


# Options that are not the run's own.
_OF_THE_COMMAND = ("source", "run", "command", "chart", "overwrite", "dry_run", "json", "quiet", "validation", "help")


def run(args: argparse.Namespace) -> int:
    """Plan, train, and print. Returns the exit code."""
    from ..bench.chart import check_chart
    from ..training.finetuning import prepare_finetuning

    chart = check_chart(args.chart, args.overwrite)
    options = {name: value for name, value in vars(args).items() if name not in _OF_THE_COMMAND and value is not None}
    prepared = prepare_finetuning(args.source, validation=share_or_path(args.validation), **options)
    if not args.quiet or args.dry_run:
        print_plan(prepared)
    if args.dry_run:
        if args.json:
            report_json(prepared.plan.as_dict())
        return 0
    bar = TrainingBar(prepared.settings.steps or 0, args.quiet)
    path = watched(bar, args.output, lambda: prepared.run(bar.show, bar.begin, bar.refer))
    method = prepared.settings.method
    title = f"{args.source}: {method}"
    if path is None:
        return show_interrupted(args, title, chart)
    model = str(path) if method == "full" else prepared.base.name
    use = f"chat --model {shlex.quote(model)}"
    if method != "full":
        use += f" --adapter {shlex.quote(str(path))}"
    facts = {"plan": prepared.plan.as_dict()}
    return show_result(args, path, prepared.log, title, chart, use, facts)


def share_or_path(value: str | None) -> Any:
    """--validation: a share where it is a number."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


def print_plan(prepared: Finetuning) -> None:
    """What the run is, and what it takes."""
    plan, settings = prepared.plan, prepared.settings
    learned = sum(row.num_targets for rows in prepared.rows.examples for row in rows)
    kind = "preferences" if prepared.is_preference else "examples"
    say(
        f"{plan.examples:,} {kind}, {prepared.rows.num_tokens:,} tokens, {learned:,} of them learned; the longest row has "
        f"{plan.longest + 1:,}"
    )
    say(
        f"{settings.method}: {plan.num_trained:,} trained numbers; {plan.steps:,} steps of {plan.batch_size} {kind} "
        f"({settings.epochs:.3g} epochs), learning rate {settings.learning_rate:g}"
    )
    say(f"memory: {size(plan.process_bytes)} of {size(plan.memory_limit)}: {plan.arithmetic()}")
