"""Presets: how much of a model's quality is traded for memory and speed. One table for all commands and calls."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import SettingError
from ..files import shown


class Preset(NamedTuple):
    """dense_bits: bits for matrices that the source has not quantized; None leaves them. meaning: in words.

    These are gpt-oss's attention, embedding and head (its experts stay in MXFP4 as released, routers and norms unquantized) and
    all matrices of OpenELM. For a conversion it is the recipe with this many bits.
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

# How often the demos' likeliest next token stays the same, copied from quality.tsv, which would be too slow to read for help.
KEPT = {"balanced": "97 to 98 %", "smallest": "75 to 83 %"}

HELP = "; ".join(
    f"{name}: {preset.meaning}" + (f" ({KEPT[name]} of the demos' likeliest tokens stay)" if name in KEPT else "")
    for name, preset in PRESETS.items()
) + (" (gpt-oss: attention, embedding and head, experts never; OpenELM: all matrices)")


def preset_bits(preset: str | None, bits: Any = None, spelled: tuple[str, str] = ('preset="{}"', "dense_bits")) -> Any:
    """The bits of a preset, or `bits` (or a recipe) if there is no preset.

    spelled: the names of the preset and of the bits for errors. Raises SettingError for an unknown preset, and for both at
    once.
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
