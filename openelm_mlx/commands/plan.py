"""`python -m openelm_mlx plan`: whether a model fits, with which settings and context, and how fast; reads only headers."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from .options import DEFAULT_MODEL, add_overwrite, add_preset_argument, bits_asked_for
from .output import report, report_json, say, typed

if TYPE_CHECKING:
    from ..memory.plan_types import MemoryPlan

# The models in a table of all Macs if no source is given.
RELEASED = (
    "openai/gpt-oss-20b", "openai/gpt-oss-120b", "apple/OpenELM-270M", "apple/OpenELM-450M", "apple/OpenELM-1_1B",
    "apple/OpenELM-3B",
)  # fmt: skip

HELP = "show whether a model fits into a machine's memory and how fast it will be, without reading it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source", nargs="*",
        help="demos, folders, files or repositories (default: demo-openelm; for tables and charts of all Macs what Apple and "
        "OpenAI released)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--adapter", metavar="PATH", help="with this adapter beside the weights")
    parser.add_argument(
        "--mac",
        metavar="NAME",
        help='another machine, for example "M4 Pro 24GB" or "MacBook Air M4" (default: this one)',
    )
    parser.add_argument(
        "--macs", metavar="NAME, NAME", help='over several Macs, yours first, for example "M4 Pro 48GB, M4 Pro 48GB"'
    )
    parser.add_argument(
        "--link", choices=["thunderbolt", "ethernet", "wifi"], help="what is between them (default: thunderbolt)"
    )
    parser.add_argument(
        "--layers", metavar="N,N,...", help="how many layers each of them gets (default: the fastest is filled first)"
    )
    parser.add_argument("--all-macs", action="store_true", help="a table of speeds on every Mac that is known")
    parser.add_argument(
        "--chart", metavar="FILE", help="draw that table, or the layers on --macs, into a .png or .svg file"
    )
    add_overwrite(parser)
    parser.add_argument("--memory-limit", metavar="SIZE", help="for example 8GB (default: what the machine has)")
    parser.add_argument(
        "--context-length", type=int, metavar="N", help="tokens of prompt and answer (default: 8,192 at most)"
    )
    parser.add_argument(
        "--requests", "--batch-size", dest="batch_size", type=int, metavar="N",
        help="plan for N requests at once, and say how many of which length fit and how fast they are (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens in flight at once (default: chosen)"
    )
    parser.add_argument(
        "--kv-bits", type=int, metavar="N", help="8: keys and values of full-attention layers in 8 bits"
    )
    add_preset_argument(parser)
    parser.add_argument(
        "--dense-bits", type=int, metavar="N", help="instead of a preset: 8, 6, 5 or 4 bits of dense matrices"
    )
    parser.add_argument(
        "--expert-slots", type=int, metavar="N", help="experts of each layer in memory (default: chosen)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="compute in this type")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="measure on this machine, with small random models, the speed of decoding and prefill (half a minute) and the "
        "memory for computing (some minutes); later plans use it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Plan and print. Returns 0 when everything fits, else 1."""
    from ..bench.chart import check_chart

    chart = check_chart(args.chart, args.overwrite)
    if args.calibrate:
        if args.mac is not None or args.all_macs or args.chart is not None:
            raise SettingError("--calibrate only measures this machine: leave --mac, --all-macs and --chart out.")
        return calibrate(as_json=args.json)
    if args.macs is None and (args.link is not None or args.layers is not None):
        raise SettingError("--link and --layers are for --macs: add it, or leave them out.")
    if args.macs is not None and (args.mac is not None or args.all_macs):
        raise SettingError("--macs names the Macs itself: leave --mac and --all-macs out.")
    if args.macs is None and args.mac is not None and (args.all_macs or args.chart is not None):
        raise SettingError(f"--mac {args.mac}: --all-macs and --chart have every Mac; leave one of them out.")
    from ..memory.machine import macs
    from ..planning import plan, plans_on

    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            "memory_limit", "context_length", "batch_size", "prefill_chunk", "kv_bits", "expert_slots", "dtype", "revision",
            "adapter",
        )
    }  # fmt: skip
    options["dense_bits"] = bits_asked_for(args)
    options["batch_size"] = 1 if args.batch_size is None else args.batch_size
    if args.macs is not None:
        return run_several(args, options, chart)
    if args.all_macs or args.chart is not None:
        from .plan_macs import draw, table

        every = list(macs())
        plans = [plans_on(every, source, as_released=not args.source, **options) for source in args.source or RELEASED]
        if chart is not None:
            draw(plans, chart, args.overwrite)
            say(f"The chart is in {chart}.")
        if args.json:
            report_json([each.as_dict() for row in plans for each in row])
        elif args.all_macs:
            report("\n".join(table(plans, shutil.get_terminal_size((80, 24)).columns)))
        return 0
    plans_here = [plan(source, mac=args.mac, **options) for source in args.source or [DEFAULT_MODEL]]
    if args.json:
        dicts = [each.as_dict() for each in plans_here]
        report_json(dicts[0] if len(dicts) == 1 else dicts)
    else:
        report("\n\n".join("\n".join(text(each, args.batch_size is not None)) for each in plans_here))
    return 0 if all(each.fits for each in plans_here) else 1


