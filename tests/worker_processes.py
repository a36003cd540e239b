"""Workers as processes on this machine, for tests; they die with the test that started them, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of a child that has not said where it listens, on a loaded machine.
START_SECONDS = 120


class Worker:
    """One `serve-layers`. lines: what it has said so far; since: from which of them on `said` looks."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "openelm_mlx", "serve-layers", "--port", str(port), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        self.lines: list[str] = []
        self.since = 0
        self._spoke = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            found = re.search(r"port (\d+)", self.said("Serving", START_SECONDS))
            assert found is not None
            self.port = int(found[1])
        except BaseException:
            self.kill()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def said(self, text: str, seconds: float = 60, start: int | None = None) -> str:
        """The first line from `start` (or `since`) on with this text; waits for it."""
        start = self.since if start is None else start
        with self._spoke:
            found = self._spoke.wait_for(lambda: [line for line in self.lines[start:] if text in line], seconds)
        assert found, f"the worker never said {text!r}, but {self.lines}"
        return found[0]

    def is_free(self, seconds: float = 60) -> bool:
        """Whether every first machine that came has left; waits for that."""

        def count(text: str) -> int:
            return sum(text in line for line in self.lines)

        with self._spoke:
            return self._spoke.wait_for(lambda: count("is connected.") == count("waits for the next one"), seconds)

    def kill(self) -> None:
        """Kill it, also where it is stopped."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        assert self.process.stderr is not None

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._spoke:
                self.lines.append(line)
                self._spoke.notify_all()


@contextmanager
def workers(count: int, *arguments: str) -> Iterator[list[Worker]]:
    """So many workers."""
    made: list[Worker] = []
    try:
        for _ in range(count):
            made.append(Worker(*arguments))
        yield made
    finally:
        for each in made:
            each.kill()
