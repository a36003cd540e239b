"""Sandboxes for the python tool: which one this machine has, and the command line that starts an interpreter in it.

macOS has sandbox-exec; Linux has bubblewrap if it is installed, and else the kernel's namespaces, which sandbox_init.py
uses directly. In all of them there is no network, one writable folder, and of the rest of the disk only what Python itself
needs. python_process.py starts, watches and ends the processes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import ToolError
from . import sandbox_mac
from .sandbox_usage import MOST_FILES

SANDBOX_EXEC, BUBBLEWRAP, NAMESPACES, NONE = "sandbox-exec", "bubblewrap", "namespaces", "none"
SANDBOXES = SANDBOX_EXEC, BUBBLEWRAP, NAMESPACES, NONE
KEPT = (BUBBLEWRAP, NAMESPACES)  # sandboxes that stay, with their files, when an interpreter ends

# The folder that gpt-oss was trained to use; a Mac cannot show a folder under another name.
DATA_FOLDER = "/mnt/data"

# System files that dynamic linking, time zones and Python's own tools need on Linux.
_LINUX_READABLE = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/mime.types",
)  # fmt: skip
_DEVICES = ("null", "zero", "full", "random", "urandom")

# Loads the modules of the standard library that are linked to libraries of their own, and prints where all came from.
_LIST_LIBRARIES = """
import ctypes, importlib, sys
for name in ("_ssl", "_hashlib", "_sqlite3", "_lzma", "_bz2", "zlib", "_decimal", "readline", "_curses", "pyexpat", "_dbm"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
if sys.platform == "darwin":
    system = ctypes.CDLL(None)
    system._dyld_get_image_name.restype = ctypes.c_char_p
    paths = [system._dyld_get_image_name(i).decode() for i in range(system._dyld_image_count())]
else:
    paths = [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line]
print("\\n".join(path for path in dict.fromkeys(paths) if path.startswith("/")))
"""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a session. seconds: wall-clock time of one script. memory_bytes: of all its processes together.

    processes: at a time. file_bytes: size of one file; folder_bytes: of the scratch folder, which on Linux is in memory
    too. output_bytes: how much of a script's output is shown.
    """

    seconds: float = 120.0
    memory_bytes: int = 2 << 30
    processes: int = 32
    open_files: int = 128
    file_bytes: int = 1 << 28
    folder_bytes: int = 1 << 30
    output_bytes: int = 16_384

    def as_resources(self) -> dict[str, int]:
        """The limits that the kernel keeps for each process, by their names in `resource`."""
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_CPU": 3600,
            "RLIMIT_CORE": 0,
        }


