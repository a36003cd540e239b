"""One interpreter of the python tool: giving it scripts, collecting what they write, ending it within its limits."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import time
from collections.abc import Callable
from pathlib import Path

from .python_process import START_SECONDS, Place, not_started
from .sandbox import Limits, Python, interpreter

_WATCH_SECONDS = 0.1
_GRACE_SECONDS = 2.0  # for a script to end after an interrupt, so that variables are kept


class Interpreter:
    """One interpreter and its pipes."""

    def __init__(self, kind: str, place: Place, python: Python, folder: Path, limits: Limits) -> None:
        self._place, self._limits = place, limits
        self._files_before = 0  # file usage at the start or end of the last script
        pipes = [os.pipe() for _ in range(3)]
        (given, self._scripts), (self._output, output), (self._report, report) = pipes
        token = secrets.token_hex(16)
        try:
            number = report if place.report is None else place.report
            place.start(interpreter(kind, python, folder, limits, number, token), [given, output, report])
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for descriptor in (given, output, report):
                os.close(descriptor)
        for descriptor in (self._scripts, self._output, self._report):
            os.set_blocking(descriptor, False)
        text, has_ended = self._follow(memoryview(b""), token, START_SECONDS, lambda: False)
        if has_ended:
            self.end()
            raise not_started(kind, text)

    def run(self, script: str, is_interrupted: Callable[[], bool]) -> tuple[str, bool]:
        """Run a script; return its output, and whether the interpreter has to be replaced."""
        data, token = script.encode("utf-8", "replace"), secrets.token_hex(16)
        header = f"{token} {len(data)}\n".encode()
        return self._follow(memoryview(header + data), token, self._limits.seconds, is_interrupted)

    def trouble(self) -> str | None:
        """Why the interpreter has to be replaced, checked between two scripts; None if it is fine."""
        code = self._place.code()
        if code is not None:
            return f"Python ended {_how(code)}"
        return self._place.excess(self._limits, self._files_before)

    def end(self) -> None:
        """End the interpreter and the processes that scripts have started."""
        self._place.kill()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for descriptor in (self._scripts, self._output, self._report):
            if descriptor >= 0:
                os.close(descriptor)
        self._scripts = self._output = self._report = -1

    # One loop over everything that may happen: every branch reads and sets the same few variables.
    def _follow(  # noqa: C901
        self, data: memoryview, token: str, seconds: float, is_interrupted: Callable[[], bool]
    ) -> tuple[str, bool]:
        """Send `data`, and collect output until the interpreter reports `token`, ends, or has to be ended."""
        output, report, end = _Output(self._limits.output_bytes), b"", time.monotonic() + seconds
        fatal: str | None = None
        interrupted: str | None = None  # why it was sent an interrupt
        self._files_before, processes_before = self._place.files(self._limits), self._place.processes()
        expected = token.encode() + b"\n"
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._report, selectors.EVENT_READ)
            if data:
                selector.register(self._scripts, selectors.EVENT_WRITE)
            next_look = time.monotonic() + _WATCH_SECONDS
            while fatal is None and report != expected:
                for key, _ in selector.select(_WATCH_SECONDS):
                    if key.fd == self._scripts:
                        data = self._send(data)
                        if not data:
                            selector.unregister(self._scripts)
                    elif key.fd == self._output and not output.read_from(self._output):
                        selector.unregister(self._output)  # the interpreter closed it; it may go on
                    elif key.fd == self._report:
                        part = os.read(self._report, 4096)
                        report += part
                        if not part:
                            fatal = self._how_it_ended()
                        elif not expected.startswith(report):
                            fatal = "it was stopped: it wrote into the interpreter's own pipe"
                now = time.monotonic()
                if interrupted is None and (is_interrupted() or now > end):
                    interrupted = (
                        "it was interrupted" if is_interrupted() else f"it was stopped after {seconds:g} seconds"
                    )
                    self._place.interrupt()
                    end = now + _GRACE_SECONDS
                if fatal is None and report != expected and now > next_look:
                    if (code := self._place.code()) is not None:  # a child of it may hold its pipes open
                        fatal = f"Python ended {_how(code)}"
                    elif interrupted is not None and now > end:
                        fatal = interrupted
                    else:
                        fatal = self._place.excess(self._limits, self._files_before)
                    next_look = time.monotonic() + _WATCH_SECONDS
        if fatal is None and interrupted is not None and self._place.processes() > processes_before:
            fatal = interrupted  # what it started would go on
        if fatal is None:
            self._files_before = self._place.files(self._limits)
        output.read_from(self._output)  # what was written before the report is in the pipe
        text = output.text()
        told = text.removesuffix("\n") + "\n"
        if fatal is not None:
            return f"{told}[{fatal}; its variables are gone, files are kept]".lstrip("\n"), True
        if interrupted is not None:
            return f"{told}[{interrupted}; variables and files are kept]".lstrip("\n"), False
        return text, False

    def _how_it_ended(self) -> str:
        """The report's pipe is closed: by the end of the interpreter, or by a script."""
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if (code := self._place.code()) is not None:
                return f"Python ended {_how(code)}"
            time.sleep(0.01)
        return "it was stopped: it closed the interpreter's own pipe"

    def _send(self, data: memoryview) -> memoryview:
        try:
            return data[os.write(self._scripts, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            return data[:0]  # it has ended; its report says so


def _how(code: int) -> str:
    number = -code if code < 0 else 0
    if number:
        with contextlib.suppress(ValueError):
            return f"(killed by {signal.Signals(number).name})"
        return f"(killed by signal {number})"
    return f"(exit code {code})"


class _Output:
    """A script's output in bounded memory: its beginning and its end."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._start, self._end, self._count = bytearray(), bytearray(), 0

    def read_from(self, descriptor: int) -> bool:
        """Read what is in a pipe, a limited amount at a time; False when the pipe has ended."""
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
        self._end = (self._end + data[room:])[-self._half :] if self._half else bytearray()

    def text(self) -> str:
        """The output, with a notice where its middle is left out."""
        start, end = self._start.decode("utf-8", "replace"), self._end.decode("utf-8", "replace")
        left_out = self._count - len(self._start) - len(self._end)
        return f"{start}\n[{left_out:,} bytes of output left out]\n{end}" if left_out else start + end
