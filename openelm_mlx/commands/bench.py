"""`python -m openelm_mlx bench`: speed and memory on this machine, beside mlx-lm."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bench.benchmark import Figure

HELP = "measure speed and memory on this machine, beside mlx-lm in the same run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-openelm", metavar="SOURCE", help="default: demo-openelm")
    parser.add_argument(
        "--against", choices=["mlx-lm", "nothing"], default="mlx-lm", help="compare with mlx-lm (default) or not"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, metavar="N", help="tokens of the (random) prompt (default: 64)"
    )
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="N", help="tokens to decode (default: 64)")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="runs of each side, whose median counts (default: 7)"
    )
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        help="random weights in a released shape instead of a model: gpt-oss-20b, openelm-270m, -450m, -1.1b or -3b",
    )
    parser.add_argument("--bits", type=int, metavar="N", help="with --random: pack what is not packed yet to N bits")
    parser.add_argument("--layers", type=int, metavar="N", help="with --random: only the first N layers")
    parser.add_argument(
        "--long-context", type=int, default=0, metavar="N", help="with --random: decode after N tokens as well"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="with --random: begin no round after S seconds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0 when every figure is within its limit, else 1."""
    if args.random is not None:
        return run_random(args)
    from ..bench.benchmark import Settings, figures_as_json, machine_description, run_benchmark

    settings = Settings(args.model, args.prompt_tokens, args.completion_tokens, args.rounds, args.against == "mlx-lm")
    figures = []
    if not args.json:
        print(f"{args.model} on {machine_description()}; median of {args.rounds} [least to most]")
    for figure in run_benchmark(settings):
        figures.append(figure)
        if not args.json:
            print(line(figure))
            sys.stdout.flush()
    if args.json:
        print(figures_as_json(figures))
    return 0 if all(figure.is_met is not False for figure in figures) else 1


def run_random(args: argparse.Namespace) -> int:
    """Compare random weights of one shape. Returns 0 when both sides ran."""
    import json

    from ..bench.against import compare, shape_config
    from ..bench.benchmark import machine_description
    from ..bench.conditions import disturbances

    shape_config(args.random, args.layers)  # a wrong name is a sentence, before anything is drawn
    found = compare(
        args.random,
        args.bits,
        args.layers,
        args.rounds,
        args.seconds,
        args.prompt_tokens,
        args.completion_tokens,
        args.long_context,
        args.against == "mlx-lm",
        lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps({"machine": machine_description(), "disturbances": disturbances(), **found.as_dict()}))
    else:
        print(f"{machine_description()}; medians, in tokens/s [least to most]")
        for sentence in disturbances():
            print(f"(note: {sentence})")
        print("\n".join(found.lines()))
    return 0 if found.error is None else 1


def line(figure: Figure) -> str:
    """One figure for people."""
    text = f"{figure.name:32} {_range(figure.samples)} {figure.unit}"
    if figure.mlx_lm_samples is not None:
        text += f"   mlx-lm {_range(figure.mlx_lm_samples)}   ratio {figure.ratio:.2f}"
    if figure.limit is not None:
        text += f"   (asked: {figure.limit}{'' if figure.is_met else ', MISSED'})"
    return text


def _range(samples: list[float]) -> str:
    import statistics

    median = f"{statistics.median(samples):.3g}"
    return median if len(samples) == 1 else f"{median} [{min(samples):.3g} to {max(samples):.3g}]"
