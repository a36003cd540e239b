"""Checks 1, 10, 11, 12 and 15: what the machine says about itself, its memory, and its disk."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.released import write_released_headers
from ..generate import stream_generate
from ..loading import load
from ..memory.chips import chip_name, chip_of
from ..memory.machine import GIB, this_machine
from ..memory.macos import Run, footprint, gpu_cores, on_macos, output, sysctl, sysctl_number, used_bytes
from ..models.precision import runs_on_cpu
from ..planning import plan as plan_of
from ..platforms import OLDEST_MACOS
from .conditions import disturbances
from .disk import cold_rate, disk_rates, random_file
from .fresh import run_fresh
from .selfcheck import CheckFailed, Clock, NotHere

GB = 1e9
NOT_KNOWN = "not on this machine"


# --- 1: facts ---------------------------------------------------------------------------------------------------------


def facts(
    info: Mapping[str, Any] | None = None,
    run: Run | None = None,
    is_mac: bool | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Facts about the machine that matter for kernels, memory and limits; None for missing ones. All can be injected.

    They identify nobody: no name of a user or a machine, no folder, no serial number.
    """
    info = mx.device_info() if info is None else info
    run = output if run is None else run
    is_mac = on_macos() if is_mac is None else is_mac
    machine = this_machine(info, backend, run, is_mac=is_mac)
    soft, hard = _file_limits()
    brand = sysctl(run, "machdep.cpu.brand_string") if is_mac else str(info.get("device_name") or "")
    known = chip_of(brand, round(machine.memory_bytes / GIB)) is not None
    return {
        "openelm_mlx": _version("openelm_mlx"), "mlx": _version("mlx"), "backend": machine.backend,
        "system": (f"macOS {_macos(run)}" if is_mac else platform.system()),
        "model": (sysctl(run, "hw.model") or None) if is_mac else None,
        "chip": brand or None,
        "architecture": str(info.get("architecture") or "") or None,
        "gpu_cores": gpu_cores(run) if is_mac else None,
        "memory_bytes": machine.memory_bytes,
        "working_set_bytes": int(info.get("max_recommended_working_set_size", 0)) or None,
        "largest_buffer_bytes": int(info.get("max_buffer_length", 0)) or None,
        "wired_limit_mb": sysctl_number(run, "iogpu.wired_limit_mb") if is_mac else None,
        "used_bytes": machine.used_bytes,
        "open_files": {"soft": soft, "hard": hard},
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}, {_build()}",
        "float32": "TF32 where the GPU has it" if os.environ.get("MLX_ENABLE_TF32") == "1" else "float32",
        "known_chip": is_mac and known,
    }  # fmt: skip


def facts_lines(found: Mapping[str, Any]) -> list[str]:
    """The facts for people, one a line."""

    def size(key: str) -> str:
        return NOT_KNOWN if not found[key] else f"{found[key] / GB:.2f} GB"

    files = found["open_files"]
    return [
        f"openelm_mlx {found['openelm_mlx']}, mlx {found['mlx']} ({found['backend']}), {found['system']}",
        f"chip {found['chip'] or NOT_KNOWN}, model {found['model'] or NOT_KNOWN}, architecture "
        f"{found['architecture'] or NOT_KNOWN}, GPU cores {found['gpu_cores'] or NOT_KNOWN}",
        f"memory {size('memory_bytes')}, used {size('used_bytes')}, working set {size('working_set_bytes')}, largest buffer "
        f"{size('largest_buffer_bytes')}",
        f"iogpu.wired_limit_mb {NOT_KNOWN if found['wired_limit_mb'] is None else found['wired_limit_mb']}, open files "
        f"{files['soft']} (at most {files['hard']}), {found['float32']}",
        f"Python {found['python']}",
    ]


