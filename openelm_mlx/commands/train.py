"""`openelm_mlx train`: train a model from nothing, by a YAML file."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from .training_progress import (
    TrainingBar,
    add_result_arguments,
    show_interrupted,
    show_result,
    watched,
)

HELP = "train a new OpenELM model from nothing, by a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the run: model, data, schedule (examples/train/demo_openelm.yaml)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="only the first N steps of the file's schedule")
    add_result_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and print what came of it. Returns the exit code."""
    from ..bench.chart import check_chart
    from ..training.pretraining import TrainingConfig, train

    chart = check_chart(args.chart, args.overwrite)
    config = TrainingConfig.read(args.config)
    bar = TrainingBar(args.steps or config.steps, args.quiet)
    options = {"output": args.output, "steps": args.steps, "restart": args.restart}
    path = watched(bar, args.output, lambda: train(config, progress=bar.show, started=bar.begin, **options))
    title = Path(args.config).name
    if path is None:
        return show_interrupted(args, title, chart)
    log = json.loads((path / "training.json").read_text(encoding="utf-8"))["log"]
    return show_result(args, path, log, title, chart, f"generate --model {shlex.quote(str(path))}")
