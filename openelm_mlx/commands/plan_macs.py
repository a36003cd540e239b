"""`plan --all-macs` and `plan --chart`: every known Mac, and how fast each model should decode on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..memory.machine import Machine
    from ..memory.plan_types import MemoryPlan

Row = Sequence["MemoryPlan"]
WIDEST_LABEL = 16

# kind of a plan -> colour and words
_KINDS = {
    "whole": ("#3b7dd8", "all in memory"),
    "disk": ("#e39b2d", "some experts on disk"),
}


def table(plans: Sequence[Row], columns: int = 80) -> list[str]:
    """A table with a row for each Mac and a column for each model, at most `columns` characters wide.

    plans: of each model on every Mac. A cell is the least and the most tokens/s, followed by "d" with experts on disk, and by
    "?" if no run of such a model on that chip was published; "-" if it does not fit.
    """
    from ..memory.machine import GIB, working_set_of
    from ..memory.rates import number

    heads = [label(row) for row in plans]
    cells = [[cell(plan) for plan in row] for row in plans]
    machines = [machine_of(plan) for plan in plans[0]]
    reported = [working_set_of(round(each.memory_bytes / GIB))[1] for each in machines]
    memory = [
        f"{'' if is_reported else '~'}{number(each.available_bytes / 1e9, 3)}"
        for each, is_reported in zip(machines, reported, strict=True)
    ]
    names = [each.name for each in machines]
    body = [names, memory, *cells]
    titles = [["", "Mac"], ["room", "GB"], *heads]
    widths = [max(map(len, [*column, *title])) for column, title in zip(body, titles, strict=True)]
    gap = max(2, min(4, (columns - sum(widths)) // max(1, len(widths) - 1)))

    def line(texts: Sequence[str]) -> str:
        padded = [
            texts[0].ljust(widths[0]),
            *(each.rjust(width) for each, width in zip(texts[1:], widths[1:], strict=True)),
        ]
        return (" " * gap).join(padded).rstrip()

    lines = [*_wrapped(f"Decoding, tokens/s: {about(plans)}.", columns), ""]
    lines += [line([title[level] for title in titles]) for level in range(2)]
    last = ""
    for place, machine in enumerate(machines):
        if machine.chip.partition(" ")[0] != last:
            lines.append("")
            last = machine.chip.partition(" ")[0]
        lines.append(line([column[place] for column in body]))
    notes = [
        "d: only some experts fit into memory, and the others are read from the Mac's disk for each token that chooses them; "
        "no run of that with this library was published, so the range is an estimate.",
        "-: does not fit.",
        "?: no run of such a model on that chip was published, the range is an estimate.",
    ]
    if any(row[0].family == "openelm" for row in plans):
        notes.append("OpenELM: by runs of other dense models; nobody has published one of it on a Mac.")
    exact = [row for row in plans if _rests_on_fewer_bits(row)]
    if exact:
        models = ", ".join(short_name(row[0].source) for row in exact)
        notes.append(
            f"{models}: by runs with dense parts in 8 or 4 bits; nobody has published one as released on a Mac."
        )
    notes += [f"{short_name(row[0].source)}: {told.rstrip('.')}." for row in plans for told in _notes_of(row)]
    if not all(reported):
        notes.append("~: what macOS gives the GPU there is estimated.")
    return [*lines, "", *(each for note in notes for each in _wrapped(note, columns))]


def _rests_on_fewer_bits(row: Row) -> bool:
    """Whether these speeds are for a model as released, while published runs had rounded dense parts."""
    bases = {plan.decode.basis for plan in row if plan.decode is not None}
    return row[0].family == "gpt_oss" and row[0].dense_bits is None and "related" in bases and "published" not in bases


def _notes_of(row: Row) -> list[str]:
    """Notes about a source: about its presets, and notes that all machines' plans have in common."""
    told = [] if row[0].note is None else [row[0].note]
    return [*told, *(note for note in machine_of(row[0]).notes if all(note in machine_of(each).notes for each in row))]


def about(plans: Sequence[Row]) -> str:
    """What the speeds are for: context lengths and bits."""
    from ..memory.presets import PRESETS

    bits = plans[0][0].dense_bits
    meaning = next(
        (each.meaning for each in PRESETS.values() if each.dense_bits == bits), f"dense parts in {bits} bits"
    )
    contexts: dict[int, list[str]] = {}
    for row in plans:
        contexts.setdefault(row[0].context_length, []).append(short_name(row[0].source))
    lengths = [
        f"{length:,} tokens of context" + ("" if len(contexts) == 1 else f" ({_family(names)})")
        for length, names in contexts.items()
    ]
    return f"the least and the most with {' or '.join(lengths)}; {meaning}"


def _family(names: Sequence[str]) -> str:
    """The common part of several names: OpenELM for OpenELM-270M and OpenELM-3B."""
    first = {name.rpartition("-")[0] for name in names}
    return first.pop() if len(first) == 1 and "" not in first else ", ".join(names)


