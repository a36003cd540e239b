"""`openelm_mlx train`: train a model from nothing, by a YAML file."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from . import INTERRUPTED
from .options import add_overwrite
from .output import report, report_json
from .training_progress import TrainingBar, show_losses, summary, watched

HELP = "train a new OpenELM model from nothing, by a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the run: model, data, schedule (examples/train/demo_openelm.yaml)",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write; nothing may be there")
    parser.add_argument("--steps", type=int, metavar="N", help="only the first N steps of the file's schedule")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted run to this output")
    parser.add_argument("--chart", metavar="FILE", help="draw the losses into a .png or .svg file")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Train, and print what came of it. Returns the exit code."""
    from ..bench.chart import check_chart
    from ..training.pretraining import TrainingConfig, train

    chart = check_chart(args.chart, args.overwrite)
    config = TrainingConfig.read(args.config)
    bar = TrainingBar(args.steps or config.steps, args.quiet)
    options = {"output": args.output, "steps": args.steps, "restart": args.restart}
    path = watched(bar, args.output, lambda: train(config, progress=bar.show, started=bar.begin, **options))
    if path is None:
        return INTERRUPTED
    log = json.loads((path / "training.json").read_text(encoding="utf-8"))["log"]
    show_losses(args, log, Path(args.config).name, chart)
    if args.json:
        report_json({"output": str(path), "log": log})
        return 0
    report(summary(str(path), log))
    report(f"use it: openelm_mlx generate --model {shlex.quote(str(path))}")
    return 0
