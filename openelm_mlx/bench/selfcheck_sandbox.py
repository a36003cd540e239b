"""Check 14: the python tool's sandbox starts, and lets nothing through."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import ToolError
from ..memory.macos import on_macos
from ..tools.python_tool import PythonTool
from ..tools.sandbox import SANDBOX_EXEC, find_sandbox
from .selfcheck import CheckFailed, Clock, NotHere


def check_sandbox(clock: Clock) -> str:
    """The python tool starts, has its libraries, and cannot reach what is not its own."""
    try:
        kind = find_sandbox()
    except ToolError as error:
        if on_macos():
            raise CheckFailed(f"there is none: {error}") from None
        raise NotHere(f"there is no sandbox here: {error}") from None
    is_mac = kind == SANDBOX_EXEC
    with tempfile.TemporaryDirectory() as place, socket.socket() as server, PythonTool(sandbox=kind) as tool:
        server.bind(("127.0.0.1", 0))
        server.listen()
        started = time.perf_counter()
        first = tool("1 + 1")
        seconds = time.perf_counter() - started
        if first != "2":
            raise CheckFailed(f"{kind} does not start: {first[:200]}")
        wrong = [
            f"{name}: {found[:120]}" for name, found in _attacks(tool, Path(place), server.getsockname()[1], is_mac)
        ]
    if wrong:
        raise CheckFailed(f"{kind}: " + "; ".join(wrong))
    outlived = _outlives_its_program(kind)
    if outlived is not None:
        raise CheckFailed(f"{kind}: {outlived}")
    return f"{kind} starts in {seconds:.2f} s, imports ssl, sqlite3, lzma and numpy, and lets nothing through"


def _attacks(tool: Callable[[str], str], place: Path, port: int, is_mac: bool) -> list[tuple[str, str]]:
    """What came out otherwise than it should, with its name."""
    profile, secret = Path.home() / ".zshrc", place / "secret"
    secret.write_text("a password")
    refused = ("PermissionError", "FileNotFoundError", "Read-only file system")
    tried: list[tuple[str, str, tuple[str, ...]]] = [
        ("imports", "import ssl, sqlite3, lzma, numpy\nint(numpy.arange(3).sum())", ("3",)),
        ("the home folder can be read", f"open({str(profile)!r}).read()", refused),
        ("another file can be read", f"open({str(secret)!r}).read()", refused),
        ("another file can be written", f"open({str(place / 'x')!r}, 'w').write('x')", refused),
        ("the network is there", f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", ("PermissionError",)),
    ]  # fmt: skip
    if is_mac:
        environment = (
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nsize = ctypes.c_size_t(1 << 20)\n"
            f"name, data = (ctypes.c_int * 3)(1, 49, {os.getpid()}), ctypes.create_string_buffer(1 << 20)\n"
            "libc.sysctl(name, 3, data, ctypes.byref(size), None, 0)"
        )
        tried += [
            ("a process can be started", "import os\nif os.fork() == 0: os._exit(0)", ("PermissionError",)),
            ("another process's environment can be read", environment, ("-1",)),
        ]
    # In parts, so that it can be stopped before the machine has to swap; the tool's limit is 2 GiB.
    greedy = "import time\nparts = []\nfor _ in range(30):\n    parts.append(b'x' * (100 << 20))\n    time.sleep(0.05)\n'all'"
    tried.append(("3 GB of memory can be had", greedy, ("MB of memory", "MemoryError")))
    found = []
    for name, script, expected in tried:
        text = tool(script)
        if not any(each in text for each in expected):
            found.append((name, text))
    if (place / "x").exists():
        found.append(("another file was written", "it is there"))
    return found


def _outlives_its_program(kind: str) -> str | None:
    """What is wrong when a program with a sandbox is killed; None where the interpreter ends within seconds."""
    program = (
        "from openelm_mlx.tools.python_tool import PythonTool\n"
        f"tool = PythonTool(sandbox={kind!r})\ntool('1')\n"
        "print(tool._owner._place._process.pid, flush=True)\ntool('while True: pass')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    assert process.stdout is not None
    with process.stdout as stream:
        line = stream.readline()
        process.kill()
        process.wait()
    if not line.strip().isdigit():
        return "a program that starts one ended by itself"
    started, pid = time.perf_counter(), int(line)
    while time.perf_counter() - started < 10:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        if state.stdout.strip().startswith("Z") or (state.returncode and not state.stdout.strip()):
            return None  # ended, and not waited for
        time.sleep(0.1)
    os.kill(pid, 9)
    return "the interpreter outlived a program that was killed"
