"""`openelm_mlx train`: train a model from nothing, by a YAML file."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from . import INTERRUPTED
from .finetune import ended_by_a_signal, interruption
from .options import add_overwrite
from .output import report, report_json, say
from .training_progress import TrainingBar, draw_losses, duration, loss_picture

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
    try:
        with ended_by_a_signal():
            path = train(
                config,
                output=args.output,
                steps=args.steps,
                restart=args.restart,
                progress=bar.show,
                started=bar.begin,
            )
    except KeyboardInterrupt:
        bar.close()
        say(f"\n{interruption(bar.step, args.output)}")
        return INTERRUPTED
    finally:
        bar.close()
    log = json.loads((Path(path) / "training.json").read_text(encoding="utf-8"))["log"]
    if not args.quiet:
        say(loss_picture([entry["loss"] for entry in log]))
    if chart is not None:
        draw_losses(chart, Path(args.config).name, log, args.overwrite)
    if args.json:
        report_json({"output": str(path), "log": log})
        return 0
    report(
        f"{path}: loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} in {len(log):,} steps, {duration(log[-1]['seconds'])}"
    )
    report(f"use it: openelm_mlx generate --model {shlex.quote(str(path))}")
    return 0
