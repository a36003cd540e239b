"""One way to load a source, beside the others: a row of the table that `plan` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .quality import Quality
from .rates import SpeedRange


@dataclass(frozen=True)
class Variant:
    """One way to load a source. Bytes of the whole process.

    name: of the preset, or "6 bits" where other bits were asked for. expert_slots: experts of each layer in memory, None:
    all. decode: at the plan's context. gain: how many times as fast as "exact" by the middles, None where not known.
    quality: measured on the family's demo; None of "exact", and of bits that were not measured.
    """

    name: str
    dense_bits: int | None
    fits: bool
    process_bytes: int
    expert_slots: int | None
    decode: SpeedRange | None
    gain: float | None
    quality: Quality | None
    is_advised: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            **vars(self),
            "decode": None if self.decode is None else self.decode.as_dict(),
            "quality": None if self.quality is None else self.quality.as_dict(),
        }