def run_several(args: argparse.Namespace, options: dict[str, Any], chart: Any) -> int:
    """`--macs`: each source over these Macs."""
    from ..planning import plan_several
    from .plan_several import draw, lines

    sources = args.source or [DEFAULT_MODEL]
    if chart is not None and len(sources) > 1:
        raise SettingError("--chart with --macs shows one model: give one.")
    plans = [plan_several(each, args.macs, args.link or "thunderbolt", args.layers, **options) for each in sources]
    if chart is not None:
        draw(plans[0], chart, args.overwrite)
        say(f"The chart is in {chart}.")
    if args.json:
        dicts = [each.as_dict() for each in plans]
        report_json(dicts[0] if len(dicts) == 1 else dicts)
    else:
        report("\n\n".join("\n".join(lines(each)) for each in plans))
    return 0


def text(plan: MemoryPlan, with_requests: bool = False) -> list[str]:
    """A plan for people: the verdict, the arithmetic, the settings, what else would do.

    with_requests: also what it says of several requests at once.
    """
    from ..checks import size
    from .plan_requests import request_lines

    machine = plan.machine
    assert machine is not None
    verdict = "fits" if plan.fits else "does not fit"
    if plan.fits and plan.expert_slots is not None:
        verdict = f"fits with {plan.expert_slots} of each layer's experts in memory and the others read from disk"
    requests, each = (f"{plan.batch_size:,} requests of ", " each") if plan.batch_size > 1 else ("", "")
    lines = [
        f"{plan.source} on {machine.name}: {verdict}",
        f"  memory            {size(machine.memory_bytes)}, of which a model may use {size(machine.available_bytes)}; "
        f"allowed here: {size(plan.memory_limit)}",
        *others_lines(plan),
        f"  weights           {size(plan.weights_bytes)}"
        + (f", of which {size(plan.adapter_bytes)} are the adapter" if plan.adapter_bytes else ""),
        f"  keys and values   {size(plan.kv_cache_bytes)} for {requests}{plan.context_length:,} tokens"
        + (f", {plan.kv_bits} bits on full layers" if plan.kv_bits else ""),
        f"  computing         {size(plan.scratch_bytes)} for {plan.prefill_chunk} prompt tokens at once"
        + (", or for the next token of each request" if each else ""),
        f"  process           {size(plan.process_bytes - plan.total_bytes)} with MLX's buffer cache",
        f"  together          {size(plan.process_bytes)}",
        f"  longest context   {plan.max_context_length:,} tokens{each} with these settings",
    ]
    lines += speed_lines(plan)
    if with_requests:
        lines += request_lines(plan)
    lines += variant_lines(plan)
    if machine.calibration is not None and machine.calibration.date:
        lines.append(f"  (what computing takes was measured on {machine.calibration.date})")
    elif machine.backend == "metal":
        lines.append("  (what Metal takes for computing was never measured: run plan --calibrate on a Mac)")
    lines += [
        f"  would fit         {typed(change.setting)}: {size(change.total_bytes)}; {change.cost}"
        for change in plan.changes
    ]
    if not plan.fits:
        lines.append(f"  least             a memory limit of {size(plan.least_bytes)} with these settings")
    if plan.advice is not None:
        lines.append(f"  or                {plan.advice}")
    return [*lines, *(f"  note              {note}" for note in machine.notes)]


def others_lines(plan: MemoryPlan) -> list[str]:
    """The memory used by other programs, if the model lacks it."""
    from ..checks import size

    machine = plan.machine
    assert machine is not None
    is_short = not plan.fits or plan.expert_slots is not None
    if (
        not is_short
        or plan.memory_limit != machine.available_bytes
        or machine.available_bytes >= machine.working_set_bytes
    ):
        return []
    return [
        f"  others            {size(machine.used_bytes)} are in use by other programs now: close some, and a model may use up "
        f"to {size(machine.working_set_bytes)}"
    ]


def speed_lines(plan: MemoryPlan) -> list[str]:
    """The expected speeds, at which context length, and what they are based on."""
    if not plan.fits:
        return []
    if plan.decode is None or plan.decode_at_start is None:
        return ["  (the speed of this machine is not known: run plan --calibrate)"]
    each = "" if plan.batch_size == 1 else f" for each of {plan.batch_size} requests"
    lines = [
        f"  decode            {plan.decode_at_start} tokens/s at the start, {plan.decode} at {plan.decode.tokens:,} tokens"
        + each
    ]
    if plan.prefill is not None:
        lines.append(f"  prefill           {plan.prefill} tokens/s for a prompt of {plan.prefill.tokens:,} tokens")
    return [*lines, f"  ({basis_of(plan)})"]


