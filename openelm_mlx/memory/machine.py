"""A machine's memory, memory in use, bandwidth and arithmetic: of this machine, or any Mac by name.

Figures of Macs: working sets as reported from `device_info` dumps and logs of llama.cpp on recent macOS; chips from
`memory/chips.py`. None of them was measured here; what is not known is None, and what is estimated says so in `notes`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .chips import CHIPS, chip_name, chip_of
from .mac_names import parse_mac, sizes
from .macos import Run, footprint, gpu_cores, on_macos, output, sysctl, sysctl_number, used_bytes
from .measured import Calibration

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A machine that a model may run on. Sizes in bytes, rates in bytes and operations a second; None: not known.

    working_set_bytes: what the GPU may use at once (`max_recommended_working_set_size`); all memory on other backends.
    used_bytes: what other programs use now. backend: "metal", "cuda" or "cpu". chip: Apple's name, "M4 Pro". ssd: the lowest
    and highest read rate of its SSD. calibration: the results of `plan --calibrate`, see `calibrated`.
    """

    name: str
    backend: str
    memory_bytes: int
    working_set_bytes: int
    used_bytes: int = 0
    bandwidth: float | None = None
    flops: float | None = None
    ssd: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    chip: str = ""

    @property
    def ssd_bandwidth(self) -> float | None:
        """The middle of the SSD's range of read rates."""
        return None if self.ssd is None else sum(self.ssd) / 2

    @property
    def available_bytes(self) -> int:
        """The memory that a model may use: the working set, or less if other programs use more than the rest."""
        return max(0, min(self.working_set_bytes, self.memory_bytes - self.used_bytes))


# Reported `max_recommended_working_set_size` on recent macOS, by GB of memory. Those of 256 and 512 GB leave 48 GiB.
WORKING_SETS = {
    16: 12_713_120_000, 24: 19_069_670_000, 32: 26_800_600_000, 36: 30_150_672_384, 48: 40_200_896_512,
    64: 55_662_788_608, 128: 115_448_730_000, 256: 223_338_299_392, 512: 498_216_206_336,
}  # fmt: skip


def working_set_of(memory_gb: int) -> tuple[int, bool]:
    """The working set of a Mac with `memory_gb` GB, and whether it was reported (else estimated from other sizes)."""
    if memory_gb in WORKING_SETS:
        return WORKING_SETS[memory_gb], True
    fraction = 2 / 3 if memory_gb <= 8 else 0.74 if memory_gb <= 24 else 0.78 if memory_gb <= 48 else 0.81
    return int(memory_gb * GIB * fraction), False


def macs() -> Iterator[Machine]:
    """Every Mac in the table."""
    for name, chip in CHIPS.items():
        for memory in chip.memories:
            yield _mac(name, memory)


def find_mac(name: str) -> Machine:
    """The Mac of that name: "M4 Pro 24GB", "m4pro-24", "MacBook Air M4" (with its smallest memory, and a note about it).
    Raises SettingError with the valid choices.
    """
    found = parse_mac(name)
    machine = _mac(found.chip, found.memory_gb, found.cores)
    others = CHIPS[found.chip].memories
    if found.has_memory or len(others) == 1:
        return machine
    note = (
        f"an {found.chip} comes with {sizes(others)}; the smallest is assumed, since {name!r} does not give one: "
        f'add it, for example "{found.chip} {others[-1]}GB"'
    )
    return replace(machine, notes=(*machine.notes, note))


