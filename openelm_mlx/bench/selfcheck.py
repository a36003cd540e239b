"""Whether this machine computes correctly: fifteen checks for machines that the developers do not have.

Each check is a function that returns what it saw, or raises `CheckFailed` or `NotHere`; the expected result is listed with
it. Checks run in a process of their own: a kernel that never ends, or crashes, fails only its own check. The cheap checks
come first.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Seconds for all checks and the timings after them, on the slowest Mac.
MOST_SECONDS = 280.0
# The part of these that is reserved for timings.
TIMING_SECONDS = 80.0
# What a worker prints before an outcome; any other output is ignored.
_MARK = "selfcheck-outcome:"
# Seconds for starting Python and importing MLX.
_START_SECONDS = 30.0
# How many seconds the last check may exceed the total, and how long a killed process is waited for.
_LATE_SECONDS, _KILL_SECONDS = 10.0, 5.0


class CheckFailed(Exception):
    """A check found something wrong; the message says what."""


class NotHere(Exception):
    """A check does not apply to this machine; the message says why."""


class Clock:
    """How many seconds are left for one check: a long one does as much as there is time for."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def has(self, seconds: float) -> bool:
        """Whether `seconds` seconds are left."""
        return self.left() >= seconds


@dataclass(frozen=True)
class Check:
    """One check. number: fixed, for reports. expected: the expected result, for people. seconds: the most it may take."""

    number: int
    name: str
    expected: str
    seconds: float
    run: Callable[[Clock], str]


@dataclass(frozen=True)
class Outcome:
    """One check's result. passed is None if it does not apply to this machine, or had no time."""

    number: int
    name: str
    passed: bool | None
    expected: str
    found: str
    seconds: float

    @property
    def word(self) -> str:
        """The result in a word or two."""
        return {True: "pass", False: "FAIL", None: "not on this machine"}[self.passed]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_checks() -> dict[int, Check]:
    """Every check by its number, in the order in which they run: cheap ones first."""
    from . import selfcheck_kernels as kernels
    from . import selfcheck_machine as machine
    from . import selfcheck_models as models
    from . import selfcheck_sandbox as sandbox

    found = [
        Check(
            1, "facts of the machine", "every fact is known; macOS 14 or later", 20, machine.check_facts,
        ),
        Check(
            4, "rotary embedding", "at most 1e-6 off float64 at position 33; the rest to be noted", 20,
            kernels.check_rope,
        ),
        Check(7, "views under load", "1,000 rounds of write, evaluate, compare: no difference", 30, kernels.check_views),
        Check(
            3, "parity with Apple's and OpenAI's code", "float32 logits at most 5e-5 and 1e-4 off", 60,
            models.check_parity,
        ),
        Check(9, "compiled step", "as the plain step; no piece has too many inputs", 40, models.check_compiled_step),
        Check(
            6, "experts' products", "equal bits within a kernel, whatever other rows are in the batch", 40,
            kernels.check_expert_products,
        ),
        Check(
            5, "attention in all its forms", "at most 2e-2 (bfloat16) and 1e-5 (float32) off float64", 60,
            kernels.check_attention,
        ),
        Check(8, "experts on disk", "48 tokens, fewest slots, two threads: bits as in memory", 60, models.check_streamed),
        Check(11, "peaks of memory", "the process's peak is at least MLX's", 40, machine.check_peaks),
        Check(
            2, "gpt-oss with 256 open files", "gpt-oss-20b's tensors, 4 experts a layer, load", 60, models.check_open_files,
        ),
        Check(14, "the python tool's sandbox", "starts, and every attack is refused", 60, sandbox.check_sandbox),
        Check(10, "wired limit", "set, 200 answers, unset: memory returns, nothing grows", 60, machine.check_wired_limit),
        Check(12, "disk", "2.5 to 7 GB/s on most Macs, far more out of the cache", 60, machine.check_disk),
        Check(
            13, "a prompt of 2,048 at once", "the GPU's watchdog lets it through", 60, models.check_prompt_chunk,
        ),
        Check(
            15, "used memory", "within 1 GB of memory_pressure; cached files do not count", 40, machine.check_used_memory,
        ),
    ]  # fmt: skip
    return {check.number: check for check in found}


