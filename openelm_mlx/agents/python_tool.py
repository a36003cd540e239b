"""gpt-oss's python tool: scripts of the model, run one after the other in an interpreter that keeps its variables.

The interpreter is another process, in a sandbox (sandbox.py). This file starts it, gives it scripts, collects what they
write, and ends it with all its children when a script takes more time, memory, processes or disk than it may.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import final

from ..errors import ToolError
from ..text.schema import PYTHON
from .sandbox import NONE, Limits, Python, find_sandbox, launch

_START_SECONDS = 30.0
_WATCH_SECONDS = 0.1
_MOST_FILES = 20_000


@final
class PythonTool:
    """A tool that runs Python. Called with a script, it returns what the script wrote and its last expression's value.

    Variables, imports and files stay until `close`, which a `with` block calls; if a script has to be stopped, the next
    one begins anew, with the files. Raises ToolError where the machine has no sandbox and allow_unsandboxed is False.
    """

    name = "python"
    namespace: str | None = None
    description = PYTHON.description or ""
    parameters: dict[str, object] | None = None  # the message is the script itself

    def __init__(
        self, *, limits: Limits | None = None, allow_unsandboxed: bool = False, python: Python | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.sandbox = find_sandbox(allow_unsandboxed=allow_unsandboxed)
        self._python = python or Python()
        self._folder = Path(tempfile.mkdtemp(prefix="openelm_mlx-python-"))
        self._session: _Session | None = None

    @property
    def scratch(self) -> Path:
        """The folder that scripts see as /mnt/data (on a Mac, and without a sandbox, as the working folder)."""
        return self._folder / "scratch"

    def __call__(self, arguments: str) -> str:
        """Run a script; its output, with a notice where it was cut short or the script was stopped."""
        if not self._folder.exists():
            raise ToolError("This python tool is closed: make another one.")
        if self._session is None:
            self._session = _Session(self.sandbox, self._python, self._folder, self.limits)
        output, has_ended = self._session.run(arguments)
        if has_ended:
            self.restart()
        return (
            output.removesuffix("\n")
            or "(The script wrote nothing. Its last expression, or what it prints, is what you see.)"
        )

    def interrupt(self) -> None:
        """Stop the script that is running, if one is; for another thread to call."""
        if self._session is not None:
            self._session.is_interrupted.set()

    def restart(self) -> None:
        """Forget the variables and end what scripts have left running; files stay."""
        if self._session is not None:
            self._session.end()
            self._session = None

    def close(self) -> None:
        """End the interpreter and delete its files."""
        self.restart()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class _Session:
    """One interpreter process and its pipes."""

    def __init__(self, kind: str, python: Python, folder: Path, limits: Limits) -> None:
        self.is_interrupted = threading.Event()
        self._limits, self._scratch = limits, folder / "scratch"
        self._scratch.mkdir(exist_ok=True)
        self._report, writing = os.pipe()
        try:
            plan = launch(kind, python, folder, limits, writing)
            self._process = subprocess.Popen(
                plan.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._scratch if kind == NONE else "/",
                env=plan.environment,
                pass_fds=[writing],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._report)
            raise
        finally:
            os.close(writing)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._scripts, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._scripts, self._output, self._report):
            os.set_blocking(descriptor, False)
        text, has_ended = self._follow(b"", _START_SECONDS)
        if has_ended:
            self.end()
            raise ToolError(
                f"Python could not be started in the sandbox ({kind}): {text.strip() or 'it said nothing'}."
            )

    def run(self, script: str) -> tuple[str, bool]:
        """What a script wrote, and whether the session is over."""
        data = script.encode("utf-8", "replace")
        return self._follow(b"%d\n" % len(data) + data, self._limits.seconds)

    def end(self) -> None:
        """Kill the interpreter and its children, and close the pipes."""
        for pid in (*_descendants(self._process.pid), self._process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1

    def _follow(self, data: bytes, seconds: float) -> tuple[str, bool]:
        """Send `data`, and collect output until the interpreter reports, ends, or has to be stopped."""
        output, end, reason = _Output(self._limits.output_bytes), time.monotonic() + seconds, None
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._report, selectors.EVENT_READ)
            if data:
                selector.register(self._scripts, selectors.EVENT_WRITE)
            next_look = time.monotonic() + _WATCH_SECONDS
            while reason is None:
                for key, _ in selector.select(_WATCH_SECONDS):
                    if key.fd == self._scripts:
                        data = self._send(data)
                        if not data:
                            selector.unregister(self._scripts)
                    elif key.fd == self._output and not output.read_from(self._output):
                        selector.unregister(self._output)  # the interpreter closed it; it may go on
                    elif key.fd == self._report:
                        reason = "" if os.read(self._report, 4096) else "Python ended"
                now = time.monotonic()
                if reason is None and self.is_interrupted.is_set():
                    reason = "it was interrupted"
                if reason is None and now > end:
                    reason = f"it was stopped after {seconds:g} seconds"
                if reason is None and now > next_look:
                    reason, next_look = self._excess(), time.monotonic() + _WATCH_SECONDS
        output.read_from(self._output)  # what was written before the report is in the pipe
        text = output.text()
        if reason:
            text += f"\n[{reason}; its variables are gone, files are kept]"
        return text.lstrip("\n") if reason else text, bool(reason)

    def _send(self, data: bytes) -> bytes:
        try:
            return data[os.write(self._scripts, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            return b""  # it has ended; its report says so

    def _excess(self) -> str | None:
        """What the session takes too much of, if anything. The kernel limits one process; this is about all of them."""
        processes = _descendants(self._process.pid)
        # Up to two of them make the sandbox.
        if len(processes) > self._limits.processes + 2:
            return f"it was stopped: more than {self._limits.processes} processes"
        if sum(processes.values()) > self._limits.memory_bytes:
            return f"it was stopped: more than {self._limits.memory_bytes / 1e6:,.0f} MB of memory"
        if _folder_bytes(self._scratch, self._limits.folder_bytes) > self._limits.folder_bytes:
            return f"it was stopped: more than {self._limits.folder_bytes / 1e6:,.0f} MB of files, or {_MOST_FILES:,} files"
        return None


class _Output:
    """What a script wrote, its beginning and its end, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._start, self._end, self._count = bytearray(), bytearray(), 0

    def read_from(self, descriptor: int) -> bool:
        """Take what is in a pipe, at most some of it at a time; False where it has ended."""
        for _ in range(64):
            try:
                data = os.read(descriptor, 65_536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._add(data)
        return True

    def _add(self, data: bytes) -> None:
        self._count += len(data)
        room = self._half - len(self._start)
        self._start += data[:room]
        self._end = (self._end + data[room:])[-self._half :]

    def text(self) -> str:
        """The output, with a notice where its middle is left out."""
        start, end = self._start.decode("utf-8", "replace"), self._end.decode("utf-8", "replace")
        left_out = self._count - len(self._start) - len(self._end)
        return f"{start}\n[{left_out:,} bytes of output left out]\n{end}" if left_out else start + end


def _descendants(pid: int) -> dict[int, int]:
    """The processes that descend from `pid`, without itself, and the bytes of memory that each has.

    None on a Mac: there is no /proc, and there the sandbox does not let Python start others.
    """
    parents, memory = {}, {}
    for name in _entries("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(name)], memory[int(name)] = int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: memory[child] for child in found - {pid} if child in memory}


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _folder_bytes(folder: Path, enough: int) -> int:
    """The bytes on disk below a folder; stops counting past `enough`, and takes too many files for too many bytes."""
    total = count = 0
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
        count += len(names) + len(folders)
        if count > _MOST_FILES:
            return enough + 1
        if total > enough:
            break
    return total
