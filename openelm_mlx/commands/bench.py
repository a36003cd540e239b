"""`python -m openelm_mlx bench`: speed and memory on this machine, beside mlx-lm."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from ..errors import SettingError
from .options import add_overwrite, add_preset_argument, bits_asked_for
from .output import report, report_json, say

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench.benchmark import Figure
    from ..models import Model

HELP = "measure speed and memory on this machine, beside mlx-lm in the same run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-openelm", metavar="SOURCE", help="default: demo-openelm")
    add_preset_argument(parser)
    parser.add_argument("--adapter", metavar="PATH", help="with this adapter beside the weights, on both sides")
    parser.add_argument(
        "--against", choices=["mlx-lm", "nothing"], default="mlx-lm", help="compare with mlx-lm (default) or not"
    )
    parser.add_argument(
        "--requests",
        metavar="N[,N...]",
        help="measure so many requests at once, one alone, and one beside a long prompt, in place of the usual figures",
    )
    parser.add_argument(
        "--mixed", action="store_true", help="with --requests: also 64 requests of many lengths, all at once"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="tokens of the (random) prompt (default: 64; with --requests 128)",
    )
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="N", help="tokens to decode (default: 64)")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="runs of each side; the median is reported (default: 7; with --requests 3)",
    )
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        help="random weights in a released shape instead of a model: gpt-oss-20b, openelm-270m, -450m, -1.1b or -3b",
    )
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="with --random, instead of a preset: quantize to N bits the matrices that are not quantized as released",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="with --random: only the first N layers")
    parser.add_argument(
        "--long-context",
        type=int,
        default=0,
        metavar="N",
        help="with --random: decode after N tokens as well; with --requests: length of the long prompt (default: 8,192, on a "
        "CPU 512)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="with --random or --requests: begin no round after S seconds (default: 60)",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="with --random: each run in a process of its own (always done when both models do not fit)",
    )
    parser.add_argument("--chart", metavar="FILE", help="draw the rates of both sides into a .png or .svg file")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object with every sample")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0 when every figure is within its limit, else 1."""
    from ..bench.chart import check_chart, draw_bars

    chart = check_chart(args.chart, args.overwrite)
    _fill_in(args)
    _check_combination(args)
    if args.requests is not None:
        return run_requests(args)
    if args.random is not None:
        return run_random(args, chart)
    from ..bench.benchmark import Settings, figures_as_json, machine_description, run_benchmark
    from ..loading import prepare

    _check_has_mlx_lm(args)
    _check_lengths(prepare(args.model, preset=args.preset, adapter=args.adapter).model, args)
    settings = Settings(
        args.model, args.prompt_tokens, args.completion_tokens, args.rounds, args.against == "mlx-lm", args.preset,
        args.adapter,
    )  # fmt: skip
    figures = []
    if not args.json:
        report(f"{args.model} on {machine_description()}; median of {args.rounds} [least to most]")
    for figure in run_benchmark(settings):
        figures.append(figure)
        if not args.json:
            report(line(figure))
    if args.json:
        report(figures_as_json(figures))
    if chart is not None:
        rates = [figure for figure in figures if figure.unit == "tokens/s"]
        sides = {each.name: {"ours": each.samples, **_theirs(each)} for each in rates}
        draw_bars(chart, f"{args.model} on {machine_description()}", sides, args.overwrite)
    return 0 if all(figure.is_met is not False for figure in figures) else 1


def _fill_in(args: argparse.Namespace) -> None:
    """Numbers that nobody gave."""
    prompt_tokens, rounds = (64, 7) if args.requests is None else (128, 3)
    args.prompt_tokens = prompt_tokens if args.prompt_tokens is None else args.prompt_tokens
    args.rounds = rounds if args.rounds is None else args.rounds


