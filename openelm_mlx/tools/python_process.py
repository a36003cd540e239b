"""Where interpreters of the python tool run: starting, interrupting, measuring and killing their processes.

On Linux an interpreter runs in a `Box`, a sandbox that outlives it; on a Mac, and without a sandbox, it is a process of
its own (`Direct`). Everything here is called from one thread, the one in python_tool.py that owns the sandbox.
interpreter.py talks to the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

from ..errors import ToolError
from . import sandbox_usage
from .sandbox import SANDBOX_EXEC, Launch, Limits, Python, box, scope

START_SECONDS = 60.0


class Place(Protocol):
    """Where interpreters run, one at a time."""

    report: int | None  # the descriptor of its report in the interpreter; None: the same as in this process

    def start(self, launch: Launch, descriptors: list[int]) -> None: ...  # input, output, report

    def interrupt(self) -> None: ...

    def code(self) -> int | None: ...  # the exit code, if it has ended

    def kill(self) -> None: ...  # it, and what it started

    def close(self) -> None: ...

    def excess(self, limits: Limits, files_before: int) -> str | None: ...

    def processes(self) -> int: ...  # how many there are

    def files(self, limits: Limits) -> int: ...  # bytes, or a count, that `excess` compares with what was there before


class Box:
    """A sandbox on Linux, which keeps its files when an interpreter in it has to end.

    Raises ToolError where it cannot be made. process: more arguments for Popen.
    """

    report: int | None = 3

    def __init__(self, kind: str, python: Python, folder: Path, limits: Limits, **process: Any) -> None:
        self.folder = -1
        self._number, self._answer = 0, ""
        self._code: int | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*scope(limits), *box(kind, python, folder, limits, theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()], start_new_session=True, cwd="/", env=_way_to_systemd(), **process,
                )  # fmt: skip
            except BaseException as error:
                self._control.close()
                if isinstance(error, OSError):
                    raise not_started(kind, str(error)) from None
                raise
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            try:
                self._control.settimeout(START_SECONDS)
                data, descriptors, _, _ = socket.recv_fds(self._control, 4096, 1)
            except OSError as error:
                data, descriptors = b"", []
                reason = str(error)
            else:
                reason = ""
            if not data:
                self._end()
                os.set_blocking(errors.fileno(), False)
                said = (errors.read(10_000) or b"").decode("utf-8", "replace").strip()
                raise not_started(kind, said[-300:] or reason)
        (self.folder,) = descriptors
        os.set_inheritable(self.folder, False)

    def start(self, launch: Launch, descriptors: list[int]) -> None:
        self._number, self._code = self._number + 1, None
        message = {"start": self._number, "program": launch.command, "environment": launch.environment}
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except OSError:
            self._end()

    def interrupt(self) -> None:
        self._ask("interrupt", "interrupted")

    def code(self) -> int | None:
        self._listen(0)
        return self._code

    def kill(self) -> None:
        if not self._ask("kill", "killed"):
            self._end()

    @property
    def is_there(self) -> bool:
        """Whether the sandbox still runs: the system may have killed its first process when memory ran out."""
        return self._process.returncode is None

    def close(self) -> None:
        self._end()
        if self.folder >= 0:
            os.close(self.folder)
            self.folder = -1

    def excess(self, limits: Limits, files_before: int) -> str | None:
        reason = _excess_of_processes(sandbox_usage.descendants(self._process.pid), limits)
        if reason is None and (count := self.files(limits)) > max(sandbox_usage.MOST_FILES, files_before):
            reason = f"it was stopped: {count:,} files, and {sandbox_usage.MOST_FILES:,} are allowed"
        return reason

    def processes(self) -> int:
        return len(sandbox_usage.descendants(self._process.pid))

    def files(self, limits: Limits) -> int:
        """The number of files; their bytes are limited by the sandbox."""
        found = os.fstatvfs(self.folder)
        return found.f_files - found.f_ffree

    def _ask(self, word: str, answer: str) -> bool:
        """Tell the first process to do something, and wait until it is done: it must not hit the next script."""
        self._answer = ""
        try:
            self._control.send(json.dumps({word: self._number}).encode())
        except OSError:
            self._end()
        end = time.monotonic() + 10
        while self._answer != answer and self.is_there and time.monotonic() < end:
            self._listen(1)
        return self._answer == answer

    def _listen(self, seconds: float) -> None:
        """Read the first process's messages, waiting up to `seconds` for one."""
        while self.is_there:
            self._control.settimeout(seconds)
            try:
                data = self._control.recv(4096)
            except (TimeoutError, BlockingIOError):
                return
            except OSError:
                data = b""
            if not data:
                self._end()
                return
            message, seconds = json.loads(data), 0
            if message.get("number") == self._number:
                self._code = message.get("code", self._code)
                self._answer = message["did"]

    def _end(self) -> None:
        _kill_tree(self._process)
        self._control.close()
        if self._code is None:
            self._code = -signal.SIGKILL


