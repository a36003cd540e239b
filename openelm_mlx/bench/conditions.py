"""What disturbs a measurement on a laptop: battery, low-power mode, heat, other work. Reported with every figure.

Each fact comes from a command or file of the system; if that is missing, the fact is left out, never guessed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..memory.machine import read_fact

# A program's standard output, or None when it does not exist or fails.
Run = Callable[[list[str]], str | None]

# With more load per core than this from other programs, figures scatter.
BUSY_LOAD = 0.5


def disturbances(
    system: str = sys.platform, run: Run | None = None, root: Path = Path("/"), load: float | None = None
) -> list[str]:
    """Sentences about what may distort the figures; empty if nothing is known to. Every source can be injected.

    load: the system's load average over a minute for each core.
    """
    run = run or _output
    found = list(_on_macos(run) if system == "darwin" else _on_linux(root))
    load = _load_per_core() if load is None else load
    if load is not None and load > BUSY_LOAD:
        found.append(f"other work runs: the load is {load:.1f} for each core")
    return found


def _on_macos(run: Run) -> Iterator[str]:
    if "Battery Power" in (run(["pmset", "-g", "batt"]) or ""):
        yield "the Mac runs on battery"
    mode = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", run(["pmset", "-g"]) or "", re.MULTILINE)
    if mode and mode[1] == "1":
        yield "low-power mode is on"
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", run(["pmset", "-g", "therm"]) or "")
    if limit and int(limit[1]) < 100:
        yield f"the Mac is hot: its speed is limited to {limit[1]} %"
    # 1 is normal, 2 a warning, 4 critical (xnu, bsd/kern/kern_memorystatus.c).
    pressure = (run(["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]) or "").strip()
    if pressure in ("2", "4"):
        yield f"memory is under {'a warning' if pressure == '2' else 'critical'} pressure"


def _on_linux(root: Path) -> Iterator[str]:
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    if any(read_fact(supply / "status") == "Discharging" for supply in supplies):
        yield "the machine runs on battery"
    governor = read_fact(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if (
        governor == "powersave"
        and read_fact(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver") != "intel_pstate"
    ):
        yield "the processor's governor is powersave"
    pressure = re.search(r"some avg10=([\d.]+)", read_fact(root / "proc/pressure/memory"))
    if pressure and float(pressure[1]) > 1:
        yield f"memory is under pressure ({pressure[1]} % of the last 10 s were spent waiting for it)"


def _load_per_core() -> float | None:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout if finished.returncode == 0 else None