def _check_combination(args: argparse.Namespace) -> None:
    """Raise SettingError for numbers that are too small to measure, and for options that do not go together."""
    least = {"rounds": 1, "prompt_tokens": 2, "completion_tokens": 2}
    for name, number in least.items():
        if getattr(args, name) < number:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {number}.")
    if args.long_context < 0:
        raise SettingError(f"--long-context is {args.long_context}: it must be at least 0.")
    if args.layers is not None and args.layers < 1:
        raise SettingError(f"--layers is {args.layers}: it must be at least 1.")
    if not 0 <= args.seconds < float("inf"):
        raise SettingError(f"--seconds is {args.seconds}: give 0 or more seconds.")
    bits_asked_for(args, "--bits")
    if args.requests is None and args.mixed:
        raise SettingError("--mixed: only for --requests; add it, or leave it out.")
    if args.requests is not None and (args.apart or args.chart):
        given_to = "--apart" if args.apart else "--chart"
        raise SettingError(f"{given_to}: not with --requests; leave one of the two out.")
    if args.random is not None and args.adapter is not None:
        raise SettingError("--adapter: not with --random, whose weights no adapter was trained beside; leave one out.")
    if args.random is None:
        names = ("bits", "layers", "apart", *(() if args.requests is not None else ("long_context",)))
        given = [each for each in names if getattr(args, each)]
        if given:
            words = ", ".join(f"--{each.replace('_', '-')}" for each in given)
            raise SettingError(f"{words}: only for --random; add it, or leave it out.")


def _check_has_mlx_lm(args: argparse.Namespace) -> None:
    if args.against == "mlx-lm" and importlib.util.find_spec("mlx_lm") is None:
        raise SettingError(
            "Comparing with mlx-lm needs mlx-lm: pip install 'openelm_mlx[bench]', or add --against nothing."
        )


def _check_lengths(model: Model, args: argparse.Namespace) -> None:
    """Raise SettingError where prompt and answer are longer than the context."""
    if args.prompt_tokens + args.completion_tokens > model.context_length:
        raise SettingError(
            f"--prompt-tokens {args.prompt_tokens} and --completion-tokens {args.completion_tokens} are more than the "
            f"{model.context_length:,} tokens of {args.model}'s context: give fewer."
        )


def run_random(args: argparse.Namespace, chart: Path | None) -> int:
    """Compare random weights of one shape. Returns 0 when both sides ran."""
    from ..bench.against import compare
    from ..bench.benchmark import machine_description
    from ..bench.conditions import disturbances
    from ..bench.random_pair import shape_config

    shape_config(args.random, args.layers)  # raises for a wrong name before any weights are drawn
    found = compare(
        args.random,
        bits_asked_for(args, "--bits"),
        args.layers,
        args.rounds,
        args.seconds,
        args.prompt_tokens,
        args.completion_tokens,
        args.long_context,
        args.against == "mlx-lm",
        say,
        apart=True if args.apart else None,
    )
    if args.json:
        report_json({"machine": machine_description(), "disturbances": disturbances(), **found.as_dict()})
    else:
        report(f"{machine_description()}; medians, in tokens/s [least to most]")
        for sentence in disturbances():
            report(f"(note: {sentence})")
        report("\n".join(found.lines()))
    if chart is not None and found.samples:
        from ..bench.chart import draw_bars

        draw_bars(chart, f"{args.random} on {machine_description()}", found.samples, args.overwrite)
    return 0 if found.error is None else 1


def run_requests(args: argparse.Namespace) -> int:
    """Measure many requests at once. Returns 0 when all that was asked for was measured."""
    from ..bench.request_rows import PARTS, Settings
    from .bench_requests import models_of, numbers_of, show

    settings = Settings(
        numbers_of(args.requests),
        args.prompt_tokens,
        args.completion_tokens,
        args.long_context,
        rounds=args.rounds,
        seconds=args.seconds,
        parts=[each for each in PARTS if args.mixed or each != "mixed"],
    )
    _check_has_mlx_lm(args)
    name, model, other = models_of(args)
    rows = list(show(name, model, other, settings, args.json))
    if args.json:
        from ..bench.benchmark import machine_description

        report_json({"machine": machine_description(), "model": name, "rows": [row.as_dict() for row in rows]})
    return 0 if all(row.error is None for row in rows) else 1


def line(figure: Figure) -> str:
    """One figure for people."""
    text = f"{figure.name:32} {_range(figure.samples)} {figure.unit}"
    if figure.mlx_lm_samples is not None:
        text += f"   mlx-lm {_range(figure.mlx_lm_samples)}   ratio {figure.ratio:.2f}"
    if figure.limit is not None:
        sign, bound = figure.limit.split()
        side = "above" if sign == "<=" else "below"
        text += f"   ({'within' if figure.is_met else side} the limit of {bound})"
    return text


def _theirs(figure: Figure) -> dict[str, list[float]]:
    return {} if figure.mlx_lm_samples is None else {"mlx-lm": figure.mlx_lm_samples}


def _range(samples: list[float]) -> str:
    import statistics

    median = f"{statistics.median(samples):.3g}"
    return median if len(samples) == 1 else f"{median} [{min(samples):.3g} to {max(samples):.3g}]"
