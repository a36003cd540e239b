"""Which computers MLX runs on, and settings made before it starts. Nothing here imports it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from .errors import PlatformError

# The oldest macOS that MLX is built for.
OLDEST_MACOS = 14


def keep_float32(environment: MutableMapping[str, str] | None = None) -> None:
    """Have MLX compute float32 in float32, unless the user has set MLX_ENABLE_TF32.

    MLX lets matrix units round float32 to TF32's 10 bits (CUDA; M5 with macOS 26.2). gpt-oss's router decides near-ties
    in float32, and comparisons with Apple's and OpenAI's code are made in float32. MLX reads the variable at its first
    matrix product: a program that has made one before keeps its setting.
    """
    (os.environ if environment is None else environment).setdefault("MLX_ENABLE_TF32", "0")


def require_mlx(
    system: str | None = None, machine: str | None = None, translated: bool | None = None, release: str | None = None
) -> None:
    """Raise PlatformError with what is needed when this computer cannot run MLX. Every fact can be injected.

    release: of macOS, such as "14.5".
    """
    import platform  # here, because --help does not need it

    system, machine = system or platform.system(), machine or platform.machine()
    if system == "Darwin" and machine == "x86_64":
        if (_sysctl("sysctl.proc_translated") == "1") if translated is None else translated:
            raise PlatformError(
                "This Python runs under Rosetta as an Intel program, and MLX needs a native one: install Python for "
                "Apple silicon (arm64), for example with `brew install python` in a Terminal that is not set to Rosetta, "
                "and make a new virtual environment with it."
            )
        raise PlatformError(
            "This is an Intel Mac, and MLX runs on Apple silicon (M1 or later) only: use such a Mac, or Linux with "
            "`pip install 'mlx[cpu]'`."
        )
    if system == "Darwin":
        # The system tells a Python that was built for an old macOS 10.16 or 16; the kernel tells the real version.
        release = release or _sysctl("kern.osproductversion") or platform.mac_ver()[0]
        number = release.partition(".")[0]
        if number.isdecimal() and int(number) < OLDEST_MACOS:
            raise PlatformError(
                f"This Mac has macOS {release}, and MLX needs macOS {OLDEST_MACOS} or later: update it in System Settings, "
                "General, Software Update."
            )
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extra = "" if system == "Darwin" else "[cpu]"
        raise PlatformError(
            f"MLX cannot be imported ({error}): install it with `pip install 'mlx{extra}'` (macOS 14 or later on Apple "
            "silicon, or Linux)."
        ) from error


def use_device(environment: MutableMapping[str, str] | None = None) -> None:
    """Compute on the device in OPENELM_MLX_DEVICE, "cpu" or "gpu"; MLX's own choice where it is not set.

    Raises PlatformError for another name, and for "gpu" where there is none.
    """
    name = (os.environ if environment is None else environment).get("OPENELM_MLX_DEVICE")
    if not name:
        return
    import mlx.core as mx

    if name not in ("cpu", "gpu"):
        raise PlatformError(f"OPENELM_MLX_DEVICE is {name!r}: set it to cpu or gpu, or leave it out.")
    device = mx.Device(mx.cpu if name == "cpu" else mx.gpu)
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise PlatformError("OPENELM_MLX_DEVICE is gpu, and MLX finds none here: set it to cpu, or leave it out.")
    mx.set_default_device(device)


def available_cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sysctl(name: str) -> str:
    import subprocess  # here, because --help does not need it

    try:
        answer = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, errors="replace", check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