@cache
def linked_libraries(executable: str) -> tuple[str, ...]:
    """The paths of the shared libraries that an interpreter and its standard library load; () if they cannot be listed."""
    command = [executable, "-I", "-B", "-S", "-c", _LIST_LIBRARIES]
    try:
        finished = subprocess.run(command, capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    paths = os.fsdecode(finished.stdout).splitlines()
    return tuple(path for path in paths if finished.returncode == 0 and path.startswith("/") and os.path.isfile(path))


@dataclass(frozen=True)
class Python:
    """The interpreter to run and the folders it must be able to read; by default this one, with its packages.

    libraries: returns the paths of the shared libraries that an interpreter loads; by default it is run once to list them.
    """

    executable: str = field(default_factory=lambda: os.path.realpath(sys.executable))
    prefix: str = field(default_factory=lambda: os.path.realpath(sys.base_prefix))
    packages: tuple[str, ...] = field(default_factory=lambda: tuple(map(os.path.realpath, site.getsitepackages())))
    libraries: Callable[[str], Sequence[str]] = field(default_factory=lambda: linked_libraries)

    def programs(self) -> list[str]:
        """The folders of the interpreter itself: its prefix, and where its executable is, as named and without links."""
        folders = [os.path.dirname(self.executable), self.prefix]
        return list(dict.fromkeys([*folders, *map(os.path.realpath, folders)]))

    def readable(self) -> list[str]:
        """The folders it needs. Raises ToolError if one of them has the home folder in it."""
        folders = [*self.programs(), *self.packages]
        home = os.path.realpath(Path.home())
        for folder in folders:
            if _holds(folder, home):
                raise ToolError(
                    f"Python is installed in {folder}, which holds the home folder {home}, so a sandbox would show that to "
                    "scripts: use a Python that is installed elsewhere, for example in a virtual environment."
                )
        linked = sandbox_mac.libraries_readable([self.executable, *self.libraries(self.executable)])
        return list(dict.fromkeys([*folders, *(folder for folder in linked if not _holds(folder, home))]))


def _holds(folder: str, home: str) -> bool:
    return os.path.commonpath([folder, home]) == folder


def find_sandbox(system: str | None = None, allow_unsandboxed: bool = False) -> str:
    """The best sandbox of this machine. Raises ToolError where there is none, unless scripts may run without."""
    system = system or platform.system()
    if system == "Darwin" and shutil.which("sandbox-exec"):
        return SANDBOX_EXEC
    if system == "Linux":
        if bubblewrap_fails() is None:
            return BUBBLEWRAP
        if namespaces_fail() is None:
            return NAMESPACES
    if allow_unsandboxed:
        return NONE
    reason = f" ({namespaces_fail()})" if system == "Linux" else ""
    remedy = "install bubblewrap 0.7 or newer, or " if system == "Linux" else ""
    raise ToolError(
        f"There is no sandbox here to run a model's Python in{reason}: {remedy}pass --allow-unsandboxed "
        "(allow_unsandboxed=True) to run it with all your rights."
    )


def bubblewrap_fails() -> str | None:
    """Why a sandbox of bubblewrap cannot be made here; None if it can. Makes one to see."""
    return _fails(BUBBLEWRAP) if shutil.which("bwrap") else "bubblewrap is not installed"


def namespaces_fail() -> str | None:
    """Why a sandbox of namespaces cannot be made here; None if it can. Makes one to see."""
    return _fails(NAMESPACES)


@cache
def _fails(kind: str) -> str | None:
    from .python_process import Box

    with tempfile.TemporaryDirectory() as folder:
        try:
            Box(kind, Python(), Path(folder), Limits(folder_bytes=1 << 20)).close()
        except (ToolError, OSError) as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Launch:
    """How to start an interpreter: the command, and its environment."""

    command: list[str]
    environment: dict[str, str]


def interpreter(kind: str, python: Python, folder: Path, limits: Limits, report: int, token: str) -> Launch:
    """The command that starts the worker; inside the sandbox if that runs already.

    folder: where `scratch` is, for a sandbox whose files are on disk; report: the descriptor of the pipe on which the
    worker says `token` when it is ready.
    """
    scratch = os.path.realpath(folder / "scratch")
    inside = DATA_FOLDER if kind in KEPT else scratch
    source = (Path(__file__).parent / "python_worker.py").read_text(encoding="utf-8")
    resources = limits.as_resources()
    if kind in (NONE, SANDBOX_EXEC):
        del resources["RLIMIT_NPROC"]  # it counts all of the user's processes
    config = {
        "limits": resources, "paths": list(python.packages), "folder": inside, "report": report, "token": token,
        "watches_parent": kind not in KEPT,
    }  # fmt: skip
    program = [python.executable, "-I", "-B", "-u", "-X", "utf8", "-c", source, json.dumps(config)]
    environment = {"HOME": inside, "TMPDIR": inside, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    if kind == SANDBOX_EXEC:
        program = ["sandbox-exec", "-p", sandbox_mac.profile(python.readable(), python.programs(), inside), *program]
    return Launch(program, environment)


def box(kind: str, python: Python, folder: Path, limits: Limits, control: int) -> list[str]:
    """The command that makes a sandbox and runs its first process, controlled through the socket `control` (a descriptor)."""
    config: dict[str, object] = {"control": control, "folder": DATA_FOLDER, "uid": _free_user()}
    readable = list(dict.fromkeys([*_LINUX_READABLE, *python.readable()]))
    if kind == NAMESPACES:
        root = folder / "root"
        root.mkdir(exist_ok=True)
        config |= {
            "root": os.path.realpath(root), "parent": os.getpid(), "readable": readable,
            "folder_bytes": limits.folder_bytes, "most_files": 2 * MOST_FILES,
        }  # fmt: skip
    source = (Path(__file__).parent / "sandbox_init.py").read_text(encoding="utf-8")
    program = [python.executable, "-I", "-B", "-S", "-c", source, json.dumps(config)]
    return program if kind == NAMESPACES else bubblewrap_command(program, readable, limits)


def _ways_to(paths: Sequence[str]) -> list[str]:
    """The folders above `paths` that are in none of them, from the root on."""
    above = {str(parent) for path in paths for parent in Path(path).parents} - {"/"}
    return sorted(folder for folder in above if not any(f"{folder}/".startswith(f"{path}/") for path in paths))


def scope(limits: Limits) -> list[str]:
    """A command prefix with which systemd limits all its processes together, by a cgroup; [] if that is not available.

    The kernel then enforces the limit on their total memory at every moment, not only when it is checked.
    """
    command = _scope()
    if not command:
        return []
    memory = limits.memory_bytes + limits.folder_bytes + (64 << 20)  # files are in memory; so is what makes the sandbox
    return [*command, "-p", f"MemoryMax={memory}", "-p", "MemorySwapMax=0", "-p", f"TasksMax={limits.processes + 8}"]


@cache
def _scope() -> list[str]:
    program = shutil.which("systemd-run")
    if program is None:
        return []
    command = [program, *(["--user"] if os.getuid() != 0 else []), "--scope", "--quiet", "--collect"]
    try:
        tried = [*command, "-p", "MemoryMax=64M", "-p", "MemorySwapMax=0", "-p", "TasksMax=8", "/bin/true"]
        finished = subprocess.run(tried, capture_output=True, check=False, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return command if finished.returncode == 0 else []


def _free_user() -> int:
    """The user id for scripts when we are root: an unused one, so that the kernel counts only their processes."""
    return random.SystemRandom().randrange(60_000, 65_000)


def bubblewrap_command(program: Sequence[str], readable: Sequence[str], limits: Limits) -> list[str]:
    """The command that runs `program` under bubblewrap, as the first process there."""
    command = [shutil.which("bwrap") or "bwrap"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:  # no namespace of users: the first process becomes another user, as the kernel sees it
        for power in ("CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"):
            command += ["--cap-add", power]
    else:
        command += ["--unshare-user", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--as-pid-1"]
    for folder in _ways_to([*readable, DATA_FOLDER]):  # bubblewrap would make them for its own user alone
        command += ["--perms", "0755", "--dir", folder]
    for path in readable:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dir", "/dev"]
    for name in _DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    # Files are in memory: its size limits all of them, including deleted ones that are still open.
    command += ["--size", str(limits.folder_bytes), "--perms", "0700", "--tmpfs", DATA_FOLDER]
    for link in ("/tmp", "/dev/shm"):
        if not any(f"{path}/".startswith(f"{link}/") for path in readable):  # else there is a folder already
            command += ["--symlink", DATA_FOLDER, link]
    command += ["--remount-ro", "/"]
    return [*command, "--chdir", "/", "--", *program]
