"""Apple's chips as Macs have them: bandwidth, arithmetic, memories, SSDs. One table; none of it was measured here.

Bandwidth and cores as Apple publishes them (the narrower bus of M4 Max and M5 Max was seen in logs of their owners, too);
arithmetic from huggingface.js `hardware.ts`, by cores where a chip has fewer. What published speeds say of them stands in
`memory/rates.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chip:
    """GB/s of memory, TFLOPS of the GPU, GB of the memories it comes with, and the least and most GB/s of its SSDs."""

    bandwidth: float
    teraflops: float
    memories: tuple[int, ...]
    ssd: tuple[float, float]
    cores: int = 0


# Sequential reads as reviews report them (MacRumors, Tom's Hardware, The Verge; of M2's 256 GB, M5 and M5 Pro people who
# read experts from them). The smallest SSDs of a chip read slower than the large one that was reviewed: where one figure
# is known, the range goes down to 70 % of it. Of M3 Pro, M4 Pro, M2 Ultra and M3 Ultra nobody published one: their range
# is that of their neighbours.
CHIPS: dict[str, Chip] = {
    "M1": Chip(68, 2.6, (8, 16), (2.7, 2.9), 8),
    "M1 Pro": Chip(200, 5.2, (16, 32), (4.1, 5.8), 16),
    "M1 Max": Chip(400, 10.4, (32, 64), (4.1, 5.8), 32),
    "M1 Ultra": Chip(800, 21, (64, 128), (4.8, 6.9), 64),
    "M2": Chip(100, 3.6, (8, 16, 24), (1.5, 3.0), 10),
    "M2 Pro": Chip(200, 6.8, (16, 32), (3.8, 5.4), 19),
    "M2 Max": Chip(400, 13.5, (32, 64, 96), (3.7, 5.3), 38),
    "M2 Ultra": Chip(800, 27.2, (64, 128, 192), (3.7, 6.9), 76),
    "M3": Chip(100, 4.1, (8, 16, 24), (2.3, 3.0), 10),
    "M3 Pro": Chip(150, 7.4, (18, 36), (2.0, 5.5), 18),
    "M3 Max": Chip(400, 14.2, (36, 48, 64, 96, 128), (3.9, 5.5), 40),
    "M3 Ultra": Chip(819, 28.4, (96, 256, 512), (3.9, 7.3), 80),
    "M4": Chip(120, 4.6, (16, 24, 32), (1.6, 2.9), 10),
    "M4 Pro": Chip(273, 9.2, (24, 48, 64), (2.0, 7.3), 20),
    "M4 Max": Chip(546, 18.4, (36, 48, 64, 128), (5.1, 7.3), 40),
    "M5": Chip(153, 5.7, (16, 24, 32), (5.5, 6.3), 10),
    "M5 Pro": Chip(307, 11.4, (24, 48, 64), (9.0, 12.8), 20),
    "M5 Max": Chip(614, 22.8, (36, 48, 64, 128), (9.5, 13.6), 40),
}

# Max chips with the smaller GPU have a narrower bus; Apple pairs it with these memories. (cores, GB/s, memories)
_NARROW: dict[str, tuple[int, float, tuple[int, ...]]] = {
    "M3 Max": (30, 300.0, (36, 96)),
    "M4 Max": (32, 410.0, (36,)),
    "M5 Max": (32, 460.0, (36,)),
}


def chip_name(device_name: str) -> str:
    """The chip that a device's name means: "M3 Max" of "Apple M3 Max"."""
    return re.sub(r"^Apple ", "", device_name.strip())


def chip_of(name: str, memory_gb: int, cores: int | None = None) -> Chip | None:
    """The chip called so ("M3 Max", "Apple M3 Max") in a Mac with so many GB; None for one that is not in the table.

    cores: of the GPU, where the machine says so; else the memory tells a narrow Max chip from a whole one.
    """
    name = chip_name(name)
    chip = CHIPS.get(name)
    if chip is None:
        return None
    if name in _NARROW:
        few, bandwidth, memories = _NARROW[name]
        if (cores <= few) if cores else memory_gb in memories:
            chip = replace(chip, bandwidth=bandwidth, cores=cores or few)
    cores = cores or chip.cores
    return replace(chip, cores=cores, teraflops=round(CHIPS[name].teraflops * cores / CHIPS[name].cores, 2))