def check_facts(clock: Clock, found: Mapping[str, Any] | None = None) -> str:
    """Every fact that such a machine has is known, and its macOS is not too old."""
    found = facts() if found is None else found
    wanted = ["chip", "architecture", "memory_bytes"]
    if found["backend"] == "metal":
        wanted += ["working_set_bytes", "largest_buffer_bytes", "gpu_cores", "wired_limit_mb"]
    missing = [name for name in wanted if found[name] is None or (found[name] == 0 and name != "wired_limit_mb")]
    if missing:
        raise CheckFailed(f"not known: {', '.join(missing)}")
    number = re.match(r"macOS (\d+)", found["system"])
    if found["system"].startswith("macOS") and (number is None or int(number[1]) < OLDEST_MACOS):
        raise CheckFailed(f"{found['system']}, and MLX needs macOS {OLDEST_MACOS}")
    told = list(disturbances())
    unknown = found["system"].startswith("macOS") and not found["known_chip"]
    return (
        "all known"
        + ("" if not unknown else f"; {chip_name(found['chip'])} is not in the table of chips")
        + (f"; timings may be distorted: {', '.join(told)}" if told else "")
    )


def _file_limits() -> tuple[int | str, int | str]:
    import resource

    soft, hard = (
        "unlimited" if each == resource.RLIM_INFINITY else each for each in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def _macos(run: Run) -> str:
    number, build = sysctl(run, "kern.osproductversion") or platform.mac_ver()[0], sysctl(run, "kern.osversion")
    return f"{number} ({build})" if build else number


def _version(package: str) -> str:
    if package == "openelm_mlx":
        from .. import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build() -> str:
    """Which kind of Python, without where it is."""
    prefix = os.path.realpath(sys.base_prefix)
    kinds = {
        "/Library/Frameworks/": "python.org", "/opt/homebrew": "Homebrew", "/usr/local/Cellar": "Homebrew",
        "/opt/local": "MacPorts", "/uv/": "uv", "/.pyenv/": "pyenv", "conda": "conda", "/mise/": "mise", "/Xcode": "Xcode",
    }  # fmt: skip
    kind = next((name for part, name in kinds.items() if part in prefix), "another build")
    return f"{kind}, {platform.python_compiler()}"


# --- 10: wired limit --------------------------------------------------------------------------------------------------


def check_wired_limit(
    clock: Clock, module: Any = mx, answers: Callable[[int], int] | None = None, charged: Callable[[], Any] = footprint
) -> str:
    """Set the wired limit to a model's size, give 200 short answers, and restore it: memory must be as before. Metal only.

    answers: gives this many answers and returns how many there was time for; charged: the process's footprint.
    """
    if not module.metal.is_available():
        raise NotHere("the wired limit is Metal's")
    answers = _demo_answers(clock) if answers is None else answers
    answers(2)  # one-time allocations happen here
    module.clear_cache()
    active, before_footprint = module.get_active_memory(), charged()
    wanted = 256 * 2**20
    before = module.set_wired_limit(wanted)
    try:
        done = answers(200)
        held = module.set_wired_limit(wanted)
    finally:
        module.set_wired_limit(before)
    module.clear_cache()
    grown = module.get_active_memory() - active
    after_footprint = charged()
    if held != wanted:
        raise CheckFailed(f"the wired limit was set to {wanted:,} bytes and read back as {held:,}")
    if grown > 2**20:
        raise CheckFailed(f"after {done} answers {grown:,} bytes more are in use")
    more = 0 if before_footprint is None or after_footprint is None else after_footprint.now - before_footprint.now
    if more > 200 * 2**20:
        raise CheckFailed(f"after {done} answers the footprint is {more / 1e6:,.0f} MB larger")
    return (
        f"{done} answers under {wanted:,} bytes; back at {before:,}: {grown:,} bytes are more in use, and the footprint is "
        f"{more / 1e6:,.1f} MB larger"
    )


def _demo_answers(clock: Clock) -> Callable[[int], int]:
    model, tokenizer = load("demo-openelm", context_length=256)

    def answers(count: int) -> int:
        for number in range(count):
            for _ in stream_generate(model, tokenizer, "What is a banjo?", max_tokens=4):
                pass
            if not clock.has(3):
                return number + 1
        return count

    return answers


# --- 11: peaks --------------------------------------------------------------------------------------------------------


def check_peaks(clock: Clock) -> str:
    """After one request in a process of its own: MLX's peak, `ru_maxrss`, and what the system charges the process with."""
    if this_machine().backend == "cuda":
        raise NotHere("the GPU has its own memory, which the process's peak does not include")
    found = run_fresh("openelm_mlx.bench.selfcheck_machine", "peaks", what="A process that measured its peaks")
    seen = ", ".join(f"{name} {each / 1e6:,.0f} MB" for name, each in found.items() if name != "plan")
    if found["the process's"] < found["MLX's"]:
        raise CheckFailed(f"the process's peak is below MLX's: {seen}")
    name = "the lifetime footprint" if on_macos() else "VmHWM"
    return f"{seen}; plans go by {name}; the plan said {found['plan'] / 1e6:,.0f} MB"


def _peaks() -> dict[str, int]:
    import resource

    from ..memory.machine import process_peak_bytes

    model, tokenizer = load("demo-gpt-oss", context_length=512)
    *_, last = stream_generate(model, tokenizer, "What is a piano?", max_tokens=32)
    assert last.statistics is not None
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if on_macos() else 1024)
    return {
        "MLX's": last.statistics.peak_memory_bytes, "ru_maxrss": rss, "the process's": process_peak_bytes(),
        "plan": model.plan.process_bytes,
    }  # fmt: skip


