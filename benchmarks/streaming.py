"""`python -m benchmarks.streaming`: what it costs to leave experts on disk, on this machine and by simulation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openelm_mlx.commands.options import add_overwrite
from openelm_mlx.commands.output import report, say
from openelm_mlx.errors import DestinationError, SettingError
from openelm_mlx.outputs import checked_output, json_with, write_output
from openelm_mlx.text.terminal import to_json

from .command import run_benchmark

if TYPE_CHECKING:
    from openelm_mlx.experts.writable import WriteMode
    from openelm_mlx.memory.machine import Machine

    from .measurements.routing import Trace
    from .measurements.streaming import Settings

FORMAT = "openelm_mlx bench-streaming"  # in files since this command was one of the package
WHAT, IS_FIGURES = "The JSON of this run", json_with("format", FORMAT)
USUAL_MACS = "M4 16GB,M3 Max 36GB"
# Tokens that a prediction simulates: enough that the reads which first fill the slots weigh little.
PREDICTED_TOKENS = 256
HELP = "measure gpt-oss with only some experts in memory, beside all of them and beside a floor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", default="demo-gpt-oss", metavar="SOURCE", help="default: demo-gpt-oss")
    parser.add_argument(
        "--random", choices=["20b", "120b"], help="write a random checkpoint of this shape and measure that instead"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the random checkpoint (default: all)")
    parser.add_argument("--folder", metavar="FOLDER", help="where to write it (default: the system's temporary folder)")
    parser.add_argument("--slots", metavar="N,N", help="slots a layer (default: 75, 50 and 25 %% of the experts)")
    parser.add_argument(
        "--routing",
        default="own",
        metavar="KINDS",
        help="own (the model's), uniform (any experts), skewed (coming back to experts as the trained demo does); "
        "several with commas (default: own)",
    )
    parser.add_argument(
        "--cache", default="warm", metavar="KINDS", help="warm, cold, or both with a comma: the system's file cache"
    )
    parser.add_argument(
        "--writes",
        default="auto",
        metavar="KINDS",
        help="how bytes come into slots: view, driver (CUDA's), copy, or auto, which is what loading takes here; several with "
        "commas (default: auto)",
    )
    parser.add_argument(
        "--at-once",
        default="1,adapts",
        metavar="KINDS",
        help="layers to run before the router's choices are read back: numbers, or adapts (default: 1,adapts)",
    )
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens to measure (default: 16)")
    parser.add_argument("--warm-up", type=int, default=16, metavar="N", help="tokens before them (default: 16)")
    parser.add_argument(
        "--prefill", type=int, default=0, metavar="N", help="also a prompt of N tokens in one chunk (default: none)"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="only write how the model routes to FILE (.npz): the demo in its answers, another one by itself",
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="what skewed routing is like, recorded before (default: the demo's)"
    )
    parser.add_argument(
        "--predict",
        choices=["20b", "120b"],
        help="measure nothing, and say by simulation what Macs should reach with this model",
    )
    parser.add_argument(
        "--macs",
        default=USUAL_MACS,
        metavar="NAMES",
        help=f"Macs to predict, with commas; all: every one, with as many experts as a plan leaves (default: {USUAL_MACS})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE as JSON")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from openelm_mlx.experts.residency import checked_slots

    from .measurements import routing
    from .measurements.streaming import check_has_experts, demo_trace, own_trace, random_model

    found: dict[str, list[Any]] = {}
    settings, machines = settings_of(args), machines_of(args.macs)  # before 14 GB are written
    for name, what, is_ours in ((args.json, WHAT, IS_FIGURES), (args.record, routing.WHAT, routing.is_trace)):
        if name is not None:
            checked_output(name, what, is_ours, args.overwrite)  # an hour later it would be too late
    if args.predict is not None:
        predict(args.predict, settings.trace, machines, found)
        return write_json(args, found)
    folder = None if args.folder is None else Path(args.folder)
    if folder is not None and not folder.is_dir():
        raise DestinationError(f"--folder {folder} is not a folder: make it, or name another one.")
    place: Any = nullcontext(args.model) if args.random is None else random_model(args.random, args.layers, folder)
    is_demo = args.random is None and args.model == "demo-gpt-oss"
    if args.random is None:
        known = check_has_experts(args.model)  # before a heading stands there
        for each in settings.slots or ():
            checked_slots(known, each)
    with place as source:
        if args.record is not None:
            trace = demo_trace() if is_demo else own_trace(source, settings)
            trace.save(Path(args.record), args.overwrite)
            say(f"{args.record}: how {args.random or args.model} routes, {len(trace.passes)} passes")
            return 0
        measure(args, replace(settings, source=str(source)), found)
    if is_demo:
        calibrate(found)
    predict("20b", settings.trace, machines, found)
    return write_json(args, found)


def write_json(args: argparse.Namespace, found: dict[str, list[Any]]) -> int:
    """Write everything, where that was asked for. Raises DestinationError."""
    if args.json is not None:
        text = to_json({"format": FORMAT, **found}, indent=1)
        write_output(args.json, text + "\n", WHAT, IS_FIGURES, args.overwrite)
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """What is to be measured, of the model that the arguments name. Raises SettingError."""
    from openelm_mlx.checkpoint.released import released_gpt_oss_config
    from openelm_mlx.experts.residency import checked_slots
    from openelm_mlx.specs import spec_from_config

    from .measurements.routing import Trace
    from .measurements.streaming import Settings

    for option, least in (("tokens", 1), ("warm_up", 0), ("prefill", 0), ("layers", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise SettingError(f"--{option.replace('_', '-')} is {value}: give a whole number from {least} on.")
    slots = None if args.slots is None else numbers("slots", args.slots.split(","))
    if args.random is not None:
        for each in slots or ():
            checked_slots(spec_from_config(released_gpt_oss_config(args.random)), each)
    writes = kinds("writes", args.writes, ("auto", "view", "driver", "copy"))
    return Settings(
        source=args.model,
        slots=slots,
        routings=kinds("routing", args.routing, ("own", "uniform", "skewed")),
        caches=kinds("cache", args.cache, ("warm", "cold")),
        writes=tuple(None if each == "auto" else cast("WriteMode", each) for each in writes),
        strides=tuple(None if each == "adapts" else numbers("at-once", [each])[0] for each in args.at_once.split(",")),
        num_tokens=args.tokens,
        warm_up_tokens=args.warm_up,
        prefill_tokens=args.prefill,
        trace=None if args.trace is None else Trace.load(Path(args.trace)),
    )


def machines_of(names: str) -> list[Machine] | None:
    """The Macs of these names, None for all. Raises SettingError."""
    from openelm_mlx.memory.machine import find_mac

    return None if names.strip() == "all" else [find_mac(each) for each in names.split(",")]


def measure(args: argparse.Namespace, settings: Settings, found: dict[str, list[Any]]) -> None:
    """Print a line for each way of decoding as it is measured."""
    from openelm_mlx.bench.benchmark import machine_description

    from .measurements.streaming import Row, row_as_json
    from .measurements.streaming import run as run_settings

    report(f"{args.model if args.random is None else 'random ' + args.random} on {machine_description()}")
    report(
        "slots routing  cache writes at once   ms/token resident   floor ratio  stall  hits  MB/token   GB/s  waits  again"
    )
    for what, value in run_settings(settings):
        found.setdefault(what, []).append(row_as_json(value) if isinstance(value, Row) else value)
        report(line(value) if isinstance(value, Row) else sentence(what, value))


def kinds(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The values of an option, each of which has to be known. Raises SettingError."""
    found = tuple(text.split(","))
    for each in found:
        if each not in known:
            raise SettingError(f"--{option} is {each!r}: give one or several of {', '.join(known)}, with commas.")
    return found


