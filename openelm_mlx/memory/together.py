"""Several requests at once, as a plan speaks of them: how many fit, how long each may be, what a step of all of them costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .rates import SpeedRange

# Lengths of which a plan says how many requests fit at once.
LENGTHS = (1024, 2048, 8192, 32768)
# What the short requests of a mixture have, prompt and answer.
SHORT = 2048


@dataclass(frozen=True)
class Fit:
    """Requests of one length. num_tokens: of each, prompt and answer. most: how many fit at once, 0: not even one.

    decode: tokens a second of each, decode_total: of all together, with so much in every cache; None where the machine's
    rates are not known, or none fits.
    """

    num_tokens: int
    most: int
    decode: SpeedRange | None = None
    decode_total: SpeedRange | None = None

    def as_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True)
class Mixture:
    """One long request and others: one of up to `longest` tokens beside `num_others` of `others` tokens each."""

    longest: int
    num_others: int
    others: int


@dataclass(frozen=True)
class ExpertReads:
    """What a step of several rows reads from disk where experts stay there, every expert being equally likely.

    touched: different experts of a layer that the rows choose, missing: of these, how many are not in memory; num_bytes: of
    all layers. slow, fast: seconds, by what the disk may read; None where that is not known.
    """

    rows: int
    touched: float
    missing: float
    num_bytes: int
    slow: float | None = None
    fast: float | None = None


@dataclass(frozen=True)
class Together:
    """What a plan says of several requests at once, with its own chunk and experts in memory.

    num_requests: those that were asked for. longest: how many tokens each of them may have, 0 when they do not fit.
    decode, decode_total, alone: tokens a second of each, of all, and of one that is alone, at the plan's context. reads,
    reads_alone: None with all experts in memory. kept_bytes: what is left for kept prompts when every request is as long as
    the plan's context; they give way to requests.
    """

    num_requests: int
    longest: int
    lengths: tuple[Fit, ...]
    mixture: Mixture | None = None
    decode: SpeedRange | None = None
    decode_total: SpeedRange | None = None
    alone: SpeedRange | None = None
    reads: ExpertReads | None = None
    reads_alone: ExpertReads | None = None
    kept_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            **_plain(self),
            "lengths": [each.as_dict() for each in self.lengths],
            **{
                name: None if value is None else asdict(value)
                for name, value in vars(self).items()
                if name in ("mixture", "reads", "reads_alone")
            },
        }


def _plain(holder: Any) -> dict[str, Any]:
    return {name: value.as_dict() if isinstance(value, SpeedRange) else value for name, value in vars(holder).items()}
