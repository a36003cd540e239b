"""Presets: how much of a model's quality is given for memory and speed. One table, which every command and call reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from ..files import shown


@dataclass(frozen=True)
class Preset:
    """dense_bits: what matrices are rounded to that the source has not packed; None leaves them. meaning: in words.

    Those are gpt-oss's attention, embedding and head - its experts stay in the MXFP4 they were released in, and routers and
    norms as they are - and all matrices of OpenELM. Converted, it is the recipe of so many bits.
    """

    dense_bits: int | None
    meaning: str


# No preset touches keys and values: at 8,192 tokens of gpt-oss-20b 8 bits save 0.09 GB of 12, and attention over packed keys
# took 2.8 times as long (docs/LOG.md). `plan` offers kv_bits where they make a model fit, and they go with every preset.
PRESETS = {
    "exact": Preset(None, "as released"),
    "balanced": Preset(8, "dense parts in 8 bits"),
    "smallest": Preset(4, "dense parts in 4 bits"),
}

# How often the demos' likeliest next token stays what it was, by quality.tsv, which no help has the time to read: fewer bits
# are offered with their figure beside them.
KEPT = {"balanced": "97 to 98 %", "smallest": "75 to 83 %"}

HELP = "; ".join(
    f"{name}: {preset.meaning}" + (f" ({KEPT[name]} of the demos' likeliest tokens stay)" if name in KEPT else "")
    for name, preset in PRESETS.items()
) + (" (gpt-oss: attention, embedding and head, experts never; OpenELM: all matrices)")


def preset_bits(preset: str | None, bits: Any = None, spelled: tuple[str, str] = ('preset="{}"', "dense_bits")) -> Any:
    """The bits of a preset; `bits` (or a recipe), which were asked for themselves, where there is none.

    spelled: how the place where it was asked calls the preset and the bits. Raises SettingError for a name that is none,
    and for both at once.
    """
    if preset is None:
        return bits
    if not isinstance(preset, str) or preset not in PRESETS:
        raise SettingError(f"preset is {shown(preset)}: choose {', '.join(PRESETS)}, or leave it out.")
    if bits is not None:
        asked = spelled[0].format(preset)
        raise SettingError(
            f"{asked} says the bits of dense parts, and so does {spelled[1]} ({bits}): give one of them."
        )
    return PRESETS[preset].dense_bits
