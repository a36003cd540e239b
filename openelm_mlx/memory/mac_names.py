"""Reading names of Macs: "M4 Pro 24GB", "MacBook Air M4", "mac studio m3 ultra", "m4pro-24"."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import SettingError
from ..files import shown
from .chips import CHIPS

# Removed from a name in this order: they do not describe the chip, and some would be mistaken for one ("MacBook Pro").
_NOTHING_OF_THE_CHIP = (
    r"\b(?:19|20)\d\d\b",  # a year
    r"\b\d+(?:[.,]\d+)? ?(?:inch(?:es)?\b|in\b|[\"\u2033\u201d])",
    r"\b\d+(?:[.,]\d+)? ?tb\b(?: ?(?:ssd|disk|storage|flash|drive))?",
    r"\b\d+ ?gb? ?(?:ssd|disk|storage|flash|drive)\b",
    # A number after it is the screen's size, unless "GB" follows.
    r"\b(?:mac ?book ?air|mba)\b(?: 1[35]\b(?! ?g))?",
    r"\b(?:mac ?book ?pro|mbp)\b(?: 1[346]\b(?! ?g))?",
    r"\bimac\b(?: 24\b(?! ?g))?",
    r"\bmac ?(?:book|mini|studio|pro)\b|\bmac\b",
    r"\b\d+ ?cores?(?! ?gpu)(?: ?cpu)?\b",
    r"\b(?:apple|silicon|chip|with|and|of|the|a|an|my|early|mid|late|unified|memory|ram|base|laptop|desktop|computer)\b",
)
_CORES = r"\b(\d+) ?cores? ?gpu\b"
_CHIP = r"\bm ?(\d+) ?(pro|max|ultra)?(?![a-z])"
_MEMORY = r"\b(\d+) ?(gb?|gib)\b|\b(\d+)\b"


class NamedMac(NamedTuple):
    """The chip in the table, its memory in GB, its GPU's cores (None: not given), and whether the memory was given."""

    chip: str
    memory_gb: int
    cores: int | None
    has_memory: bool


def parse_mac(name: str) -> NamedMac:
    """The Mac of this name; with the smallest memory of its chip if none is given.

    Raises SettingError, with the valid choices, for a chip that is not in the table, for two chips, for a memory size that the
    chip does not come with, and for an unknown word.
    """
    if not isinstance(name, str):
        raise SettingError(f'mac is {shown(name)}: give the name of a Mac, for example "M4 Pro 24GB".')
    rest = re.sub(r"[\s_\-\u2010-\u2015(),;/+:|\u00a0]+", " ", name.lower()).strip()
    rest = re.sub(r"(?<=[a-z]{3})(?=\d)|(?<=\d)(?=(?:pro|max|ultra|inch|core|gb|tb|cpu|gpu)\b)", " ", rest)
    for pattern in _NOTHING_OF_THE_CHIP:
        rest = re.sub(pattern, " ", rest)
    rest = " ".join(rest.split())
    cores = re.search(_CORES, rest)
    rest = re.sub(_CORES, " ", rest)
    chips = {f"M{number}{f' {kind.title()}' if kind else ''}" for number, kind in re.findall(_CHIP, rest)}
    rest = re.sub(_CHIP, " ", rest)
    memories = [(int(with_unit or bare), bool(with_unit)) for with_unit, _, bare in re.findall(_MEMORY, rest)]
    words = re.sub(_MEMORY, " ", rest).split()
    if len(chips) > 1:
        raise SettingError(f"The Mac {name!r} has {len(chips)} chips, {' and '.join(sorted(chips))}: name one of them.")
    chip = next(iter(chips), None)
    if chip not in CHIPS or words:
        unknown = f", and {' '.join(words)!r} is not understood" if words and chip in CHIPS else ""
        raise SettingError(
            f"There is no Mac {name!r} in the table{unknown}; there are {', '.join(CHIPS)}, each with its memory where that "
            'matters, for example "M4 Pro 24GB" (plan --all-macs lists all).'
        )
    known = CHIPS[chip].memories
    named = {number for number, has_unit in memories if has_unit} or {number for number, _ in memories}
    if len(named) > 1:
        raise SettingError(f"The Mac {name!r} has {' and '.join(map(str, sorted(named)))} GB: name one of them.")
    if not named <= set(known):
        raise SettingError(
            f"There is no {chip} with {next(iter(named))} GB in the table ({name!r}); it comes with {sizes(known)} (plan "
            "--all-macs lists all)."
        )
    gpu_cores = None if cores is None else int(cores[1])
    if gpu_cores is not None and not 1 <= gpu_cores <= CHIPS[chip].cores:
        raise SettingError(f"The GPU of an {chip} has {CHIPS[chip].cores} cores at most, and {name!r} has {gpu_cores}.")
    return NamedMac(chip, next(iter(named), known[0]), gpu_cores, bool(named))


def sizes(memories: tuple[int, ...]) -> str:
    """Memories in words: "16, 24 or 32 GB"."""
    *most, last = map(str, memories)
    return f"{', '.join(most)} or {last} GB" if most else f"{last} GB"
