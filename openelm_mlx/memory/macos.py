"""Facts from macOS about the system and a process: sysctl, vm_stat, ioreg, and the memory footprint.

All macOS-specific queries are here, and every answer can be injected, so that they are tested without a Mac.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# A program's standard output, or None when it does not exist or fails.
Run = Callable[[list[str]], str | None]

DEFAULT_PAGE_BYTES = 16384
# bsd/sys/resource.h: which of its structures `proc_pid_rusage` fills.
_RUSAGE_INFO_V4 = 4


def on_macos() -> bool:
    """Whether this is macOS. The only place that checks, so that tests can override it."""
    return sys.platform == "darwin"


def output(command: list[str]) -> str | None:
    """The `Run` of this machine; returns None for everything if this is not a Mac."""
    if not on_macos():
        return None
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def sysctl(run: Run, name: str) -> str:
    """The kernel's value of that name; empty if there is none."""
    return (run(["sysctl", "-n", name]) or "").strip()


def sysctl_number(run: Run, name: str) -> int:
    """The same as a number; 0 if it is not one."""
    text = sysctl(run, name)
    return int(text) if text.isdigit() else 0


def used_bytes(vm_stat: str) -> int:
    """The memory of a Mac that programs and the system cannot give up, from the output of `vm_stat`; 0 if it is unreadable.

    That is wired pages, anonymous pages of programs except purgeable ones, and the compressor's pages. Cached pages of files,
    however active, do not count: the system drops them when memory is needed, so a checkpoint that was read before does not
    reduce the room for itself.
    """
    found = re.search(r"page size of (\d+)", vm_stat)
    page = DEFAULT_PAGE_BYTES if found is None else int(found[1])
    names = ("Pages wired down", "Anonymous pages", "Pages purgeable", "Pages occupied by compressor")
    wired, anonymous, purgeable, compressor = (_pages(vm_stat, name) or 0 for name in names)
    return page * (wired + max(0, anonymous - purgeable) + compressor)


def _pages(vm_stat: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+)", vm_stat, re.MULTILINE)
    return None if found is None else int(found[1])


def gpu_cores(run: Run) -> int | None:
    """The number of GPU cores, which the device's name does not tell; None if it cannot be read."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', run(["ioreg", "-r", "-c", "AGXAccelerator", "-d", "1"]) or "")
    return None if found is None else int(found[1])


class Footprint(NamedTuple):
    """Bytes of memory charged to a process, now and at its peak: with buffers of the GPU, compressed and swapped pages, without
    cached pages of files. Activity Monitor shows it, and macOS kills a process for it.
    """

    now: int
    peak: int


class _RusageInfo(ctypes.Structure):
    """`struct rusage_info_v4`, with room behind it."""

    _fields_ = [
        ("uuid", ctypes.c_uint8 * 16),
        *((name, ctypes.c_uint64) for name in (
            "user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size",
            "phys_footprint", "proc_start_abstime", "proc_exit_abstime", "child_user_time", "child_system_time",
            "child_pkg_idle_wkups", "child_interrupt_wkups", "child_pageins", "child_elapsed_abstime",
            "diskio_bytesread", "diskio_byteswritten", "cpu_time_qos_default", "cpu_time_qos_maintenance",
            "cpu_time_qos_background", "cpu_time_qos_utility", "cpu_time_qos_legacy", "cpu_time_qos_user_initiated",
            "cpu_time_qos_user_interactive", "billed_system_time", "serviced_system_time", "logical_writes",
            "lifetime_max_phys_footprint", "instructions", "cycles", "billed_energy", "serviced_energy",
            "interval_max_phys_footprint", "runnable_time",
        )),
        ("room", ctypes.c_uint64 * 32),
    ]  # fmt: skip


def footprint(pid: int | None = None, library: Any = None) -> Footprint | None:
    """The memory footprint of a process of this user (None: of this one). None if it cannot be read, or has ended.

    library: with `proc_pid_rusage`; None: macOS's own.
    """
    library = _system_library() if library is None else library
    if library is None:
        return None
    info = _RusageInfo()
    if library.proc_pid_rusage(os.getpid() if pid is None else pid, _RUSAGE_INFO_V4, ctypes.byref(info)) != 0:
        return None
    return Footprint(info.phys_footprint, info.lifetime_max_phys_footprint)


# sys/mman.h, of macOS and of Linux.
_MS_INVALIDATE = 2


def forget_file(path: Path, library: Any = None) -> None:
    """Drop a file from the system's file cache on macOS, which has no posix_fadvise.

    That is done through a shared memory map of it; F_NOCACHE would leave what is cached already.
    """
    library = _system_library() if library is None else library
    if library is None or not path.stat().st_size:
        return
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = library.msync(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size), _MS_INVALIDATE)
        del view  # or the map cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"{path} stays in the system's file cache")


@lru_cache
def _system_library() -> Any:
    if not on_macos():
        return None
    try:
        library = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
        library.proc_pid_rusage.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        library.proc_pid_rusage.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library