def numbers(option: str, texts: Sequence[str]) -> tuple[int, ...]:
    """The values of an option as whole numbers from 1 on. Raises SettingError."""
    for each in texts:
        if not each.strip().isdecimal() or int(each) < 1:
            raise SettingError(f"--{option} is {each!r}: give whole numbers from 1 on, with commas.")
    return tuple(int(each) for each in texts)


def line(row: Any) -> str:
    """One way of decoding, for people."""
    stride = "adapts" if row.layers_at_once is None else str(row.layers_at_once)
    return (
        f"{row.slots:5} {row.routing:8} {row.cache:5} {row.writes:6} {stride:>7} {1e3 * row.seconds:10.2f} "
        f"{1e3 * row.resident_seconds:8.2f} {1e3 * row.floor_seconds:7.2f} {row.ratio:5.2f} {1e3 * row.stall_seconds:6.1f} "
        f"{row.hit_rate:5.0%} {row.bytes_per_token / 1e6:9.1f} {row.bare_rate / 1e9:6.2f} {row.read_backs_per_token:6.1f} "
        f"{row.replayed_layers_per_token:6.1f}"
    )


def sentence(what: str, value: Mapping[str, Any]) -> str:
    """What was measured beside the rows, for people. what: "resident", "prefill" or "identical", as `run` gives it."""
    if what == "resident":
        return f"all experts in memory, routing {value['routing']}: {1e3 * value['seconds']:.2f} ms/token"
    if what == "identical":
        same = "the same tokens as" if value["is_identical"] else "OTHER tokens than"
        return (
            f"{value['slots']:5} slots, routing {value['routing']}, writes {value['writes']}: {same} with all in memory"
        )
    text = f"a prompt of {value['tokens']:,} tokens in one chunk: {value['seconds']:.2f} s "
    if value["slots"] is None:
        return text + "with all experts in memory"
    return (
        f"{text}with {value['slots']} slots, cache {value['cache']}: {value['bytes_read'] / 1e6:,.1f} MB read (an expert "
        f"{value['reads_per_expert']:.2f} times at most), waited {value['seconds_waited']:.2f} s"
    )


