"""Where the python tool's interpreter runs: which sandbox this machine has, and the command line that starts it there.

macOS has sandbox-exec; Linux has the kernel's namespaces, which sandbox_init.py uses without any program, or bubblewrap
where a system lets no other program use them. In each of them there is no network, one folder to write, and of the rest
of the disk only what Python itself needs. Starting, watching and ending the process is python_tool.py's business.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import ToolError
from .sandbox_init import forbidden_calls

SANDBOX_EXEC, BUBBLEWRAP, NAMESPACES, NONE = "sandbox-exec", "bubblewrap", "namespaces", "none"

# Where gpt-oss was trained to find its files; a Mac cannot show a folder under another name.
DATA_FOLDER = "/mnt/data"

# What dynamic linking, time zones and Python's own tools need of a Linux system.
_LINUX_READABLE = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/mime.types",
)  # fmt: skip
_MAC_READABLE = (
    "/usr/lib",
    "/usr/share",
    "/System/Library",
    "/private/var/db/timezone",
    "/Library/Apple/System/Library",
)
_MAC_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Limits:
    """What a session may take. seconds: for one script, by the clock. memory_bytes: of all its processes together.

    processes: at a time. file_bytes: one file's size; folder_bytes: the scratch folder's. output_bytes: shown of a script.
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


@dataclass(frozen=True)
class Python:
    """The interpreter to run and what it must be able to read; by default this one, with this environment's packages."""

    executable: str = field(default_factory=lambda: os.path.realpath(sys.executable))
    prefix: str = field(default_factory=lambda: os.path.realpath(sys.base_prefix))
    packages: tuple[str, ...] = field(default_factory=lambda: tuple(map(os.path.realpath, site.getsitepackages())))

    def readable(self) -> list[str]:
        """The folders it needs. Raises ToolError if one of them has the home folder in it."""
        folders = [self.prefix, os.path.dirname(self.executable), *self.packages]
        home = os.path.realpath(Path.home())
        for folder in folders:
            if os.path.commonpath([folder, home]) == folder:
                raise ToolError(
                    f"Python is installed in {folder}, which holds the home folder {home}, so a sandbox would show that to "
                    "scripts: use a Python that is installed elsewhere, for example in a virtual environment."
                )
        return folders


def find_sandbox(system: str | None = None, allow_unsandboxed: bool = False) -> str:
    """The best sandbox of this machine. Raises ToolError where there is none, unless scripts may run without."""
    system = system or platform.system()
    if system == "Darwin" and shutil.which("sandbox-exec"):
        return SANDBOX_EXEC
    if system == "Linux":
        if namespaces_fail() is None:
            return NAMESPACES
        # Some systems let only programs that they know make namespaces, bubblewrap among them.
        if (program := shutil.which("bwrap")) and _bubblewrap_works(program):
            return BUBBLEWRAP
    if allow_unsandboxed:
        return NONE
    reason = f" ({namespaces_fail()})" if system == "Linux" else ""
    remedy = "install bubblewrap, or " if system == "Linux" else ""
    raise ToolError(
        f"There is no sandbox here to run a model's Python in{reason}: {remedy}pass --allow-unsandboxed "
        "(allow_unsandboxed=True) to run it with all your rights."
    )