def run_check(check: Check, seconds: float | None = None) -> Outcome:
    """Run one check here. An unexpected error is a failure."""
    started = time.perf_counter()
    passed: bool | None = True
    try:
        found = check.run(Clock(check.seconds if seconds is None else seconds))
    except NotHere as reason:
        passed, found = None, str(reason)
    except CheckFailed as failure:
        passed, found = False, str(failure)
    except Exception as error:  # noqa: BLE001 - the report is for machines nobody has seen: whatever happens is news
        frame = traceback.extract_tb(error.__traceback__)[-1]
        passed = False
        found = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return Outcome(check.number, check.name, passed, check.expected, found, time.perf_counter() - started)


def run_checks(
    checks: Sequence[Check],
    seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    start: Callable[[Sequence[int], float], Worker] | None = None,
) -> Iterator[Outcome]:
    """Run checks in another process, an outcome at a time, all within `seconds`.

    A check that exceeds its own seconds is killed and has failed; so has one whose process ends. A check without time left is
    not run. Closing the iterator ends the process.
    """
    started, waiting, worker = clock(), list(checks), None
    try:
        while waiting:
            check, left = waiting[0], seconds - (clock() - started)
            if left < 1:
                yield _not_run(check, seconds)
                waiting.pop(0)
                continue
            is_new = worker is None
            if worker is None:
                worker = (start or Worker)([each.number for each in waiting], left)
            limit = min(check.seconds, left)
            began = clock()
            usual = limit + (_START_SECONDS if is_new else 0) + 2
            outcome = worker.next(min(usual, left + _LATE_SECONDS))
            if outcome is None:
                took = clock() - began
                reason = worker.end()
                worker = None
                # It had all of the remaining time, but less than its own limit.
                if reason is None and (limit < check.seconds or left + _LATE_SECONDS < usual):
                    outcome = _not_run(check, seconds)
                else:
                    found = reason or f"it took longer than {limit:.0f} s and was ended"
                    outcome = Outcome(check.number, check.name, False, check.expected, found, took)
            yield outcome
            waiting.pop(0)
    finally:
        if worker is not None:
            worker.end()


def _not_run(check: Check, seconds: float) -> Outcome:
    found = f"not run: the other checks took all of the {seconds / 60:.1f} minutes; --only {check.number} runs it alone"
    return Outcome(check.number, check.name, None, check.expected, found, 0.0)


class Worker:
    """A process that runs checks one after the other and reports each outcome."""

    def __init__(self, numbers: Sequence[int], seconds: float, environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openelm_mlx.bench.selfcheck", str(seconds), *map(str, numbers)],
            stdout=subprocess.PIPE, stderr=self._errors, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
            env=dict(os.environ) if environment is None else dict(environment),
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def next(self, seconds: float) -> Outcome | None:
        """The next outcome; None if none arrives within `seconds`, or the process has ended."""
        end = time.perf_counter() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.perf_counter()))
            except queue.Empty:
                return None
            if line is None:
                return None
            if line.startswith(_MARK):
                return Outcome(**json.loads(line.removeprefix(_MARK)))

    def end(self) -> str | None:
        """End the process and what it has started; how it had ended by itself before, None where it had not."""
        try:
            code = self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        # What waits in the kernel for a GPU that hangs ends when the GPU does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        if code is None:
            return None
        ended = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return f"its process ended with {ended}" + (f": {words[-1]}" if words else "")


def _worked(seconds: float, numbers: Sequence[int]) -> Iterator[str]:
    """A worker's output, a line for each outcome."""
    clock, checks = Clock(seconds), all_checks()
    for number in numbers:
        outcome = run_check(checks[number], min(checks[number].seconds, clock.left()))
        yield _MARK + json.dumps(outcome.as_dict()) + "\n"


if __name__ == "__main__":
    from openelm_mlx.bench import selfcheck as itself  # the same classes as the checks have
    from openelm_mlx.platforms import keep_float32, use_device

    keep_float32()
    use_device()
    for line in itself._worked(float(sys.argv[1]), [int(each) for each in sys.argv[2:]]):
        sys.stdout.write(line)
        sys.stdout.flush()