class Direct:
    """An interpreter that is a process of this program, with files on disk: in sandbox-exec, or in no sandbox."""

    report: int | None = None

    def __init__(self, kind: str, scratch: Path) -> None:
        self._kind, self._scratch = kind, scratch
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, launch: Launch, descriptors: list[int]) -> None:
        given, output, report = descriptors
        if self._scratch.is_symlink() or self._scratch.is_file():
            self._scratch.unlink()
        self._scratch.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            self._scratch.chmod(0o700)  # a script may have locked itself out
        cwd = "/" if self._kind == SANDBOX_EXEC else self._scratch
        try:
            self._process = subprocess.Popen(
                launch.command, stdin=given, stdout=output, stderr=output, cwd=cwd, env=launch.environment,
                pass_fds=[report], start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise not_started(self._kind, str(error)) from None

    def interrupt(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                if self._process.poll() is None:
                    os.killpg(self._process.pid, signal.SIGINT)  # what it started too, as in a terminal

    def code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        if self._process is not None:
            _kill_tree(self._process)

    close = kill

    def excess(self, limits: Limits, files_before: int) -> str | None:
        if self._process is None:
            return None
        pid = self._process.pid
        processes = sandbox_usage.descendants(pid, with_itself=True)
        if sandbox_usage.IS_MAC:  # there it is the only one
            footprint = sandbox_usage.footprint(pid)
            if footprint is None and self._process.poll() is None:
                return "it was stopped: this system does not report its memory"
            processes = {pid: footprint or 0}
        reason = _excess_of_processes(processes, limits)
        if reason is None and self.files(limits) > max(limits.folder_bytes, files_before):
            most = sandbox_usage.MOST_FILES
            reason = f"it was stopped: more than {limits.folder_bytes / 1e6:,.0f} MB of files, or {most:,} files"
        return reason

    def processes(self) -> int:
        return len(sandbox_usage.descendants(self._process.pid)) if self._process is not None else 0

    def files(self, limits: Limits) -> int:
        """Their bytes."""
        enough = 1 << 62
        used = sandbox_usage.files_in(self._scratch, enough)
        if self._process is not None:
            used += sandbox_usage.deleted_files(sandbox_usage.descendants(self._process.pid, with_itself=True))
        return used


def _way_to_systemd() -> dict[str, str]:
    """The environment of the program that makes a sandbox: only what systemd-run needs. An interpreter gets none of it."""
    names = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
    return {name: os.environ[name] for name in names if name in os.environ}


def not_started(kind: str, reason: str) -> ToolError:
    return ToolError(f"Python could not be started in the sandbox ({kind}): {reason.strip() or 'it said nothing'}.")


def _excess_of_processes(processes: dict[int, int], limits: Limits) -> str | None:
    # Up to two of them belong to the sandbox itself.
    if len(processes) > limits.processes + 2:
        return f"it was stopped: more than {limits.processes} processes"
    if sandbox_usage.memory_bytes(processes, limits.memory_bytes) > limits.memory_bytes:
        return f"it was stopped: more than {limits.memory_bytes / 1e6:,.0f} MB of memory"
    return None


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return
    for pid in (*sandbox_usage.descendants(process.pid), process.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