@cache
def _bubblewrap_works(program: str) -> bool:
    command = [program, "--unshare-all", "--ro-bind", "/", "/", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@cache
def namespaces_fail() -> str | None:
    """Why a sandbox of namespaces cannot be made here; None if it can. Makes one to see."""
    with tempfile.TemporaryDirectory() as folder:
        reading, writing = os.pipe()
        try:
            program = ["/bin/sh", "-c", "exit 7"]
            command = namespaces_command(program, Path(folder), _LINUX_READABLE, writing)
            finished = subprocess.run(
                command, stdin=subprocess.PIPE, capture_output=True, pass_fds=[writing], check=False, timeout=20
            )
        finally:
            os.close(reading)
            os.close(writing)
    if finished.returncode == 7:
        return None
    return finished.stderr.decode(errors="replace").strip()[-200:] or f"exit code {finished.returncode}"


@dataclass(frozen=True)
class Launch:
    """How to start an interpreter: the command, its folder as the interpreter sees it, and its environment."""

    command: list[str]
    environment: dict[str, str]


def launch(kind: str, python: Python, folder: Path, limits: Limits, report: int) -> Launch:
    """Start the worker in the sandbox `kind`. folder: where `scratch` is to be; report: a pipe that the worker inherits."""
    scratch = folder / "scratch"
    inside = DATA_FOLDER if kind in (BUBBLEWRAP, NAMESPACES) else os.path.realpath(scratch)
    source = (Path(__file__).parent / "python_worker.py").read_text(encoding="utf-8")
    resources = limits.as_resources()
    if kind == NONE:
        del resources["RLIMIT_NPROC"]  # it counts all of the user's processes
    config = {"limits": resources, "paths": list(python.packages), "folder": inside, "report": report}
    if kind == BUBBLEWRAP:  # the other one installs it itself
        config["filter"] = forbidden_calls().hex()
    program = [python.executable, "-I", "-B", "-u", "-X", "utf8", "-c", source, json.dumps(config)]
    environment = {"HOME": inside, "TMPDIR": inside, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    if kind == NONE:
        return Launch(program, environment)
    readable = python.readable()
    if kind == SANDBOX_EXEC:
        return Launch(["sandbox-exec", "-p", mac_profile(readable, inside), *program], environment)
    if kind == BUBBLEWRAP:
        return Launch(bubblewrap_command(program, scratch, [*_LINUX_READABLE, *readable], environment), environment)
    return Launch(namespaces_command(program, folder, [*_LINUX_READABLE, *readable], report, environment), environment)


def mac_profile(readable: Sequence[str], folder: str) -> str:
    """The profile for sandbox-exec: all is forbidden but what stands here. Paths are real paths, without links."""
    below = [f"(subpath {_quoted(path)})" for path in (*_MAC_READABLE, *readable, folder)]
    ancestors = sorted({str(parent) for path in (*readable, folder) for parent in Path(path).parents})
    return "\n".join(
        [
            "(version 1)",
            "(deny default)",
            '(import "system.sb")',
            "(deny network*)",
            "(deny process-fork)",
            f"(allow process-exec {' '.join(f'(subpath {_quoted(path)})' for path in readable)})",
            "(allow signal (target self))",
            "(allow sysctl-read)",
            f"(allow file-read* {' '.join(below)} {' '.join(f'(literal {_quoted(path)})' for path in _MAC_DEVICES)})",
            f"(allow file-read-metadata {' '.join(f'(literal {_quoted(path)})' for path in ancestors)})",
            f"(allow file-write* (subpath {_quoted(folder)}))",
            '(allow file-write-data (literal "/dev/null"))',
        ]
    )


def _quoted(path: str) -> str:
    return json.dumps(path, ensure_ascii=False)  # the profile's strings are Scheme's: the same quotes and backslashes


def bubblewrap_command(
    program: Sequence[str], scratch: Path, readable: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """The command that runs `program` under bubblewrap."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    for path in dict.fromkeys(readable):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--bind", str(scratch), DATA_FOLDER]
    if not any(path.startswith("/tmp/") for path in readable):  # else there is a folder already
        command += ["--symlink", DATA_FOLDER, "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--chdir", DATA_FOLDER, "--", *program]


def namespaces_command(
    program: Sequence[str],
    folder: Path,
    readable: Sequence[str],
    report: int,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """The command that runs `program` in namespaces of its own, as a user of its own where we are root.

    `folder` gets `scratch`, which that user owns, and `root`, where the sandbox's root is mounted for itself alone.
    """
    scratch, root = folder / "scratch", folder / "root"
    for path in (scratch, root):
        path.mkdir(exist_ok=True)
    # A user that nobody else is: the kernel counts its processes, and no file but the scratch folder's is its own.
    uid = scratch.stat().st_uid or random.SystemRandom().randrange(60_000, 65_000)
    if os.getuid() == 0:
        os.chown(scratch, uid, uid)
    config = {
        "program": list(program), "environment": environment or {}, "parent": os.getpid(), "uid": uid, "report": report,
        "readable": list(dict.fromkeys(readable)), "root": os.path.realpath(root), "folder": DATA_FOLDER,
        "scratch": os.path.realpath(scratch),
    }  # fmt: skip
    return [sys.executable, "-I", str(Path(__file__).parent / "sandbox_init.py"), json.dumps(config)]