def variant_lines(plan: MemoryPlan) -> list[str]:
    """The presets in a table, and which one is recommended."""
    from ..checks import size

    if not plan.variants:
        return [] if plan.note is None else [f"  presets           {plan.note}"]
    demo = "demo-openelm" if plan.family == "openelm" else "demo-gpt-oss"
    header = ("preset", "memory", "experts", f"tokens/s at {plan.context_length:,}", f"next token, measured on {demo}")
    rows = [header]
    for each in plan.variants:
        experts = "" if plan.family == "openelm" else "all" if each.expert_slots is None else f"{each.expert_slots}"
        speed = "-" if each.decode is None else f"{each.decode}"
        if each.gain is not None:
            speed += f" ({100 * (each.gain - 1):+.0f} %)"
        quality = "as released" if each.dense_bits is None else "not measured"
        rows.append((
            f"{each.name}{' *' if each.is_advised else ''}", size(each.process_bytes),
            experts if each.fits else "no room", speed, quality if each.quality is None else str(each.quality),
        ))  # fmt: skip
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    table = aligned(list(zip(*columns, strict=True)))
    return ["  presets", *(f"    {line}" for line in [*table, *(f"({each})" for each in _about(plan))])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, the columns one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _about(plan: MemoryPlan) -> list[str]:
    """What has to be said under the presets."""
    from ..memory.presets import PRESETS

    advised = next(each for each in plan.variants if each.is_advised)
    meanings = (
        f"{PRESETS['balanced'].meaning}; smallest: in 4"
        if plan.family != "openelm"
        else "all matrices in 8 bits; smallest: in 4"
    )
    lines = [f"balanced: {meanings}; --preset NAME chooses, exact is the default"]
    if advised.name == "balanced":
        lines.append("* recommended; exact keeps every bit, smallest only if its quality is good enough for you")
    return lines


def basis_of(plan: MemoryPlan) -> str:
    """What a plan's speeds are based on, as a clause."""
    machine, decode = plan.machine, plan.decode
    assert machine is not None
    assert decode is not None
    chip, is_dense = machine.chip, plan.family == "openelm"
    laptops = "; a hot laptop or one in low power mode is slower"
    if decode.basis == "measured":
        assert machine.calibration is not None
        return f"measured on this machine on {machine.calibration.speed_date}{laptops}"
    if plan.expert_slots is not None:
        return f"an estimate: nobody has published gpt-oss with experts on a Mac's disk in this library{laptops}"
    if decode.basis == "published":
        return f"by published runs of this model on {chip} chips{laptops}"
    if decode.basis == "no run":
        what = "a dense model with MLX" if is_dense else "gpt-oss"
        return f"an estimate: no run of {what} on a plain {chip} was published{laptops}".replace(
            "a plain " if " " in chip else "", ""
        )
    if is_dense:
        return (
            f"by published runs of other dense models on {chip} chips; nobody has published OpenELM on a Mac{laptops}"
        )
    return f"by published runs of gpt-oss on {chip} chips, of another size or with dense parts in 8 or 4 bits{laptops}"


def calibrate(as_json: bool) -> int:
    """Measure small random models, and store speeds and memory corrections for later plans. Returns 0."""
    from ..bench.benchmark import machine_description
    from ..bench.memory import CALIBRATION_PROMPTS, CALIBRATION_SHAPES, HEADING, rows
    from ..bench.speeds import measured_speeds
    from ..memory.calibration import calibration_from, store_memory, store_speed
    from ..memory.machine import this_machine
    from ..models.precision import runs_on_cpu

    def tell(line: str) -> None:
        if not as_json:
            report(line)

    machine, date = this_machine(), time.strftime("%Y-%m-%d")
    tell(machine_description())
    tell("Speed, with small random models (about half a minute):")
    speeds = measured_speeds(machine)
    if speeds.rates or speeds.disk is not None:
        store_speed(speeds.rates, speeds.disk, machine, date)
    for line in speeds.lines():
        tell(f"  {line}")
    tell(HEADING)
    found = []
    for row in rows(CALIBRATION_SHAPES, CALIBRATION_PROMPTS, runs_on_cpu(), calibrated=False):
        found.append(row)
        tell(row.line())
    calibration = calibration_from(found, date)
    file = store_memory(calibration, machine)
    if as_json:
        measured = {**calibration.as_dict(), "rows": [row.as_dict() for row in found]}
        report_json({"file": str(file), **measured, "speed": speeds.as_dict()})
        return 0
    for family, factor in calibration.scratch.items():
        report(f"Computing with {family} takes {factor:.2f} times the memory that its shapes predict.")
    if calibration.process_bytes is not None:
        report(f"The process itself takes {calibration.process_bytes / 1e6:.0f} MB.")
    report(f"Later plans use this; it is kept in {file} until that file is deleted.")
    return 0