def calibrate(found: dict[str, list[Any]]) -> None:
    """The demo at several numbers of slots, and what the simulator says of them after the first."""
    from .measurements.predictions import measured_predictions

    prompts = [f"What is a {word}?" for word in ("banjo", "glacier", "tax", "violin")]
    found["calibration"] = measured_predictions("demo-gpt-oss", (8, 4, 6, 10, 12, 14, 16), prompts, 48)
    report("the demo's answers, measured and predicted from the first line")
    for row in found["calibration"]:
        error = row["predicted"] / row["seconds"] - 1
        report(
            f"{row['slots']:5} slots  {1e3 * row['seconds']:7.2f} ms/token  predicted {1e3 * row['predicted']:7.2f} "
            f"({error:+.0%})  hits {row['hit_rate']:.0%}"
        )


def predict(size: str, trace: Trace | None, machines: Sequence[Machine] | None, found: dict[str, list[Any]]) -> None:
    """What Macs should reach: simulated, not measured. machines: None for every Mac, each as a plan leaves it."""
    from openelm_mlx.checkpoint.released import released_gpt_oss_config
    from openelm_mlx.memory.machine import macs
    from openelm_mlx.specs import spec_from_config

    from .measurements.predictions import mac_predictions, planned_slots
    from .measurements.routing import alike, uniform
    from .measurements.streaming import demo_trace

    spec = spec_from_config(released_gpt_oss_config(size))
    num_experts, k = spec.layers[0].num_experts, spec.layers[0].experts_per_token
    shape = {"num_tokens": PREDICTED_TOKENS, "num_layers": len(spec.layers), "num_experts": num_experts}
    skewed, even = alike(trace or demo_trace(), **shape), uniform(**shape, k=k)
    like = "the demo" if trace is None else "the trace"
    if trace is not None and trace.experts_per_token != k:
        raise SettingError(
            f"The trace's tokens choose {trace.experts_per_token} experts, and gpt-oss-{size}'s {k}: record one of a gpt-oss."
        )
    report(f"predicted, not measured: gpt-oss-{size} on Macs, routed as {like} routes / uniformly")
    wanted: list[tuple[Machine, tuple[int, ...]]]
    if machines is None:
        every = list(macs())
        planned = zip(every, planned_slots(size, every), strict=True)
        wanted = [(machine, (each,)) for machine, each in planned if each is not None]
    else:
        wanted = [(machine, tuple(num_experts * eighths // 8 for eighths in range(2, 9))) for machine in machines]
    found["macs"] = []
    rows = (mac_predictions(size, each, wanted) for each in (skewed, even))
    asked = [machine for machine, slots in wanted for _ in slots]
    for machine, row, other in zip(asked, *rows, strict=True):
        found["macs"].append({**row, "uniform": other["tokens_per_second"]})
        disk = "" if machine.ssd_bandwidth is not None or row["slots"] == num_experts else "  (its disk assumed)"
        report(
            f"{row['mac']:14} {row['slots']:3} slots  hits {row['hit_rate']:.0%}  {row['tokens_per_second']:5.1f} / "
            f"{other['tokens_per_second']:5.1f} tokens/s{disk}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_benchmark("streaming", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
