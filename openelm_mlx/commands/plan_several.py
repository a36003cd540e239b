"""`plan --macs`: a model over several Macs, as a table, and as a picture of layers on machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import aligned

if TYPE_CHECKING:
    from ..link.forecast import SeveralPlan

# Embedding and head, layers with full attention, those with a window, keys and values with what computing takes.
_COLOURS = {"embedding, head": "#8b6bb1", "layer": "#3b7dd8", "layer with a window": "#7fb2f0", "the rest": "#e39b2d"}


def lines(plan: SeveralPlan) -> list[str]:
    """The plan for people: who has what, what each form reaches, what to do."""
    from ..checks import size

    context = plan.parts[0].plan.context_length
    found = [f"{plan.source} on {len(plan.parts)} Macs over {plan.link.name}, with {context:,} tokens:"]
    rows = [["", "layers", "weights", "keys, values", "together", "may use"]]
    for part in plan.parts:
        own = part.plan
        count = part.stop - part.start
        weights = size(own.weights_bytes)
        if own.expert_slots is not None:
            weights += f" ({own.expert_slots} experts a layer)"
        rows.append([
            part.machine.name, f"{count}: {part.start} to {part.stop - 1}", weights, size(own.kv_cache_bytes),
            size(own.process_bytes), size(own.memory_limit),
        ])  # fmt: skip
    found += [f"  {line}" for line in aligned(rows)]
    found += ["", f"  decoding, tokens/s, with {context:,} tokens in use:"]
    forms = [
        (
            form.name,
            ("not known" if form.fits else "does not fit") if form.decode is None else str(form.decode),
            form.terms + ("" if form.is_ours else " (*)"),
        )
        for form in plan.forms
    ]
    found += [f"    {line}" for line in aligned(forms)]
    if plan.prefill is not None:
        found.append(f"  prefill by pipeline {plan.prefill} tokens/s: the slowest Mac's, each with a chunk of its own")
    found += ["", f"  {plan.verdict}"]
    counts = ",".join(map(str, plan.counts))
    found.append(
        f"  `serve-layers` on the others, and `--workers HOST:PORT,... --layers {counts}` here, gives the pipeline."
    )
    if any(form.is_ours and form.is_shared and form.fits for form in plan.forms):
        found.append(
            "  `mlx.launch` with `generate --parallel tensor` (or `experts`) shares each layer: see docs/several-macs.md."
        )
    if not all(form.is_ours for form in plan.forms):
        found.append("  (*) for comparison: a layer of this model has too few parts for so many Macs.")
    found.append("  (by published speeds of single Macs and reported latencies; no such pair was measured)")
    return found


def draw(plan: SeveralPlan, file: Path, overwrite: bool = False) -> None:
    """Each Mac is a bar as long as the memory that it may use, with its layers in it."""
    import matplotlib as mpl

    from ..bench.chart import save_chart

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(9, 1.7 + 0.75 * len(plan.parts)))
    for place, part in enumerate(plan.parts):
        _bar(axes, place, part)
    axes.set_yticks(
        range(len(plan.parts)),
        [f"{part.machine.name}\nlayers {part.start} to {part.stop - 1}" for part in plan.parts],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlabel("GB of memory that a model may use")
    axes.spines[["top", "right"]].set_visible(False)
    speed = plan.forms[0].decode
    told = "" if speed is None else f": {speed} tokens/s"
    axes.set_title(f"{plan.source} over {plan.link.name}{told}", fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in _COLOURS.items()], loc="lower center", ncols=4, fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save_chart(figure, file, overwrite, is_tight=False)


def _bar(axes: Any, place: int, part: Any) -> None:
    plan, spec = part.plan, part.spec
    axes.barh(place, plan.memory_limit / 1e9, color="#eeeeee", height=0.6)
    sizes = part.layer_bytes()
    scale = plan.weights_bytes / max(1, sum(sizes))  # what stays on disk is not in memory
    left = 0.0
    for number, nbytes in enumerate(sizes):
        if not nbytes:
            continue
        kind = "embedding, head" if number == 0 else "layer"
        if number and spec.layers[number - 1].window is not None:
            kind = "layer with a window"
        width = scale * nbytes / 1e9
        axes.barh(place, width, left=left, color=_COLOURS[kind], edgecolor="white", linewidth=0.6, height=0.6)
        left += width
    rest = (plan.process_bytes - plan.weights_bytes) / 1e9
    axes.barh(place, rest, left=left, color=_COLOURS["the rest"], height=0.6)
    left += rest
    axes.text(left, place, f" {left:.3g} of {plan.memory_limit / 1e9:.3g} GB", va="center", fontsize=7)
