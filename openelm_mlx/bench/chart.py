"""A comparison as a chart: a bar for each side of a measure, its median with the spread of the samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..outputs import PROGRAM, checked_output, output_file, picture_of_ours

WHAT = "The chart"
TYPES = (".png", ".svg")
_COLOURS = {"ours": "#3b7dd8", "mlx-lm": "#b9c0c9"}

Samples = Mapping[str, Mapping[str, Sequence[float]]]


def check_chart(file: str | None, overwrite: bool = False) -> Path | None:
    """Check the file of a chart before anything is measured. Raises SettingError for an unknown type, and DestinationError."""
    if file is None:
        return None
    path = Path(file)
    if path.suffix not in TYPES:
        raise SettingError(f"--chart {file}: the name must end in {' or '.join(TYPES)}.")
    checked_output(file, WHAT, picture_of_ours, overwrite)
    try:
        import matplotlib  # noqa: F401, ICN001 - only whether it is there
    except ImportError:
        raise SettingError("A chart needs matplotlib: pip install 'openelm_mlx[chart]'.") from None
    return path


def save_chart(figure: Any, file: Path, overwrite: bool = False, is_tight: bool = True) -> None:
    """Write a matplotlib figure and close it; is_tight: its parts are moved until none overlaps. Raises DestinationError."""
    from matplotlib import pyplot as plt

    kind = file.suffix.removeprefix(".")
    # Marks the file as ours, so that the next chart may replace it.
    metadata = {"Software": PROGRAM} if kind == "png" else {"Title": PROGRAM}
    if is_tight:
        figure.tight_layout()
    try:
        with output_file(file, WHAT, picture_of_ours, overwrite) as stream:
            figure.savefig(stream, dpi=150, format=kind, metadata=metadata)
    finally:
        plt.close(figure)


def draw_bars(file: Path, title: str, samples: Samples, overwrite: bool = False) -> None:
    """A group of bars for each measure (name -> whose -> tokens a second), one below the other, each on its own scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(samples), 1, figsize=(7.5, 0.6 + 1.15 * len(samples)), squeeze=False)
    for axes, (measure, sides) in zip(rows[:, 0], samples.items(), strict=True):
        for y, (whose, values) in enumerate(sorted(sides.items(), reverse=True)):
            median = statistics.median(values)
            spread = [[median - min(values)], [max(values) - median]]
            axes.barh(
                y, median, xerr=spread, height=0.7, color=_COLOURS.get(whose, "#888888"), ecolor="#333333", capsize=3
            )
            axes.text(0, y, f"  {whose} {median:,.4g}", va="center", ha="left", fontsize=8, color="black")
        axes.set_yticks([])
        axes.set_title(f"{measure}{_times(sides)}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right", "left"]].set_visible(False)
    rows[-1, 0].set_xlabel("tokens a second: the median, and the least to the most", fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_chart(figure, file, overwrite)


def _times(sides: Mapping[str, Sequence[float]]) -> str:
    if not sides.get("ours") or not sides.get("mlx-lm"):
        return ""
    return f": {statistics.median(sides['ours']) / statistics.median(sides['mlx-lm']):.2f} times"