def short_name(source: str) -> str:
    """A repository's name without its owner, or a folder's without its path."""
    return Path(source).name or source


def label(row: Row) -> list[str]:
    """A model's name on two lines: gpt-oss over 20b."""
    name = short_name(row[0].source).replace("1_1B", "1.1B")
    above, _, below = name.rpartition("-")
    if not above or len(below) > len(above) + 4:
        above, below = "", name
    return [each if len(each) <= WIDEST_LABEL else f"{each[: WIDEST_LABEL - 3]}..." for each in (above, below)]


def cell(plan: MemoryPlan) -> str:
    """One plan in a few characters: "47-60", "0.8-15d", "-"."""
    if not plan.fits:
        return "-"
    mark = "d" if plan.expert_slots is not None else ""
    if plan.decode is None:
        return f"fits{mark}"
    if plan.decode.basis == "no run":
        mark = mark or "?"
    return f"{speeds(plan)}{mark}"


def speeds(plan: MemoryPlan, between: str = "-") -> str:
    """The range, short."""
    assert plan.decode is not None
    return str(plan.decode).replace(" to ", between)


def machine_of(plan: MemoryPlan) -> Machine:
    """The machine of a plan, which is never None here."""
    assert plan.machine is not None
    return plan.machine


def _wrapped(text: str, columns: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(40, columns), break_on_hyphens=False)


# --- the chart --------------------------------------------------------------------------------------------------------


def draw(plans: Sequence[Row], file: Path, overwrite: bool = False) -> None:
    """The table as a picture: a column a model, a line a Mac, each range a bar on the model's own scale."""
    import matplotlib as mpl

    from ..bench.chart import save_chart

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    machines = [machine_of(plan) for plan in plans[0]]
    places = _places(machines)
    width, height = 1.6 + 2.15 * len(plans), 1.6 + 0.19 * (places[-1] + 1)
    figure, axes = plt.subplots(1, len(plans), sharey=True, figsize=(max(6.5, width), height), squeeze=False)
    for panel, row in zip(axes[0], plans, strict=True):
        _panel(panel, row, machines, places)
    left = axes[0][0]
    left.set_yticks(places, [each.name for each in machines], fontsize=7.5)
    left.set_ylim(places[-1] + 0.8, -0.8)
    figure.suptitle(f"Decoding, tokens/s: {about(plans)}", fontsize=10, y=0.995)
    figure.legend(handles=_legend(plans), loc="lower center", ncols=4 if width > 9 else 2, fontsize=8, frameon=False)
    figure.subplots_adjust(
        left=1.15 / max(6.5, width), right=0.985, top=1 - 0.85 / height, bottom=0.75 / height, wspace=0.08
    )
    save_chart(figure, file, overwrite, is_tight=False)


def _places(machines: Sequence[Machine]) -> list[float]:
    """Where each Mac's line is, generations a little apart."""
    places: list[float] = []
    for number, machine in enumerate(machines):
        is_new = number > 0 and machine.chip.partition(" ")[0] != machines[number - 1].chip.partition(" ")[0]
        places.append((places[-1] + 1 if places else 0) + (0.7 if is_new else 0))
    return places


def _panel(axes: Any, row: Row, machines: Sequence[Machine], places: Sequence[float]) -> None:
    most = max((plan.decode.high for plan in row if plan.fits and plan.decode), default=1.0)
    for plan, place in zip(row, places, strict=True):
        if not plan.fits or plan.decode is None:
            axes.text(
                0.01 * most,
                place,
                "does not fit" if not plan.fits else "fits",
                va="center",
                fontsize=6,
                color="#999999",
            )
            continue
        colour = _KINDS["whole" if plan.expert_slots is None else "disk"][0]
        is_guess = plan.decode.basis == "no run"
        axes.barh(
            place, plan.decode.high - plan.decode.low, left=plan.decode.low, height=0.62, color="white" if is_guess else colour,
            edgecolor=colour, hatch="//////" if is_guess else None, linewidth=0.8,
        )  # fmt: skip
        axes.text(plan.decode.high + 0.02 * most, place, speeds(plan, "–"), va="center", fontsize=6.5, color="#222222")
    axes.set_xlim(0, 1.32 * most)
    above, below = label(row)
    axes.set_title(f"{above} {below}".strip() + f"\nat {row[0].context_length:,} tokens", fontsize=9)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(plans: Sequence[Row]) -> list[Any]:
    from matplotlib.patches import Patch

    colours = {name: _KINDS[name][0] for name in _KINDS}
    found = [Patch(color=colours["whole"], label=_KINDS["whole"][1])]
    if any(plan.fits and plan.expert_slots is not None for row in plans for plan in row):
        found.append(Patch(color=colours["disk"], label=_KINDS["disk"][1]))
    guess = "estimate: no run of such a model on that chip was published"
    found.append(Patch(facecolor="white", edgecolor="#555555", hatch="//////", label=guess))
    return found
