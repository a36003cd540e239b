"""What a run found: JSON for programs, a Markdown table for people, a chart of ours beside what was published."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bench.chart import save_chart
from ..errors import PromptError
from ..outputs import json_with
from .texts import read_text

FORMAT = "openelm_mlx evaluation 1"


@dataclass(frozen=True)
class Row:
    """One figure. value, error, published: in per cent where is_share, else as they are.

    shots, version: of the task. published: Apple's or OpenAI's figure. usual: what is set beside it. For answers: no_final,
    how many had none; analysis_tokens, the mean of a question; tokens, seconds: of all of them together.
    """

    task: str
    metric: str
    value: float
    error: float | None
    n: int
    shots: int | None = None
    effort: str | None = None
    version: str = ""
    task_set: str | None = None
    published: float | None = None
    is_share: bool = True
    usual: bool = True
    no_final: int | None = None
    analysis_tokens: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows comparable."""
        return self.task, self.metric, self.shots, self.effort


@dataclass
class Report:
    """A run. settings: what it was made with, in words that say how to repeat it. notes: sentences below the table."""

    model: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "model": self.model, "settings": self.settings, "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows], "notes": self.notes,
        }  # fmt: skip

    def text(self) -> str:
        """The JSON file."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"


# Whether a file is a report of ours.
recognized = json_with("format", FORMAT)


def read_report(name: str) -> Report:
    """A report from its file. Raises PromptError for one that is broken."""
    text = read_text(name)
    try:
        content = json.loads(text)
        assert content["format"] == FORMAT
        rows = [Row(**row) for row in content["rows"]]
        return Report(str(content["model"]), dict(content["settings"]), rows, float(content["seconds"]))
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError):
        raise PromptError(
            f"{name!r} is no complete report of `openelm_mlx evaluate`: give a file that --report wrote."
        ) from None


def markdown(report: Report) -> str:
    """The table, with what it was made with above it and its notes below."""
    lines = [f"# {report.model}", "", _settings_line(report), ""]
    for task_set in dict.fromkeys(row.task_set for row in report.rows):
        rows = [row for row in report.rows if row.task_set == task_set]
        if task_set is not None:
            lines += [f"## {task_set}", ""]
        lines += [*table(rows), ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table of the rows; columns that no row has are left out."""
    columns: dict[str, list[str]] = {
        "task": [row.task for row in rows],
        "effort": [row.effort or "" for row in rows],
        "shots": ["" if row.shots is None else str(row.shots) for row in rows],
        "metric": [row.metric for row in rows],
        "ours": [_with_error(row.value, row.error) for row in rows],
        "published": ["" if row.published is None or not row.usual else f"{row.published:.2f}" for row in rows],
        "difference": [
            f"{row.value - row.published:+.2f}" if row.published is not None and row.usual else "" for row in rows
        ],
        "n": [f"{row.n:,}" for row in rows],
        "no final": ["" if row.no_final is None else str(row.no_final) for row in rows],
        "analysis tokens": ["" if row.analysis_tokens is None else f"{row.analysis_tokens:,.0f}" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return markdown_table(shown)


def markdown_table(columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose columns are aligned."""
    names = list(columns)
    widths = [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    yield "| " + " | ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)) + " |"
    yield "| " + " | ".join("-" * width for width in widths) + " |"
    for cells in zip(*columns.values(), strict=True):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def compared(before: Report, now: Report) -> Iterator[str]:
    """A table of two runs: what both have, the difference, and its error where both have one."""
    earlier = {row.key: row for row in before.rows}
    pairs = [(earlier[row.key], row) for row in now.rows if row.key in earlier]
    if not pairs:
        yield f"{before.model} has no figure in common with {now.model}."
        return
    columns = {
        "task": [b.task for _, b in pairs], "metric": [b.metric for _, b in pairs],
        "effort": [b.effort or "" for _, b in pairs],
        before.model: [_with_error(a.value, a.error) for a, _ in pairs],
        (now.model if now.model != before.model else "now"): [_with_error(b.value, b.error) for _, b in pairs],
        "difference": [f"{b.value - a.value:+.2f} ± {math.hypot(a.error or 0, b.error or 0):.2f}" for a, b in pairs],
    }  # fmt: skip
    yield from markdown_table({name: cells for name, cells in columns.items() if any(cells)})


def draw(report: Report, file: Path, overwrite: bool = False) -> None:
    """A bar for each figure with its error, and a mark where the published one is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in report.rows if row.is_share and (row.usual or row.published is None)][::-1]
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.32 * max(1, len(rows))))
    places = range(len(rows))
    axes.barh(
        places, [row.value for row in rows], xerr=[row.error or 0 for row in rows], color="#3b7dd8", height=0.65,
        ecolor="#333333", capsize=2, label="ours, with its standard error",
    )  # fmt: skip
    known = [(place, row.published) for place, row in zip(places, rows, strict=True) if row.published is not None]
    if known:
        axes.scatter(
            [value for _, value in known],
            [at for at, _ in known],
            marker="D",
            color="#d9722e",
            zorder=3,
            label="published",
        )
    labels = [" ".join(filter(None, (row.task, row.effort, f"({row.metric})"))) for row in rows]
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.set_xlabel("per cent", fontsize=8)
    axes.set_title(report.model, fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    save_chart(figure, file, overwrite)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _settings_line(report: Report) -> str:
    said = [f"{name} {value}" for name, value in report.settings.items() if value not in (None, "", {}, [])]
    return "; ".join([*said, f"{report.seconds:,.0f} seconds"]) + "."
