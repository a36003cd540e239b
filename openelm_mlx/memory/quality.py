"""The measured effect of quantizing the dense parts: quality.tsv, which a plan shows beside its presets.

`python -m benchmarks.quality` measures it, in a clone (benchmarks/measurements/quality.py says how).
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Quality:
    """A model with dense parts in `bits` bits compared with the original, over `positions` next-token distributions.

    text: the text that was read; "random": random weights and tokens, which show how errors grow with real widths. kl,
    largest_kl: of the original's distribution from the quantized one's, in nats. same_top: share of positions with the same
    likeliest token. logits_error: rms of the logits' difference over rms of the logits.
    """

    family: str
    model: str
    text: str
    bits: int
    positions: int
    kl: float
    largest_kl: float
    same_top: float
    logits_error: float
    date: str
    command: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{percent(self.same_top)} same, KL {self.kl:.2g}"


@lru_cache
def measured_quality() -> tuple[Quality, ...]:
    """All of quality.tsv."""
    text = resources.files(__package__).joinpath("quality.tsv").read_text(encoding="utf-8")
    return tuple(
        Quality(
            row["family"], row["model"], row["text"], int(row["bits"]), int(row["positions"]), float(row["kl"]),
            float(row["largest_kl"]), float(row["same_top"]), float(row["logits_error"]), row["date"], row["command"],
        )
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
    )  # fmt: skip


def quality_of(family: str, bits: int | None) -> Quality | None:
    """The worst result over all texts for a family's demo with dense parts in `bits` bits."""
    rows = [row for row in measured_quality() if (row.family, row.bits) == (family, bits) and row.text != "random"]
    return max(rows, key=lambda row: row.kl, default=None)


def percent(share: float) -> str:
    """A share for people, as 100 % only if it is exactly that: 99.93 %, 98.2 %, 87 %."""
    value = 100 * share
    return "100 %" if value == 100 else f"{min(value, 99.99):.2f} %" if value >= 99 else f"{value:.1f} %"
