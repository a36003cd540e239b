"""Apple's chips in Macs: bandwidth, arithmetic, memory sizes, SSDs. One table; nothing in it was measured here.

Bandwidth and cores are Apple's figures (logs of owners confirm the narrower bus of M4 Max and M5 Max); arithmetic is from
huggingface.js `hardware.ts`, scaled by cores if a chip has fewer. `memory/rates.py` uses them with published speeds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chip:
    """GB/s of memory, TFLOPS of the GPU, available memory sizes in GB, and the least and most GB/s of its SSDs."""

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
    """The chip in a device's name: "M3 Max" in "Apple M3 Max"."""
    return re.sub(r"^Apple ", "", device_name.strip())


def chip_of(name: str, memory_gb: int, cores: int | None = None) -> Chip | None:
    """The chip of this name ("M3 Max", "Apple M3 Max") in a Mac with `memory_gb` GB; None if it is not in the table.

    cores: of the GPU, if the machine reports them; else the memory distinguishes the smaller Max chip from the full one.
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


# --- what published speeds say of them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeTerms:
    """A token of decoding: seconds a layer however small it is, and the shares of the bandwidth at which weights and keys
    and values stream: `layer_seconds x layers + weights / (share x bandwidth) + keys and values / (share x bandwidth)`.
    """

    layer_seconds: float
    weights: float
    keys_values: float


@dataclass(frozen=True)
class PrefillTerms:
    """Prefill: the shares of the chip's TFLOPS that products with weights, and attention, reach; the least and the most."""

    weights: tuple[float, float]
    attention: tuple[float, float]


# (family, generation) -> terms. gpt-oss: least squares of the relative error over 50 published runs (49 on Pro, Max and
# Ultra chips) in published_speeds.tsv, llama.cpp's and MLX's: median error 4.5 %, worst 21 %. Keys and values stream slower
# than weights there. M1 Ultra has one run (89.5 tokens/s) and pays more for launches; MLX_MAX_OPS_PER_BUFFER moves it.
# OpenELM: 32 published runs of other dense models with MLX; nobody has published one of OpenELM on a Mac. Keys and values
# as gpt-oss's: the one dense series (M5 Max, 8k) was a quarter faster than that says.
DECODE_TERMS: dict[tuple[str, str], DecodeTerms] = {
    ("gpt_oss", "M1"): DecodeTerms(178e-6, 0.72, 0.21),
    ("gpt_oss", "M2"): DecodeTerms(178e-6, 0.72, 0.21),
    ("gpt_oss", "M3"): DecodeTerms(178e-6, 0.72, 0.21),
    ("gpt_oss", "M4"): DecodeTerms(99e-6, 0.72, 0.38),
    ("gpt_oss", "M5"): DecodeTerms(99e-6, 0.72, 0.38),
    ("gpt_oss", "M1 Ultra"): DecodeTerms(322e-6, 0.72, 0.21),
    ("openelm", "M1"): DecodeTerms(109e-6, 0.84, 0.21),
    ("openelm", "M2"): DecodeTerms(109e-6, 0.84, 0.21),
    ("openelm", "M3"): DecodeTerms(109e-6, 0.84, 0.21),
    ("openelm", "M4"): DecodeTerms(46e-6, 0.84, 0.38),
    ("openelm", "M5"): DecodeTerms(46e-6, 0.84, 0.38),
}

# generation -> terms. M1 to M3: MLX reached 0.32 to 0.46 on M1 Max and M2 Max, llama.cpp 0.6 to 0.8 on the same chips; M4:
# MLX 0.62 to 0.69 on M4 Max. M5's matrix units are not in the table's TFLOPS: 0.84 to 1.33 of them on M5 Max, 1.08 on M5.
# Attention: 0.28 fits llama.cpp's series from 2k to 32k; mlx-lm's runs at 21k were faster than that.
PREFILL_TERMS: dict[str, PrefillTerms] = {
    "M1": PrefillTerms((0.30, 0.65), (0.28, 0.6)),
    "M2": PrefillTerms((0.30, 0.65), (0.28, 0.6)),
    "M3": PrefillTerms((0.30, 0.65), (0.28, 0.6)),
    "M4": PrefillTerms((0.45, 0.70), (0.28, 0.6)),
    "M5": PrefillTerms((0.80, 1.35), (1.5, 5.0)),
}
# Products with 128 experts have fewer rows each: llama.cpp reached 0.51 with the 120b where it reached 0.71 with the 20b.
MANY_EXPERTS, MANY_EXPERTS_SHARE = 128, 0.72

# Factors for the least and the most speed: (family, what was published for the chip). 92 % of gpt-oss's runs lie within
# 0.85 to 1.15 of the fit without them, apps and warm laptops below it; base chips' one run (M5) is 15 % below it, M4's weak
# ones 20 to 35 %. Dense models: 33 of 36 runs lie within 0.75 to 1.25, and OpenELM is none of them.
SPREAD: dict[tuple[str, str], tuple[float, float]] = {
    ("gpt_oss", "runs"): (0.80, 1.15),
    ("gpt_oss", "no run"): (0.65, 1.15),
    ("gpt_oss", "base chip"): (0.65, 1.0),
    ("openelm", "runs"): (0.75, 1.25),
    ("openelm", "no run"): (0.65, 1.25),
    ("openelm", "base chip"): (0.65, 1.25),
}

# One wait for the router, where experts are read from disk: 0.2 to 0.35 ms are reported for an M4.
READ_BACK_SECONDS = 0.3e-3


def generation(chip: str) -> str:
    """ "M3" of "M3 Max"."""
    return chip.partition(" ")[0]


def decode_terms(family: str, chip: str) -> DecodeTerms | None:
    """A chip's own terms if it has some, else its generation's."""
    return DECODE_TERMS.get((family, chip)) or DECODE_TERMS.get((family, generation(chip)))
