"""What is measured of many requests at once, and the figures that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SettingError

# What is measured, and what part of the seconds each may take.
SHARES = {"decode": 0.38, "mixed": 0.32, "one": 0.08, "gap": 0.08, "together": 0.14}
PARTS = tuple(SHARES)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    numbers: of requests at once. prompt_tokens, completion_tokens: of each. long_prompt: tokens of the prompt that comes in
    while another request decodes; 0: 8,192, or 512 on a CPU. All are cut to what the context holds. rounds: at most.
    seconds: in all.
    """

    numbers: Sequence[int] = (1, 4, 8, 16, 32)
    prompt_tokens: int = 128
    completion_tokens: int = 64
    long_prompt: int = 0
    num_mixed: int = 64
    rounds: int = 3
    seconds: float = 60.0
    parts: Sequence[str] = PARTS

    def __post_init__(self) -> None:
        least_of = {"prompt_tokens": 2, "completion_tokens": 2, "long_prompt": 0, "rounds": 1, "num_mixed": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}: it must be at least {least}.")
        for each in self.parts:
            if each not in SHARES:
                raise SettingError(f"There is no part {each!r}: choose among {', '.join(PARTS)}.")


@dataclass
class Row:
    """One figure: name of a side -> its samples, the first of two over the second being the ratio.

    at_least: sides that were given up when the time was over, whose figure is larger. error: why there is none.
    """

    part: str
    what: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    at_least: set[str] = field(default_factory=set)
    note: str = ""
    error: str | None = None

    def add(self, side: str, value: float) -> None:
        self.samples.setdefault(side, []).append(value)

    @property
    def medians(self) -> dict[str, float]:
        return {side: statistics.median(each) for side, each in self.samples.items()}

    @property
    def ratio(self) -> float | None:
        """The first side's median over the second's; an upper bound where the second one is in `at_least`."""
        sides = list(self.samples)
        if len(sides) != 2 or sides[0] in self.at_least or not self.medians[sides[1]]:
            return None
        return self.medians[sides[0]] / self.medians[sides[1]]

    def line(self) -> str:
        """For people."""
        if self.error is not None:
            return f"{self.what:34} {self.error}"
        sides = [f"{side} {self._value(side):26}" for side in self.samples]
        ratio = "" if self.ratio is None else f"ratio {'< ' if self.at_least else ''}{self.ratio:.3g}"
        return "  ".join([f"{self.what:34}", *sides, ratio, self.note]).rstrip()

    def _value(self, side: str) -> str:
        values, sign = self.samples[side], "> " if side in self.at_least else ""
        text = f"{sign}{number(statistics.median(values))}"
        spread = f" [{number(min(values))} to {number(max(values))}]" if len(values) > 1 else ""
        return f"{text}{spread} {self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "at_least": sorted(self.at_least), "medians": self.medians, "ratio": self.ratio}


def number(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def titles(settings: Settings) -> dict[str, str]:
    """What each part's rows are about."""
    return {
        "decode": f"decode of N requests at once, tokens/s of all (prompts of {settings.prompt_tokens:,} tokens)",
        "mixed": f"{settings.num_mixed:,} requests at once of many lengths",
        "one": "one request in an engine, and by itself",
        "gap": "a request that decodes while a long prompt comes in: its longest gap between two tokens, and its usual one",
        "together": "N requests together, and one after the other, tokens/s of answers, prompts included",
    }