def _mac(name: str, memory_gb: int, cores: int | None = None) -> Machine:
    chip = chip_of(name, memory_gb, cores)
    assert chip is not None
    working_set, is_reported = working_set_of(memory_gb)
    notes = () if is_reported else (f"the working set of {memory_gb} GB is estimated, not reported by anyone",)
    return Machine(
        f"{name} {memory_gb}GB", "metal", memory_gb * GIB, working_set,
        # macOS and a browser; the GPU's working set comes on top of it.
        used_bytes=min(4 * GIB, memory_gb * GIB // 4),
        bandwidth=chip.bandwidth * 1e9, flops=chip.teraflops * 1e12, ssd=(chip.ssd[0] * 1e9, chip.ssd[1] * 1e9),
        notes=notes, chip=name,
    )  # fmt: skip


def this_machine(
    device_info: Mapping[str, Any] | None = None,
    backend: str | None = None,
    run: Run | None = None,
    root: Path = Path("/"),
    is_mac: bool | None = None,
) -> Machine:
    """This machine, as MLX and the system describe it now. Every source can be injected."""
    if device_info is None or backend is None:
        import mlx.core as mx

        device_info = mx.device_info() if device_info is None else device_info
        backend = backend_name() if backend is None else backend
    run = output if run is None else run
    name = str(device_info.get("device_name") or "this machine")
    is_mac = on_macos() if is_mac is None else is_mac
    if backend == "metal" or (backend == "cpu" and is_mac):
        return _this_mac(name, device_info, run, backend)
    memory, used = _linux_memory(root)
    if backend == "cuda":
        total = int(device_info.get("total_memory") or memory)
        return Machine(name, "cuda", total, int(0.95 * total), total - int(device_info.get("free_memory") or total))
    return Machine(name, "cpu", memory, memory, used)


def own_machine() -> Machine:
    """`this_machine`, where what this process has in MLX's memory is not another program's."""
    import mlx.core as mx

    machine, ours = this_machine(), mx.get_active_memory() + mx.get_cache_memory()
    return replace(machine, used_bytes=max(0, machine.used_bytes - ours))


def process_peak_bytes() -> int:
    """The peak memory of this process, everything in it counted."""
    import resource

    charged = footprint()
    if charged is not None:  # macOS's ru_maxrss counts pages of files that were read, and no buffers of the GPU
        return charged.peak
    # On Linux ru_maxrss starts with the parent process's value; VmHWM does not.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    # Bytes on macOS, KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if on_macos() else 1024)


# Shards, sockets and a tool's pipes need no more.
ENOUGH_OPEN_FILES = 4096


def allow_open_files(wanted: int = ENOUGH_OPEN_FILES) -> int:
    """Raise this process's limit of open files to `wanted`, or as far as allowed; return the limit. Never lowers it.

    macOS gives a program started in a Terminal a limit of 256, which it may raise without bound.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft >= most:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # the system's own bound is below what the limit says
        return soft
    return most


@lru_cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim  # glibc's; it keeps what was freed, otherwise
    except (OSError, AttributeError, TypeError):
        return None
    return trim


def give_back_freed() -> None:
    """Return freed memory to the system on the CPU backend, where MLX uses C's allocator."""
    import mlx.core as mx

    mx.clear_cache()
    trim = _trim()
    if trim is not None:
        trim(0)


def backend_name() -> str:
    """What MLX computes with now: "cpu", "metal" or "cuda"."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _this_mac(name: str, info: Mapping[str, Any], run: Run, backend: str) -> Machine:
    """This Mac. If the CPU is MLX's default device, MLX reports no memory and another name."""
    memory = int(info.get("memory_size", 0)) or sysctl_number(run, "hw.memsize") or _memory_of_the_system()
    if backend == "metal":
        working_set = int(info.get("max_recommended_working_set_size", 0)) or working_set_of(round(memory / GIB))[0]
        working_set = sysctl_number(run, "iogpu.wired_limit_mb") * 2**20 or working_set
    else:
        name, working_set = sysctl(run, "machdep.cpu.brand_string") or name, memory
    chip = chip_of(name, round(memory / GIB), gpu_cores(run))
    return Machine(
        f"{name} {round(memory / GIB)}GB", backend, memory, min(working_set, memory),
        min(memory, used_bytes(run(["vm_stat"]) or "")),
        # A plan uses these two for the GPU.
        None if chip is None or backend != "metal" else chip.bandwidth * 1e9,
        None if chip is None or backend != "metal" else chip.teraflops * 1e12,
        None if chip is None else (chip.ssd[0] * 1e9, chip.ssd[1] * 1e9),
        chip="" if chip is None else chip_name(name),
    )  # fmt: skip


def _memory_of_the_system() -> int:
    """Bytes of memory according to the C library; 0 if it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _linux_memory(root: Path) -> tuple[int, int]:
    """(memory, used by others): of the machine, or of the container if that has less."""
    found: list[tuple[str, str]] = re.findall(r"^(\w+):\s+(\d+) kB", read_fact(root / "proc/meminfo"), re.MULTILINE)
    fields = dict(found)
    total = int(fields.get("MemTotal", 0)) * 1024
    used = total - int(fields.get("MemAvailable", fields.get("MemFree", 0))) * 1024
    total = total or _memory_of_the_system()  # /proc may be hidden
    for limit_file, usage_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit = read_fact(root / limit_file)
        if limit.isdigit() and int(limit) < total:
            usage = read_fact(root / usage_file)
            return int(limit), int(usage) if usage.isdigit() else 0
    return total, used


def wired_limit_advice(machine: Machine, needed_bytes: int) -> str | None:
    """The sysctl command that would let the GPU use `needed_bytes`, with its risk; None if it would not help.

    macOS needs some gigabytes itself whatever the limit is: the advice never exceeds the memory less max(4 GiB, an eighth).
    """
    most = machine.memory_bytes - max(4 * GIB, machine.memory_bytes // 8)
    if machine.backend != "metal" or not machine.working_set_bytes < needed_bytes <= most:
        return None
    megabytes = -(-needed_bytes // 2**20) + 256
    return (
        f"sudo sysctl iogpu.wired_limit_mb={megabytes}   (until the next restart; macOS may become slow or stop when other "
        "programs need that memory: close them first)"
    )


def read_fact(file: Path) -> str:
    """The text of one of the system's files; "" where it cannot be read."""
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""