# --- 12: disk ---------------------------------------------------------------------------------------------------------


def check_disk(clock: Clock) -> str:
    """A file of random bytes comes back as it was written, out of the cache and in it, by 1 to 16 threads."""
    num_bytes = 2**30 if on_macos() or not runs_on_cpu() else 2**26
    rates = disk_rates(num_bytes, has_time=lambda: clock.has(10))
    seen = ", ".join(f"{each.cold / GB:.2g} and {each.warm / GB:.2g} by {each.threads}" for each in rates)
    cold = cold_rate(rates)
    if cold is None and on_macos():
        raise CheckFailed(
            f"msync does not drop a file from the cache: cold figures mean nothing (GB/s, cold and warm: {seen})"
        )
    return f"GB/s, cold and warm: {seen}" + ("; the cold ones came out of a cache" if cold is None else "")


# --- 15: used memory --------------------------------------------------------------------------------------------------


def check_used_memory(clock: Clock, run: Run = output, is_mac: bool | None = None) -> str:
    """What plans take for used, beside what macOS says; and a file that has been read counts for nothing."""
    is_mac = on_macos() if is_mac is None else is_mac
    seen = []
    if is_mac:
        seen.append(_beside_memory_pressure(run))
    with tempfile.TemporaryDirectory() as place:
        headers = Path(place) / "headers"
        write_released_headers(headers, "openai/gpt-oss-20b")
        # Other programs come and go meanwhile: the best of three.
        num_bytes = 2**30 if is_mac else 2**28
        moved: list[tuple[int, bool]] = []
        while len(moved) < 3 and (not moved or clock.has(8)):
            with random_file(num_bytes) as (path, _):
                before = plan_of(headers)
                for _ in range(2):
                    with path.open("rb", buffering=0) as stream:
                        while stream.read(16 * 2**20):
                            pass
                after = plan_of(headers)
            assert before.machine is not None
            assert after.machine is not None
            moved.append((abs(after.machine.used_bytes - before.machine.used_bytes), before.fits == after.fits))
            if moved[-1][0] < num_bytes // 4:
                break
    least, same = min(moved)
    if least > num_bytes // 2:
        raise CheckFailed(
            "; ".join([*seen, f"a file of {num_bytes / GB:.2f} GB was read, and {least / GB:.2f} GB more are used"])
        )
    verdict = "the same verdict" if same else "another verdict, for other programs' sake"
    return "; ".join(
        [
            *seen,
            f"a file of {num_bytes / GB:.2f} GB was read twice: used memory moved by {least / GB:.2f} GB, {verdict}",
        ]
    )


def _beside_memory_pressure(run: Run) -> str:
    free = re.search(r"free percentage:\s*(\d+)", run(["memory_pressure", "-Q"]) or "")
    memory, ours = sysctl_number(run, "hw.memsize"), used_bytes(run(["vm_stat"]) or "")
    if free is None or not memory:
        return "memory_pressure says nothing here"
    theirs = memory * (100 - int(free[1])) / 100
    said = f"used {ours / GB:.1f} GB by vm_stat's parts, {theirs / GB:.1f} GB by memory_pressure"
    # Its percent is a whole one: of large memories a hundredth is more than 1 GB.
    if abs(ours - theirs) > max(GB, 0.02 * memory):
        raise CheckFailed(said)
    return said


if __name__ == "__main__":
    from openelm_mlx.platforms import use_device

    use_device()
    sys.stdout.write(json.dumps(_peaks()))
